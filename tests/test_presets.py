"""Presets: every file in `configuration/` is a config that builds, and its README tells the truth about it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import random_tokens
from transformers import AlbertConfig, AlbertForMaskedLM, HrmTextConfig, HrmTextForCausalLM

from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForMaskedLM

FOLDER = Path(__file__).parents[1] / "configuration"
PRESETS = sorted(path.name for path in FOLDER.glob("*.json"))

ROW = re.compile(
    r"^\| \[(?P<name>[\w.-]+)\]\((?P=name)\) \| (?P<layers>[\d /]+) \| (?P<loops>\d+) \| (?P<slots>\d+) "
    r"\| (?P<width>\d+) \| (?P<parameters>[\d,]+) \|",
    flags=re.MULTILINE,
)
ROWS = {row["name"]: row for row in ROW.finditer((FOLDER / "README.md").read_text(encoding="utf-8"))}


def build(config: LoopedConfig) -> torch.nn.Module:
    """The language model of a config, without memory for its weights."""
    with torch.device("meta"):
        return (LoopedForCausalLM if config.is_causal else LoopedForMaskedLM)(config)


def parcae(layers: int, width: int) -> int:
    """Parcae with `layers` layers in each part: tied embeddings, 3 n blocks, value tables in every other."""
    block = 4 * width * width + 2 * width * 4 * width + 2 * width
    tables = 3 * layers // 2
    injection, readout, norms = 2 * width + width * width, width * width, 2 * width
    value = tables * (32768 * width + width // 128 * 32)
    return 32768 * width + 3 * layers * block + value + injection + readout + norms


def huginn() -> int:
    """Eight sandwich blocks with a bias on q and k, the adapter, one norm, tied embeddings."""
    width, wide = 5280, 17920
    block = 4 * width * width + 2 * width + 3 * width * wide + 4 * width
    return 65536 * width + 8 * block + 2 * width * width + width


def retrofit(layers: int, vocabulary: int, wide: int, key_values: int, norms: int) -> int:
    """Untied Llama or OLMo blocks 2048 wide, the adapter and one norm; `norms` weights in the norms of a block."""
    width = 2048
    block = 2 * width * width + 2 * width * key_values + 3 * width * wide + norms
    return 2 * vocabulary * width + layers * block + 2 * width * width + width


def ouro(layers: int) -> int:
    """Untied embeddings, blocks with four norms, one norm, the exit gate with its bias."""
    width, wide = 2048, 5632
    return 2 * 49152 * width + layers * (4 * width * width + 3 * width * wide + 4 * width) + width + width + 1


def nanbeige() -> int:
    """Untied embeddings, blocks with 48 heads over 8 of 128 channels, one norm."""
    width, wide, queries, key_values = 3072, 10752, 48 * 128, 8 * 128
    block = 2 * width * queries + 2 * width * key_values + 3 * width * wide + 2 * width
    return 2 * 166144 * width + 22 * block + width


def recursive() -> int:
    """SmolLM-360M's blocks: the first, ten shared ones and the last; tied embeddings, one norm."""
    width, wide, key_values = 960, 2560, 320
    block = 2 * width * width + 2 * width * key_values + 3 * width * wide + 2 * width
    return 49152 * width + 12 * block + width


def universal() -> int:
    """One block with two layer norms and biases in the MLP alone, a norm, the halting gate; tied embeddings."""
    width, wide = 512, 2048
    return 32768 * width + 4 * width * width + 2 * width * wide + wide + width + 4 * width + 2 * width + width + 1


def albert(**sizes: int) -> int:
    """Transformers' own ALBERT."""
    config = AlbertConfig(embedding_size=128, num_hidden_groups=1, inner_group_num=1, **sizes)
    with torch.device("meta"):
        return AlbertForMaskedLM(config).num_parameters()


def hrm_text() -> int:
    """Transformers' own HRM-Text, whose defaults are the 1B model; its frozen vector is a buffer of ours."""
    with torch.device("meta"):
        return HrmTextForCausalLM(HrmTextConfig()).num_parameters(only_trainable=True)


PUBLISHED = {
    "parcae-140m.json": lambda: parcae(2, 768),
    "parcae-370m.json": lambda: parcae(4, 1024),
    "parcae-770m.json": lambda: parcae(6, 1280),
    "parcae-1.3b.json": lambda: parcae(8, 1536),
    "huginn-0125.json": huginn,
    "retrofit-tinyllama-4-8-4.json": lambda: retrofit(16, 32000, 5632, 256, 2 * 2048),
    "retrofit-llama-3.2-1b-4-6-4.json": lambda: retrofit(14, 128256, 8192, 512, 2 * 2048),
    "retrofit-olmo-2-1b-4-6-4.json": lambda: retrofit(14, 100352, 8192, 2048, 4 * 2048),
    "ouro-1.4b.json": lambda: ouro(24),
    "ouro-2.6b.json": lambda: ouro(48),
    "nanbeige4.2-3b.json": nanbeige,
    "mor-360m-recursive-3.json": recursive,
    "hrm-text-1b.json": hrm_text,
    "albert-base-v2.json": lambda: albert(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "albert-large-v2.json": lambda: albert(hidden_size=1024, intermediate_size=4096, num_attention_heads=16),
    "albert-xlarge-v2.json": lambda: albert(hidden_size=2048, intermediate_size=8192, num_attention_heads=16),
    "albert-xxlarge-v2.json": lambda: albert(hidden_size=4096, intermediate_size=16384, num_attention_heads=64),
    "universal-transformer-base.json": universal,
}
OURS = {"small.json", "smollm2-135m-retrofit.json", "tiny.json"}


def test_every_preset_is_ours_or_has_a_published_size():
    assert {*PUBLISHED, *OURS} == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_original(name):
    assert build(LoopedConfig.from_pretrained(FOLDER / name)).num_parameters() == PUBLISHED[name]()


def test_the_readme_lists_every_preset_and_no_other():
    assert sorted(ROWS) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_as_large_as_the_readme_says(name):
    config, row = LoopedConfig.from_pretrained(FOLDER / name), ROWS[name]
    model = build(config)
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
