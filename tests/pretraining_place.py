"""A folder with text and a recipe, for the tests that run `python -m modeling_looped train`.

Use it in a test file with `pytest_plugins = ("pretraining_place",)`.
"""

import json
import random

import pytest
import yaml
from once import once_per_run

WORDS = ["the", "cat", "sat", "on", "a", "mat", "naïve", "and", "then", "другой", "cat", "sat", "there", "too", "1234"]

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_prelude_layers": 1,
    "num_core_layers": 1,
    "num_coda_layers": 1,
    "num_loops": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    # whatever is random in training must be the same after a kill
    "state_init": "normal",
    "depth_sampling": {"type": "poisson", "granularity": "sequence"},
    "backprop_loops": 2,
}


def fill(folder):
    """Write text and recipe."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(120)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "valid.txt").write_text(" ".join(draw.choices(WORDS, k=300)), encoding="utf-8")
    recipe = {
        "model": MODEL,
        "tokenizer_vocab_size": 272,
        "dataset_name": str(folder / "train.jsonl"),
        "eval_datasets": {"valid": str(folder / "valid.txt")},
        "eval_num_loops": [1, 3, 5],
        "max_length": 16,
        "max_train_tokens": 1024,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 7,
        "optim_recipe": "muon",
        "muon_weight_decay": 0.2,
        "muon_weight_decay_schedule": "linear",
        "muon_momentum_warmup_steps": 6,
        "learning_rate": "5e-3",
        "lr_scheduler_type": "warmup_stable_decay",
        "cooldown_steps": 0.5,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The folder."""
    return once_per_run(tmp_path_factory, "pretraining", fill)
