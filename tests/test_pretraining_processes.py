"""`accelerate launch -m modeling_looped train` with two processes on the CPU (gloo) trains what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_looped.__main__ import main

pytest_plugins = ("pretraining_place",)

ROOT = Path(__file__).parent.parent
PATIENCE = 900
#: Without what is drawn in a forward, of which two processes make one and one process makes two.
SETTINGS = [
    "--per_device_train_batch_size",
    "2",
    "--max_train_tokens",
    "512",
    "--optim_recipe",
    "adamw",
    "--model_config",
    '{"depth_sampling": "fixed", "state_init": "zeros"}',
]


@pytest.mark.slow
def test_two_processes_train_what_one_does(place, tmp_path):
    config = str(ROOT / "configuration" / "accelerate" / "ddp_cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", "modeling_looped"]
    arguments = ["train", "--recipe", str(place / "recipe.yaml"), *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, *arguments, "--output_dir", str(tmp_path / "two")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert main([*arguments, "--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"]) == 0
    records = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert [record["distributed"] for record in records] == ["NO", "MULTI_CPU"]
    assert records[0]["tokens_seen"] == records[1]["tokens_seen"] == 512
    assert records[0]["tokenizer"] == records[1]["tokenizer"]
    assert records[0]["data"] == records[1]["data"]
    one, two = (record["metrics"] for record in records)
    names = [name for name in one if name.startswith("eval") and not name.endswith(("time", "per_second"))]
    assert len(names) == 11
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0.05, atol=2e-3, msg=name)
