"""A folder with a tiny teacher, text and a recipe, for the tests that run `conversion/distill.py`.

Use it in a test file with `pytest_plugins = ("distillation_place",)`; then `import distill` finds the program.
"""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from teachers import save_teacher

sys.path.insert(0, str(Path(__file__).parent.parent / "conversion"))

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "then", "the", "other", "cat", "sat", "there", "too"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher, text in every form, and a recipe."""
    folder = tmp_path_factory.mktemp("distillation")
    save_teacher(folder / "teacher")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(120)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "valid.txt").write_text(" ".join(draw.choices(WORDS, k=300)))
    options = {"loops": 2, "keep": "0-1,4-5", "loop": "1,4", "gate": 0.1, "text": str(folder / "valid.txt")}
    recipe = {
        "teacher_model_name_or_path": str(folder / "teacher"),
        "student": {"program": "compress", "options": options},
        "dataset_name": str(folder / "train.jsonl"),
        "eval_datasets": {"valid": str(folder / "valid.txt")},
        "max_length": 16,
        "max_train_tokens": 1024,
        "per_device_train_batch_size": 4,
        "optim_recipe": "muon",
        "learning_rate": "5e-3",
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
