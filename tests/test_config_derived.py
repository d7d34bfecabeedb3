"""What follows from what in `LoopedConfig`, whoever writes it, and that a config survives every way through JSON."""

import copy
import dataclasses
import inspect
import itertools
import json
import pickle
from typing import Any

import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.generation import GenerationConfig

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.configuration_looped import STRATEGY_FIELDS
from modeling_looped.registry import LayerShape

FULL, SLIDING = "full_attention", "sliding_attention"


def slots_of(config: LoopedConfig) -> int:
    loops = config.num_loops if config.kv_sharing == "none" else 1
    return config.num_prelude_layers + config.num_core_layers * loops + config.num_coda_layers


def assert_consistent(config: LoopedConfig) -> None:
    assert config.num_hidden_layers == slots_of(config) == len(config.layer_types) == len(DynamicCache(config=config))
    config.validate()


def edit_file(path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("num_loops", [1, 2, 9])
def test_the_depth_follows_the_loop_count_wherever_it_is_written(num_loops, tmp_path):
    expected = 2 + 2 * num_loops
    built = tiny_config(num_loops=num_loops)
    written = tiny_config()
    written.num_loops = num_loops
    updated = tiny_config()
    updated.update({"num_loops": num_loops})
    tiny_config().save_pretrained(tmp_path)
    loaded = LoopedConfig.from_pretrained(tmp_path, num_loops=num_loops)
    automatic = AutoConfig.from_pretrained(tmp_path, num_loops=num_loops)
    from_dict = LoopedConfig.from_dict(tiny_config().to_dict(), num_loops=num_loops)
    for config in (built, written, updated, loaded, automatic, from_dict, tiny_config().with_num_loops(num_loops)):
        assert config.num_loops == num_loops
        assert config.num_hidden_layers == expected
        assert_consistent(config)


@pytest.mark.parametrize("num_loops", [1, 5])
def test_the_depth_follows_a_loop_count_given_to_a_loaded_model(num_loops, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for auto in (LoopedForCausalLM, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path, num_loops=num_loops)
        assert_consistent(model.config)
        assert len(model(random_tokens(), use_cache=True).past_key_values) == 2 + 2 * num_loops


@pytest.mark.parametrize("num_loops", [1, 2, 9])
def test_a_loop_count_edited_by_hand_in_the_file_is_in_order(num_loops, tmp_path):
    tiny_config(sliding_window=4, stored_layer_types=[FULL, SLIDING, FULL, SLIDING]).save_pretrained(tmp_path)
    edit_file(tmp_path, num_loops=num_loops)
    config = LoopedConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == 2 + 2 * num_loops
    assert config.layer_types == [FULL] + [SLIDING, FULL] * num_loops + [SLIDING]
    assert_consistent(config)


@pytest.mark.parametrize("part", ["num_prelude_layers", "num_core_layers", "num_coda_layers"])
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_the_depth_follows_every_part(part, layers):
    config = tiny_config()
    setattr(config, part, layers)
    assert_consistent(config)
    assert config.to_dict() == tiny_config(**{part: layers}).to_dict()


def test_a_write_gives_the_config_that_the_constructor_would():
    for settings in (
        {"num_loops": 7},
        {"sliding_window": 5},
        {"injection": "add"},
        {"backprop_loops": 2},
        {"kv_sharing": "first_loop"},
        {"injection": "none", "state_init": "input", "core_group_size": 1},
    ):
        config = tiny_config()
        for name, value in settings.items():
            setattr(config, name, value)
        assert config.to_dict() == tiny_config(**settings).to_dict()


@pytest.mark.parametrize("num_loops", [1, 2, 9])
def test_where_loops_share_keys_and_values_the_depth_is_that_of_the_stored_layers(num_loops):
    types = [FULL, SLIDING, FULL, SLIDING]
    config = tiny_config(kv_sharing="first_loop", sliding_window=4, stored_layer_types=types, num_loops=num_loops)
    assert config.num_hidden_layers == 4
    assert config.layer_types == types
    assert_consistent(config)
    assert config.with_num_loops(5).num_hidden_layers == 4
    config.kv_sharing = "none"
    assert config.num_hidden_layers == 2 + 2 * num_loops
    assert_consistent(config)


@pytest.mark.parametrize(
    ("core_group_size", "core"),
    [(None, [FULL, SLIDING] * 3), (2, [FULL, SLIDING] * 3), (1, [FULL] * 3 + [SLIDING] * 3)],
)
def test_the_types_of_the_slots_follow_the_groups(core_group_size, core):
    config = tiny_config(
        sliding_window=4,
        stored_layer_types=[SLIDING, FULL, SLIDING, FULL],
        injection="none",
        state_init="input",
        core_group_size=core_group_size,
    )
    assert config.layer_types == [SLIDING, *core, FULL]
    assert_consistent(config)
    assert [config.stored_layer_type(layer) for layer in range(4)] == [SLIDING, FULL, SLIDING, FULL]


def test_a_core_without_sizes_of_its_own_has_those_of_the_others():
    config = tiny_config()
    assert {config.layer_shape(layer) for layer in range(4)} == {LayerShape(32, 48, 4, 2, 8)}
    assert config.state_size == 32
    wide = tiny_config(**VARIANTS["wide"])
    assert [wide.layer_shape(layer) for layer in (0, 3)] == [LayerShape(32, 48, 4, 2, 8)] * 2
    assert [wide.layer_shape(layer) for layer in (1, 2)] == [LayerShape(48, 40, 6, 3, 8)] * 2
    assert wide.state_size == 48
    # key-value heads of the core follow its heads where these are given, as they do outside of it
    assert tiny_config(core_num_attention_heads=6).layer_shape(1) == LayerShape(32, 48, 6, 6, 8)
    assert tiny_config(core_num_key_value_heads=4).layer_shape(1) == LayerShape(32, 48, 4, 4, 8)


def test_the_bias_of_the_values_follows_where_it_is_left_out():
    assert [tiny_config(attention_bias=bias).attention_value_bias for bias in (False, True)] == [False, True]
    assert tiny_config(attention_bias=True, attention_value_bias=False).attention_value_bias is False
    assert tiny_config(attention_value_bias=True).attention_value_bias is True


def test_early_exit_may_write_a_smaller_depth_and_any_depth_field_restores_it():
    config = tiny_config()
    config.num_hidden_layers = 3
    assert config.num_hidden_layers == 3
    assert config.slots_to_run(config.num_loops) == 3
    config.rms_norm_eps = 1e-6
    assert config.num_hidden_layers == 3, "an unrelated write must not end the draft"
    config.num_loops = 5
    assert config.num_hidden_layers == 12


def test_a_refused_write_keeps_what_early_exit_has_written():
    config = tiny_config()
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="num_loops=0"):
        config.num_loops = 0
    assert (config.num_loops, config.num_hidden_layers) == (3, 3)


def test_layer_types_follow_the_stored_ones_slot_by_slot():
    config = tiny_config(sliding_window=4, stored_layer_types=[SLIDING, FULL, SLIDING, FULL], num_loops=2)
    assert config.layer_types == [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]
    assert [config.stored_layer_type(layer) for layer in range(4)] == [SLIDING, FULL, SLIDING, FULL]
    assert [config.sliding_window_of(layer) for layer in range(4)] == [4, None, 4, None]
    assert [layer.is_sliding for layer in DynamicCache(config=config).layers] == [
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    config.stored_layer_types = [FULL] * 4
    assert config.layer_types == [FULL] * 6
    config.stored_layer_types = None
    assert config.layer_types == [SLIDING] * 6
    config.sliding_window = None
    assert config.layer_types == [FULL] * 6


def test_heads_follow_where_they_are_left_out_and_stay_where_they_are_given():
    config = LoopedConfig(hidden_size=48, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    config = LoopedConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=10)
    assert (config.num_key_value_heads, config.head_dim) == (2, 10)


@pytest.mark.parametrize("field", STRATEGY_FIELDS)
def test_specs_are_complete_after_every_write(field):
    for name, cls in ((name, STRATEGY_FIELDS[field][name]) for name in STRATEGY_FIELDS[field]):
        config = tiny_config(state_init="input")
        for written in (name, {"type": name}):
            setattr(config, field, written)
            assert set(getattr(config, field)) == {"type", *(f.name for f in dataclasses.fields(cls.Params))}


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("loop_update", "learned_scale"),
        ("loop_conditioning", "embedding"),
        ("loop_conditioning", "norms"),
        ("loop_adapter", "lora"),
    ],
)
def test_the_length_of_a_table_is_fixed_when_the_spec_is_made(field, spec, tmp_path):
    config = tiny_config(**{field: spec})
    assert getattr(config, field)["table_loops"] == 3
    config.num_loops = 9
    assert getattr(config, field)["table_loops"] == 3
    assert getattr(config.with_num_loops(2), field)["table_loops"] == 3
    config.save_pretrained(tmp_path)
    assert getattr(LoopedConfig.from_pretrained(tmp_path, num_loops=1), field)["table_loops"] == 3
    setattr(config, field, spec)  # a new spec is made for the loop count of now
    assert getattr(config, field)["table_loops"] == 9
    setattr(config, field, {"type": spec, "table_loops": 5})
    assert getattr(config, field)["table_loops"] == 5


def test_an_alias_is_stored_under_the_types_own_name():
    assert tiny_config(injection="linear").injection == tiny_config(injection="concat").injection
    assert tiny_config(injection={"type": "linear", "start": "state"}).injection["type"] == "concat"


def test_with_num_loops_leaves_the_original_alone():
    config = tiny_config()
    before = copy.deepcopy(config.to_dict())
    other = config.with_num_loops(11)
    assert (other.num_loops, other.num_hidden_layers) == (11, 24)
    assert config.to_dict() == before


def round_trips(config: LoopedConfig, folder) -> list[LoopedConfig]:
    """The config through every way that Transformers writes and reads one."""
    config.to_json_file(folder / "whole.json", use_diff=False)
    config.to_json_file(folder / "diff.json")
    config.save_pretrained(folder / "nested" / "inside")
    return [
        LoopedConfig.from_json_file(folder / "whole.json"),
        LoopedConfig.from_json_file(folder / "diff.json"),
        LoopedConfig.from_pretrained(folder / "nested" / "inside"),
        LoopedConfig.from_pretrained(folder / "nested", subfolder="inside"),
        AutoConfig.from_pretrained(folder / "nested" / "inside"),
        LoopedConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        LoopedConfig(**json.loads(config.to_json_string())),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_round_trip_is_exact(variant, tmp_path):
    config = tiny_config(**VARIANTS[variant])
    expected = config.to_dict()
    for back in round_trips(config, tmp_path):
        found = back.to_dict()
        found["_name_or_path"] = expected["_name_or_path"]  # where it was read from
        assert found == expected
        assert type(back) is LoopedConfig


def test_every_field_round_trips_at_a_value_that_is_not_its_default(tmp_path):
    settings = {
        "num_prelude_layers": 3,
        "num_core_layers": 1,
        "core_group_size": 1,
        "core_hidden_size": 40,
        "core_intermediate_size": 56,
        "core_num_attention_heads": 6,
        "core_num_key_value_heads": 3,
        "is_causal": False,
        "max_trained_loops": 8,
        "head_dim": 10,
        "hidden_act": "gelu",
        "mlp_type": "plain",
        "mlp_output_act": "relu",
        "attention_gate": "per_channel",
        "attention_output_bias": True,
        "qkv_clip": 8.0,
        "mlp_bias": True,
        "attention_dropout": 0.25,
        "qk_norm": "flat",
        "norm_type": "layer_unbiased",
        "norm_placement": "sandwich_sum",
        "final_norm": "after_loops",
        "prelude_norm": False,
        "rms_norm_eps": 3e-6,
        "stored_layer_types": [FULL, SLIDING, FULL, SLIDING, FULL],
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0},
        "position_embedding": "learned",
        "embedding_size": 24,
        "embedding_projection_bias": False,
        "embedding_norm": True,
        "type_vocab_size": 2,
        "mlm_head": "transform",
        "sequence_pooling": "first_token",
        "embedding_scale": 0.1,
        "logit_scale": 1 / 3,
        "final_logit_softcapping": 30.0,
        "injection": {"type": "diagonal", "initial_decay": 0.1, "input_matrix": "zoh"},
        "state_init": {"type": "normal", "std": 1e-4, "seed": 2**40, "truncation": None},
        "loop_update": {"type": "gated", "initial_gate": 0.7, "free_loops": 1},
        "loop_conditioning": {"type": "norms", "table_loops": 4},
        "loop_adapter": {"type": "lora", "rank": 3, "alpha": 1.5, "targets": ["q_proj"], "table_loops": 2},
        "halting": {"type": "act", "threshold": 0.9, "initial_bias": -1.0, "form": "universal"},
        "readout": "linear",
        "value_embedding": {"type": "gated", "layers": [4, 0], "gate_channels": 7},
        "depth_sampling": {"type": "uniform", "min_loops": 2, "max_loops": 9, "seed": 5},
        "backprop_loops": 2,
        "checkpoint_granularity": "loop",
        "initializer_range": 0.017,
        "weight_init": "orthogonal",
        "output_projection_init": "depth_scaled",
        "use_cache": False,
        "eos_token_id": [2, 3],
        "tie_word_embeddings": True,
        "classifier_dropout": 0.0,
    }
    # what does not go with some of these
    apart = [
        {"attention_bias": True, "attention_value_bias": False, "kv_sharing": "first_loop"},
        {
            "attention_value_bias": True,
            "schedule": {"type": "nested", "inner_loops": 3},
            "injection": "none",
            "state_init": "input",
            "prefix_lm": True,
        },
        {"add_cross_attention": True, "is_decoder": True, "cross_attention_hidden_size": 48},
        {"depth_attention": {"type": "anchors", "stride": 3}},
        {"loop_loss": {"type": "expected_exit", "entropy_weight": 0.05}, "halting": "gate"},
        {"ngram_embedding": {"type": "hashed", "max_n": 2, "table_sizes": [5, 7], "boundary_token_id": 1}},
        {"residual_streams": {"type": "mhc", "num_streams": 3, "mixing": "identity", "own_loops": 2}},
    ]
    configs, plain = [tiny_config(**some) for some in (settings, *apart)], LoopedConfig()
    own = inspect.get_annotations(LoopedConfig)
    assert [f for f in own if all(getattr(config, f) == getattr(plain, f) for config in configs)] == []
    for config in configs:
        for back in round_trips(config, tmp_path):
            assert {field: getattr(back, field) for field in own} == {field: getattr(config, field) for field in own}


def test_a_user_written_attribute_and_the_special_tokens_survive(tmp_path):
    config = tiny_config()
    config.note = {"source": "somewhere"}
    config.save_pretrained(tmp_path)
    back = LoopedConfig.from_pretrained(tmp_path)
    assert back.note == {"source": "somewhere"}
    assert (back.pad_token_id, back.bos_token_id, back.eos_token_id) == (0, 1, 2)
    assert {"pad_token_id", "bos_token_id", "eos_token_id"} <= LoopedConfig().to_dict().keys()


def test_the_generation_config_of_a_model_keeps_its_loop_count(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(num_loops=5, pad_token_id=0, eos_token_id=2)
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.num_loops == 5
    assert loaded.config.num_loops == 3


def test_every_field_is_documented():
    own = set(inspect.get_annotations(LoopedConfig))
    results = {"num_hidden_layers", "layer_types"}
    shared = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}
    entries = LoopedConfig.__doc__.split("Args:")[1].split("Example:")[0]
    assert {field for field in own - shared - results if field not in entries} == set()


#: Fields given at loading that are valid together only.
GIVEN_TOGETHER: dict[str, dict[str, Any]] = {
    "window": {"stored_layer_types": [FULL, SLIDING, FULL, SLIDING], "sliding_window": 4},
    "layers": {"num_core_layers": 3, "stored_layer_types": [FULL] * 5},
    "groups": {"num_core_layers": 3, "core_group_size": 3},
    "groups of one": {"injection": "none", "state_init": "input", "core_group_size": 1},
    "table": {"num_loops": 5, "loop_conditioning": "embedding", "loop_adapter": {"type": "lora"}},
    "core width": {"core_hidden_size": 48, "readout": "linear"},
    "gate": {"halting": "gate", "loop_loss": "exit_gate"},
    "schedule": {"schedule": "nested", "injection": "none", "state_init": "input", "loop_conditioning": "embedding"},
}


@pytest.mark.parametrize("load", [LoopedConfig.from_pretrained, AutoConfig.from_pretrained], ids=["ours", "auto"])
@pytest.mark.parametrize("case", GIVEN_TOGETHER)
def test_fields_given_at_loading_are_taken_together_in_any_order(case, load, tmp_path):
    given = GIVEN_TOGETHER[case]
    expected = tiny_config(**given)
    tiny_config().save_pretrained(tmp_path)
    for order in itertools.permutations(given):
        found = load(tmp_path, **{name: given[name] for name in order})
        assert {name: getattr(found, name) for name in inspect.get_annotations(LoopedConfig)} == {
            name: getattr(expected, name) for name in inspect.get_annotations(LoopedConfig)
        }


def test_fields_given_at_loading_that_do_not_go_with_the_files_are_refused(tmp_path):
    tiny_config(injection="none", state_init="input").save_pretrained(tmp_path)
    refused: list[dict[str, Any]] = [{"backprop_loops": 1}, {"state_init": "zeros"}, {"stored_layer_types": [FULL]}]
    for given in refused:
        with pytest.raises(StrictDataclassError, match=next(iter(given))):
            LoopedConfig.from_pretrained(tmp_path, **given)


def test_what_is_no_field_is_handled_as_in_transformers(tmp_path):
    stored = tiny_config().to_dict()
    before = copy.deepcopy(stored)
    config, unused = LoopedConfig.from_dict(
        stored, num_loops=5, dtype=torch.bfloat16, attn_implementation="eager", note=1, return_unused_kwargs=True
    )
    assert unused == {"note": 1}
    assert (config.num_loops, config.num_hidden_layers, config.dtype) == (5, 12, torch.bfloat16)
    assert config._attn_implementation == "eager"
    assert stored.keys() == before.keys()
    assert stored["num_loops"] == before["num_loops"] == 3
    tiny_model().save_pretrained(tmp_path)
    for dtype in ("auto", torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager", num_loops=5)
        assert (loaded.dtype, loaded.config.num_loops) == (torch.float32, 5)
        assert loaded.config._attn_implementation == "eager"
    labelled = LoopedConfig.from_pretrained(tmp_path, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    assert (labelled.num_labels, labelled.id2label) == (3, {0: "a", 1: "b", 2: "c"})
