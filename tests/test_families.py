"""Families: each table covers its stock config and weights in full, reads the same both ways, and refuses by name."""

import dataclasses
from typing import Any

import pytest
import torch
from teachers import ROPE, TEACHERS, tiny_teacher
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.families import FAMILIES, BuiltIn, family_of

#: Fields of a stock config that each family translates by its `sliding` entry and by the length of the stack.
BY_LAYER = {"num_hidden_layers", "layer_types", "sliding_window"}


def stacked_config(stock: PreTrainedConfig) -> LoopedConfig:
    """Our config of the same stack, without a loop."""
    fields = family_of(stock).looped_fields(stock)
    return LoopedConfig(**fields, num_prelude_layers=stock.num_hidden_layers, num_core_layers=0, num_coda_layers=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_the_stock_config_is_translated_or_left_out_for_a_reason(model_type):
    family, config_class = FAMILIES[model_type], CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(config_class)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    translated = {place for place in family.fields.values() if isinstance(place, str)}
    assert declared - inherited - translated - BY_LAYER == set(family.not_carried)
    assert all(family.not_carried.values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_entry_names_a_field_that_exists(model_type):
    ours = {field.name for field in dataclasses.fields(LoopedConfig)}
    stock = AutoConfig.for_model(model_type)
    theirs = {place for place in FAMILIES[model_type].fields.values() if isinstance(place, str)}
    assert set(FAMILIES[model_type].fields) <= ours
    assert all(hasattr(stock, place) for place in theirs - {"head_dim"})  # which Qwen2 and OLMo2 read if it is there


@pytest.mark.parametrize("name", TEACHERS)
def test_a_stock_config_comes_back_unchanged(name):
    stock = tiny_teacher(name).config
    config = stacked_config(stock)
    fit = family_of(stock).stock_fit(config, config.layer_types)
    back = AutoConfig.for_model(stock.model_type, **fit.fields)
    assert fit.blocking == {}
    assert fit.zero_biases == []
    compared = {place for place in family_of(stock).fields.values() if isinstance(place, str)} | BY_LAYER
    for field in compared - {"head_dim"}:
        assert getattr(back, field, None) == getattr(stock, field, None), field
    assert back.head_dim == (getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_weights_map_one_to_one_and_back(name):
    teacher = tiny_teacher(name)
    state_map = family_of(teacher.config).state_map(tied=teacher.config.tie_word_embeddings)
    with torch.device("meta"):
        stack = LoopedForCausalLM(stacked_config(teacher.config))
    state = teacher.state_dict()
    moved = state_map.apply(state, {key: tensor.shape for key, tensor in stack.state_dict().items()})
    back = state_map.inverse().apply(
        {"lm_head.weight": state["lm_head.weight"], **moved}, {key: tensor.shape for key, tensor in state.items()}
    )
    tied = {"lm_head.weight"} if teacher.config.tie_word_embeddings else set()
    assert moved.keys() == stack.state_dict().keys() - tied
    assert back.keys() == state.keys() - tied
    assert all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("gemma2", "soft cap on attention logits"),
        ("granite", "scale of its own on attention logits"),
        ("t5", "encoder"),
        ("gpt2", "llama, mistral, qwen2, qwen3, olmo2"),
    ],
)
def test_another_architecture_is_refused_with_what_stands_in_the_way(model_type, named):
    with pytest.raises(ValueError, match=named) as raised:
        family_of(AutoConfig.for_model(model_type))
    assert f"model_type={model_type!r}" in str(raised.value)


class LaterLlamaConfig(LlamaConfig):
    """Llama as a later Transformers may have it, with one more field."""

    attention_sinks: int = 0


UNSUPPORTED: dict[str, tuple[PreTrainedConfig, str]] = {
    "partial rotary": (
        LlamaConfig(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0.5 \(supported: 1",
    ),
    "rope per layer type": (
        LlamaConfig(
            num_hidden_layers=1, layer_types=["full_attention"], rope_parameters={"full_attention": dict(ROPE)}
        ),
        "rope_parameters=.* per type of layer",
    ),
    "chunked layers": (
        AutoConfig.for_model("qwen3", num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"]),
        r"layer_types of \['chunked_attention', 'full_attention'\] \(supported: \['full_attention', 'sliding_atten",
    ),
    "mixed layers in a family that has one kind": (
        LlamaConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
        r"layer_types of \['full_attention', 'sliding_attention'\] \(supported: \['full_attention'\]\)",
    ),
    "layers of several sizes": (
        LlamaConfig(num_hidden_layers=2, per_layer_config={1: {"intermediate_size": 64}}),
        r"per_layer_config \(supported: the same sizes",
    ),
    "a field of a later Transformers": (LaterLlamaConfig(attention_sinks=4), r"attention_sinks=4 \(supported: 0\)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_feature_that_no_looped_layer_has_is_refused_by_name(case):
    stock, named = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=named):
        family_of(stock).looped_fields(stock)


def test_all_refused_features_are_named_at_once():
    stock = LaterLlamaConfig(attention_sinks=4, rope_parameters={**ROPE, "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match=r"partial_rotary_factor.*attention_sinks"):
        family_of(stock).looped_fields(stock)


def test_an_unset_field_of_a_later_transformers_is_no_obstacle():
    assert family_of(LaterLlamaConfig()).looped_fields(LaterLlamaConfig())["vocab_size"] == 32000


def test_the_tables_say_what_the_stock_code_has_built_in():
    """A wrong `BuiltIn` would show as a weight too many or too few in the stock model."""
    expected: dict[str, Any] = {"attention_bias": "q_proj.bias", "attention_output_bias": "o_proj.bias"}
    expected |= {"mlp_bias": "mlp.up_proj.bias"}
    for model_type, family in FAMILIES.items():
        with torch.device("meta"):
            keys = AutoModelForCausalLM.from_config(tiny_teacher(model_type).config).state_dict().keys()
        for field, ending in expected.items():
            place = family.fields[field]
            if isinstance(place, BuiltIn):
                assert any(key.endswith(ending) for key in keys) is place.value, (model_type, field)
