"""`accelerate launch` with two processes on the CPU (gloo) trains what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest_plugins = ("distillation_place",)

ROOT = Path(__file__).parent.parent
PATIENCE = 400


def launch(recipe, output, *more):
    config = "configuration/accelerate/ddp_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "conversion/distill.py"]
    command += ["--recipe", str(recipe), "--output_dir", str(output), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


@pytest.mark.slow
def test_two_processes_train_what_one_does(place, tmp_path):
    import distill

    targets = ["--teacher_targets", str(tmp_path / "targets")]
    settings = ["--per_device_train_batch_size", "2", "--max_train_tokens", "512", "--optim_recipe", "adamw", *targets]
    launch(place / "recipe.yaml", tmp_path / "two", *settings)
    alone = ["--recipe", str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "one"), *settings]
    assert distill.main([*alone, "--gradient_accumulation_steps", "2"]) == 0
    records = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["tokens_seen"] == records[1]["tokens_seen"] == 512
    assert records[0]["metrics"]["eval_valid_tokens"] == records[1]["metrics"]["eval_valid_tokens"]
    for name in ("eval_valid_loss", "eval_valid_kl"):
        assert records[1]["metrics"][name] == pytest.approx(records[0]["metrics"][name], rel=1e-3)
    one, two, start = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two", "one/start"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name] - start[name], tensor - start[name], rtol=0.05, atol=1e-3)
    losses = []
    for folder in ("one", "two"):
        log = json.loads((tmp_path / folder / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
