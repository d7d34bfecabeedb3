"""Presets: every file in `configuration/` is a config that builds, and its README tells the truth about it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import random_tokens

from modeling_looped import LoopedConfig, LoopedForCausalLM

FOLDER = Path(__file__).parents[1] / "configuration"
PRESETS = sorted(path.name for path in FOLDER.glob("*.json"))

ROW = re.compile(
    r"^\| \[(?P<name>[\w.-]+)\]\((?P=name)\) \| (?P<layers>[\d /]+) \| (?P<loops>\d+) \| (?P<slots>\d+) "
    r"\| (?P<width>\d+) \| (?P<parameters>[\d,]+) \|",
    flags=re.MULTILINE,
)
ROWS = {row["name"]: row for row in ROW.finditer((FOLDER / "README.md").read_text(encoding="utf-8"))}


def test_the_readme_lists_every_preset_and_no_other():
    assert sorted(ROWS) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_as_large_as_the_readme_says(name):
    config, row = LoopedConfig.from_pretrained(FOLDER / name), ROWS[name]
    with torch.device("meta"):
        model = LoopedForCausalLM(config)
    parts = [config.num_prelude_layers, config.num_core_layers, config.num_coda_layers]
    assert " / ".join(map(str, parts)) == row["layers"]
    assert (config.num_loops, config.num_hidden_layers) == (int(row["loops"]), int(row["slots"]))
    assert config.hidden_size == int(row["width"])
    assert f"{model.num_parameters():,}" == row["parameters"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_declared_fields_only_and_they_arrive(name):
    preset = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    config = LoopedConfig.from_pretrained(FOLDER / name)
    declared = {field.name for field in dataclasses.fields(LoopedConfig)} - {"num_hidden_layers", "layer_types"}
    assert preset.pop("model_type") == LoopedConfig.model_type
    assert set(preset) <= declared
    for field, value in preset.items():
        assert getattr(config, field) == value, field


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_saved_loads_as_the_same_config(name, tmp_path):
    config = LoopedConfig.from_pretrained(FOLDER / name)
    config.save_pretrained(tmp_path)
    assert LoopedConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_preset_takes_another_loop_count_at_loading():
    config = LoopedConfig.from_pretrained(FOLDER / "tiny.json", num_loops=2)
    assert config.num_hidden_layers == 1 + 2 * 2 + 1


def test_the_tiny_preset_runs():
    model = LoopedForCausalLM(LoopedConfig.from_pretrained(FOLDER / "tiny.json")).eval()
    assert model(random_tokens(vocab_size=512)).logits.isfinite().all()
