"""What `LoopedConfig` refuses, and how it says so: every error names the field, the value and what is allowed."""

import copy

import pytest
import transformers
from helpers import tiny_config
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.generation import GenerationConfig

from modeling_looped import LoopedConfig
from modeling_looped.config_checks import CORE_SIZES
from modeling_looped.configuration_looped import FOREIGN_LOOP_NAMES, STRATEGY_FIELDS

FULL, SLIDING = "full_attention", "sliding_attention"
CORE_WIDTH = "core_hidden_size=48 is not hidden_size=32"

#: What is written -> what the message must contain, beside the field and the value.
REFUSED = {
    "no_loops": ({"num_loops": 0}, ["num_loops=0", "at least 1"]),
    "negative_loops": ({"num_loops": -3}, ["num_loops=-3", "at least 1"]),
    "negative_core": ({"num_core_layers": -1}, ["num_core_layers=-1", "not be negative"]),
    "no_layers": (
        {"num_prelude_layers": 0, "num_core_layers": 0, "num_coda_layers": 0},
        ["num_prelude_layers=0", "num_core_layers=0", "num_coda_layers=0", "not all be 0"],
    ),
    **{
        name: ({name: 0}, [f"{name}=0", "at least 1"])
        for name in ("vocab_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    },
    **{
        name: ({name: 0}, [f"{name}=0", "None or at least 1"])
        for name in ("max_trained_loops", "backprop_loops", "embedding_size", *CORE_SIZES)
    },
    "window_of_one": ({"sliding_window": 1}, ["sliding_window=1", "None or at least 2"]),
    "no_key_value_heads": ({"num_key_value_heads": 0}, ["num_key_value_heads=0", "at least 1"]),
    "odd_groups": ({"num_attention_heads": 3}, ["num_attention_heads=3", "multiple of num_key_value_heads=2"]),
    "odd_head_dim": ({"head_dim": 7}, ["head_dim=7", "even number"]),
    "head_dim_text": ({"head_dim": "8"}, ["head_dim='8'", "integer"]),
    "narrow": ({"hidden_size": 2}, ["head_dim=0", "hidden_size=2 / num_attention_heads=4"]),
    "attention_dropout": ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "[0, 1)"]),
    "classifier_dropout": ({"classifier_dropout": -0.1}, ["classifier_dropout=-0.1", "[0, 1)"]),
    "mlp_type": ({"mlp_type": "swiglu"}, ["mlp_type='swiglu'", "gated, plain"]),
    "hidden_act": ({"hidden_act": "sillu"}, ["hidden_act='sillu'", *ACT2FN]),
    "qk_norm": ({"qk_norm": "head"}, ["qk_norm='head'", "none, per_head, per_head_unweighted, flat"]),
    "mlp_output_act": ({"mlp_output_act": "sillu"}, ["mlp_output_act='sillu'", "None, half_relu2", *ACT2FN]),
    "norm_type": ({"norm_type": "layernorm"}, ["norm_type='layernorm'", "rms, rms_unweighted, layer, layer_unbiased"]),
    "attention_gate": ({"attention_gate": "sigmoid"}, ["attention_gate='sigmoid'", "none, per_channel"]),
    "position_embedding": ({"position_embedding": "alibi"}, ["position_embedding='alibi'", "rope, learned, none"]),
    "kv_sharing": ({"kv_sharing": "last_loop"}, ["kv_sharing='last_loop'", "none, first_loop"]),
    "mlm_head": ({"mlm_head": "bert"}, ["mlm_head='bert'", "linear, transform"]),
    "no_clip": ({"qkv_clip": 0}, ["qkv_clip=0", "None or a positive number"]),
    "endless_clip": ({"qkv_clip": float("inf")}, ["qkv_clip=inf", "None or a positive number"]),
    "type_vocab_size": ({"type_vocab_size": -1}, ["type_vocab_size=-1", "at least 0"]),
    "group_size": ({"core_group_size": 3}, ["core_group_size=3", "None or a divisor of num_core_layers=2"]),
    "no_group": ({"core_group_size": 0}, ["core_group_size=0", "None or a divisor of num_core_layers=2"]),
    "norm_placement": ({"norm_placement": "peri"}, ["norm_placement='peri'", "pre, sandwich, sandwich_sum, post"]),
    "final_norm": ({"final_norm": "loops"}, ["final_norm='loops'", "end, every_loop, after_loops, none"]),
    "granularity": ({"checkpoint_granularity": "block"}, ["checkpoint_granularity='block'", "layer, loop"]),
    "softcap": ({"final_logit_softcapping": 0}, ["final_logit_softcapping=0", "None or positive"]),
    "eps": ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0", "positive"]),
    "embedding_scale": ({"embedding_scale": float("nan")}, ["embedding_scale=nan", "finite"]),
    "logit_scale": ({"logit_scale": float("inf")}, ["logit_scale=inf", "finite"]),
    "initializer_range": ({"initializer_range": -0.02}, ["initializer_range=-0.02", "at least 0"]),
    "weight_init": ({"weight_init": "xavier"}, ["weight_init='xavier'", "normal, truncated_normal, orthogonal"]),
    "output_projection_init": (
        {"output_projection_init": "zero"},
        ["output_projection_init='zero'", "normal, depth_scaled, zeros"],
    ),
    "rope_type": ({"rope_parameters": {"rope_type": "spiral"}}, ["rope_parameters=", "'spiral'", "yarn, longrope"]),
    "rope_per_type": ({"rope_parameters": {FULL: {"rope_type": "default"}}}, ["rope_parameters=", "all layers"]),
    "layer_types_length": ({"stored_layer_types": [FULL]}, ["stored_layer_types has 1 entries", "= 4"]),
    "layer_types_word": (
        {"stored_layer_types": [FULL] * 3 + ["chunked_attention"]},
        ["'chunked_attention'", FULL, SLIDING],
    ),
    "layer_types_window": (
        {"stored_layer_types": [SLIDING] * 4},
        ["stored_layer_types", "sliding_window must be set"],
    ),
    "prelude_never_enters": ({"injection": "none"}, ["injection='none'", "state_init='zeros'", "state_init='input'"]),
    "adapter_without_core": (
        {"num_core_layers": 0, "loop_adapter": "lora"},
        ["loop_adapter='lora'", "num_core_layers=0"],
    ),
    "readout_without_core": ({"num_core_layers": 0, "readout": "linear"}, ["readout='linear'", "num_core_layers=0"]),
    "halting_without_core": ({"num_core_layers": 0, "halting": "gate"}, ["halting='gate'", "num_core_layers=0"]),
    **{
        f"{field}_{value}_without_core": (
            {"num_core_layers": 0, field: value},
            [f"{field}={value!r} acts on the core, and num_core_layers=0", remedy],
        )
        for field, value, remedy in (
            ("core_hidden_size", 48, "use None"),
            ("core_intermediate_size", 40, "use None"),
            ("core_num_attention_heads", 2, "use None"),
            ("core_num_key_value_heads", 1, "use None"),
            ("core_group_size", 1, "use None"),
            ("kv_sharing", "first_loop", "use 'none'"),
            ("backprop_loops", 2, "use None"),
            ("final_norm", "every_loop", "use 'end' or 'none'"),
            ("final_norm", "after_loops", "use 'end' or 'none'"),
            ("injection", "concat", "use 'diagonal' or 'none'"),
            ("state_init", "normal", "use 'zeros' or 'input'"),
            ("loop_update", "gated", "use 'replace'"),
            ("loop_conditioning", "norms", "use 'none'"),
            ("schedule", "nested", "use 'flat'"),
        )
    },
    "adapter_target": (
        {"mlp_type": "plain", "loop_adapter": "lora"},
        ["gate_proj", "mlp_type='plain'", "up_proj, down_proj"],
    ),
    "value_bias": (
        {"attention_value_bias": 1},
        ["attention_value_bias=1", "True, False, or None to follow attention_bias"],
    ),
    "core_heads": (
        {"core_num_attention_heads": 6, "core_num_key_value_heads": 4},
        ["core_num_attention_heads=6", "multiple of core_num_key_value_heads=4"],
    ),
    **{
        f"core_width_and_{name}": ({"core_hidden_size": 48, "readout": "linear", **settings}, [CORE_WIDTH, *said])
        for name, (settings, said) in {
            "injection": ({"injection": "add"}, ["injection='add'", "concat or diagonal"]),
            "state": ({"state_init": "input"}, ["state_init='input'", "use another"]),
            "skip": ({"injection": {"type": "concat", "first_loop": "skip"}}, ["injection.first_loop='skip'"]),
            "readout": ({"readout": "none"}, ["readout='none'", "must be linear"]),
            "norm": ({"final_norm": "every_loop"}, ["final_norm='every_loop'", "use end or after_loops"]),
        }.items()
    },
    "groups_and_injection": (
        {"core_group_size": 1},
        ["injection='diagonal' with core_group_size=1", "use 'none', or core_group_size=None"],
    ),
    "groups_and_halting": (
        {"core_group_size": 1, "injection": "none", "state_init": "input", "halting": "act"},
        ["halting='act' with core_group_size=1", "use 'none', or core_group_size=None"],
    ),
    "groups_and_norm": (
        {"core_group_size": 1, "injection": "none", "state_init": "input", "final_norm": "every_loop"},
        ["final_norm='every_loop' with core_group_size=1", "use end or after_loops"],
    ),
    "narrow_embeddings_tied": (
        {"embedding_size": 16, "tie_word_embeddings": True},
        ["embedding_size=16 with tie_word_embeddings=True", "use tie_word_embeddings=False"],
    ),
    "narrow_embeddings_linear_head": (
        {"embedding_size": 16, "tie_word_embeddings": True, "is_causal": False},
        ["embedding_size=16 with tie_word_embeddings=True", "mlm_head='transform'"],
    ),
    "value_layer": (
        {"value_embedding": {"type": "gated", "layers": [1, 4], "gate_channels": 8}},
        ["value_embedding: layers=[1, 4]", "stored layers, 0..3"],
    ),
    "value_gate": (
        {"value_embedding": {"type": "gated", "layers": [3], "gate_channels": 33}},
        ["value_embedding: gate_channels=33", "must not exceed the width of layer 3, 32"],
    ),
    "streams_halting": (
        {"residual_streams": "mhc", "halting": "gate"},
        ["halting='gate' with residual_streams='mhc', span='model'", "use span='part', or halting='none'"],
    ),
    "streams_norm": (
        {"residual_streams": "hyper_connections", "final_norm": "every_loop"},
        ["final_norm='every_loop' with residual_streams='hyper_connections'", "'end' or 'after_loops' or 'none'"],
    ),
    "streams_of_a_stack": (
        {"residual_streams": {"type": "mhc", "own_loops": 2}, "num_core_layers": 0},
        ["residual_streams: own_loops=2 acts on the core", "use 1"],
    ),
    "hyperloop_of_a_stack": (
        {"residual_streams": "hyperloop", "num_core_layers": 0},
        ["residual_streams='hyperloop' acts on the core", "use 'none'"],
    ),
    "hyperloop_halting": (
        {"residual_streams": "hyperloop", "halting": "gate"},
        ["halting='gate' with residual_streams='hyperloop': it works on one state", "4 streams; use halting='none'"],
    ),
    "hyperloop_norm": (
        {"residual_streams": "hyperloop", "final_norm": "every_loop"},
        ["final_norm='every_loop' with residual_streams='hyperloop'", "use final_norm='end' or 'after_loops'"],
    ),
    "hyperloop_update": (
        {"residual_streams": "hyperloop", "loop_update": "gated"},
        ["loop_update='gated' with residual_streams='hyperloop'", "use loop_update='replace'"],
    ),
    "hyperloop_groups": (
        {"residual_streams": "hyperloop", "core_group_size": 1, "injection": "none", "state_init": "input"},
        ["core_group_size=1 with residual_streams='hyperloop'", "use core_group_size=None"],
    ),
    "hyperloop_nested": (
        {"residual_streams": "hyperloop", "schedule": "nested", "injection": "none", "state_init": "input"},
        ["schedule='nested' with residual_streams='hyperloop'", "use schedule='flat'"],
    ),
    "one_hyperloop_stream": (
        {"residual_streams": {"type": "hyperloop", "num_streams": 1}},
        ["residual_streams: type 'hyperloop': num_streams=1 must be at least 2"],
    ),
    "one_stream": (
        {"residual_streams": {"type": "mhc", "num_streams": 1}},
        ["residual_streams: type 'mhc': num_streams=1 must be at least 2"],
    ),
    "depth_sharing": (
        {"depth_attention": "anchors", "kv_sharing": "first_loop"},
        ["kv_sharing='first_loop' with depth_attention='anchors'", "use kv_sharing='none'"],
    ),
    "depth_heads": (
        {"depth_attention": "anchors", "core_num_key_value_heads": 4},
        ["core_num_key_value_heads=4 with depth_attention='anchors'", "num_key_value_heads=2"],
    ),
    "depth_routing": (
        {"depth_attention": "anchors", "halting": "token_choice"},
        ["halting='token_choice' with depth_attention='anchors'"],
    ),
    "narrow_ngrams": (
        {"ngram_embedding": "hashed", "embedding_size": 16},
        ["ngram_embedding='hashed' with embedding_size=16", "use embedding_size=None"],
    ),
    "ngram_tables": (
        {"ngram_embedding": {"type": "hashed", "table_sizes": [5, 7, 11]}},
        ["ngram_embedding: type 'hashed': table_sizes=[5, 7, 11]", "a multiple of max_n - 1 = 2"],
    ),
    "truncation": (
        {"backprop_loops": 1, "injection": "none", "state_init": "input"},
        ["backprop_loops=1", "injection='none'", "diagonal, add, concat"],
    ),
    "truncated_adapter": (
        {"backprop_loops": 1, "loop_adapter": {"type": "lora", "loops": [0, 1]}},
        ["backprop_loops=1 with loop_adapter: loops=[0, 1]", "table_loops=3", "use backprop_loops=2 or more"],
    ),
    "idle_adapter": (
        {"kv_sharing": "first_loop", "loop_adapter": {"type": "lora", "loops": [1, 2]}},
        [
            "loop_adapter: loops=[1, 2] with kv_sharing='first_loop'",
            "k_proj, v_proj would never act",
            "adapt loop 0 too",
        ],
    ),
}
#: Conditions between several fields, which cannot all be written at once: a finished config checks them when saved.
REFUSED_TOGETHER = [
    *("no_key_value_heads", "odd_groups", "odd_head_dim", "head_dim_text", "num_attention_heads"),
    *("rope_type", "rope_per_type", "prelude_never_enters", "truncation", "truncated_adapter", "idle_adapter"),
    "adapter_target",
    *(name for name in REFUSED if name.endswith("_without_core")),
    *("value_bias", "core_heads", "groups_and_injection", "groups_and_halting", "groups_and_norm"),
    *(f"core_width_and_{name}" for name in ("injection", "state", "skip", "readout", "norm")),
    *("narrow_embeddings_tied", "narrow_embeddings_linear_head", "value_layer", "value_gate"),
    *("streams_halting", "streams_norm", "streams_of_a_stack"),
    *(f"hyperloop_{name}" for name in ("of_a_stack", "halting", "norm", "update", "groups", "nested")),
    *("depth_sharing", "depth_heads", "depth_routing", "narrow_ngrams"),
]
#: `narrow` is wrong only while head_dim follows from hidden_size, and `no_layers` is refused at its last write.
REFUSED_AT_ONCE = [name for name in REFUSED if name not in (*REFUSED_TOGETHER, "narrow", "no_layers")]


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_value_is_refused_by_name_value_and_remedy(case):
    settings, said = REFUSED[case]
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        tiny_config(**settings)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_a_bad_write_is_refused_and_leaves_the_config_unchanged(case):
    settings, said = REFUSED[case]
    config = tiny_config()
    before = copy.deepcopy(config.to_dict())
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=name.replace("_", ".")) as error:
        setattr(config, name, value)
    for words in said:
        assert words in str(error.value)
    assert config.to_dict() == before


@pytest.mark.parametrize("case", REFUSED_TOGETHER)
def test_what_several_writes_made_invalid_is_not_saved(case, tmp_path):
    settings, said = REFUSED[case]
    config = tiny_config()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(StrictDataclassError) as error:
        config.save_pretrained(tmp_path)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num_loops", "3", "int"),
        ("num_loops", 3.0, "int"),
        ("num_loops", True, "int"),
        ("num_loops", None, "int"),
        ("hidden_size", 32.5, "int"),
        ("prelude_norm", "yes", "bool"),
        ("prelude_norm", 1, "bool"),
        ("is_causal", None, "bool"),
        ("norm_placement", 1, "str"),
        ("rms_norm_eps", "1e-5", "float"),
        ("stored_layer_types", "full_attention", "list"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value, kind):
    config = tiny_config()
    before = getattr(config, name)
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){name}.*{kind}"):
        tiny_config(**{name: value})
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){name}.*{kind}"):
        setattr(config, name, value)
    assert getattr(config, name) == before


@pytest.mark.parametrize("field", STRATEGY_FIELDS)
@pytest.mark.parametrize("spec", [5, None, {}, [], {"kind": "add"}, {"type": 3}], ids=repr)
def test_a_spec_without_a_type_is_refused_and_the_known_types_are_listed(field, spec):
    config = tiny_config()
    before = getattr(config, field)
    for write in (lambda: tiny_config(**{field: spec}), lambda: setattr(config, field, spec)):
        with pytest.raises(ValueError, match=rf"{field}=.*known types") as error:
            write()
        assert all(name in str(error.value) for name in STRATEGY_FIELDS[field])
    assert getattr(config, field) == before


@pytest.mark.parametrize("field", STRATEGY_FIELDS)
def test_an_unknown_type_is_refused_and_the_known_ones_are_listed(field):
    with pytest.raises(ValueError, match=f"{field}: unknown type 'bogus'") as error:
        tiny_config(**{field: "bogus"})
    assert all(name in str(error.value) for name in STRATEGY_FIELDS[field])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_lops", "num_loops"),
        ("hiden_size", "hidden_size"),
        ("num_prelude_layer", "num_prelude_layers"),
        ("norm_placment", "norm_placement"),
        ("loop_updates", "loop_update"),
        ("norm_eps", "rms_norm_eps"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_field(key, meant, tmp_path):
    with pytest.raises(ValueError, match=f"{key}=.*Did you mean '{meant}'"):
        LoopedConfig(**{key: 1})
    tiny_config().save_pretrained(tmp_path)
    for auto in (LoopedConfig, AutoConfig):
        with pytest.raises(ValueError, match=f"{key}=.*Did you mean '{meant}'"):
            auto.from_pretrained(tmp_path, **{key: 1})


def test_a_parameter_of_a_strategy_is_refused_with_the_nearest_one():
    with pytest.raises(
        ValueError, match=r"injection: type 'diagonal' has no parameter 'initial_dekay'.*'initial_decay'"
    ):
        tiny_config(injection={"type": "diagonal", "initial_dekay": 0.1})


@pytest.mark.parametrize("name", sorted(FOREIGN_LOOP_NAMES))
def test_another_models_word_for_the_loop_count_is_refused_everywhere(name, tmp_path):
    assert not any(hasattr(LoopedConfig, foreign) for foreign in FOREIGN_LOOP_NAMES)
    config = tiny_config()
    with pytest.raises(ValueError, match=f"{name}=3: LoopedConfig calls the loop count num_loops"):
        tiny_config(**{name: 3})
    with pytest.raises(AttributeError, match=f"{name}=3: LoopedConfig calls the loop count num_loops"):
        setattr(config, name, 3)
    config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=rf"from_pretrained\(\).*{name}.*num_loops"):
        LoopedConfig.from_pretrained(tmp_path, **{name: 3})


@pytest.fixture
def hears_everything(caplog):
    """The log, with nothing held back because it was said before."""
    transformers.utils.logging.warning_once.cache_clear()
    caplog.set_level("WARNING")
    return caplog


def test_the_default_config_constructs_and_saves_in_silence(hears_everything, recwarn, capfd, tmp_path):
    LoopedConfig().save_pretrained(tmp_path)
    LoopedConfig.from_pretrained(tmp_path)
    assert hears_everything.records == []
    assert list(recwarn) == []
    assert capfd.readouterr() == ("", "")


def test_a_key_that_is_no_field_is_named_in_a_warning(hears_everything):
    config = LoopedConfig(my_note="kept")
    assert config.my_note == "kept"
    assert "my_note='kept' is not a field of LoopedConfig; nothing reads it." in hears_everything.text


def test_a_misspelt_key_in_a_file_is_warned_about_and_the_file_stays_readable(hears_everything, tmp_path):
    config = tiny_config()
    config.num_lops = 7
    config.save_pretrained(tmp_path)
    assert LoopedConfig.from_pretrained(tmp_path).num_loops == config.num_loops
    assert "num_lops=7 is not a field of LoopedConfig" in hears_everything.text
    assert "Did you mean 'num_loops'?" in hears_everything.text


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("num_hidden_layers", 12, "num_core_layers or num_loops"), ("layer_types", [FULL], "stored_layer_types")],
)
def test_a_given_result_that_contradicts_the_counts_is_warned_about(name, value, remedy, hears_everything):
    config = tiny_config(**{name: value})
    assert (config.num_hidden_layers, config.layer_types) == (8, [FULL] * 8)
    assert f"{name}={value} is ignored" in hears_everything.text
    assert f"Set {remedy} instead" in hears_everything.text


def test_a_result_given_at_loading_is_warned_about_and_one_from_the_file_is_not(hears_everything, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert LoopedConfig.from_pretrained(tmp_path, num_loops=7).num_hidden_layers == 16
    assert hears_everything.records == []
    assert LoopedConfig.from_pretrained(tmp_path, num_hidden_layers=3).num_hidden_layers == 8
    assert "num_hidden_layers=3 is ignored" in hears_everything.text


def test_generation_parameters_are_accepted_and_not_stored():
    parameters = GenerationConfig._get_default_generation_params()
    config = tiny_config(**parameters)
    assert config.to_dict().keys() == tiny_config().to_dict().keys()


#: What every config of Transformers carries beside the fields of its architecture.
HOST_SETTINGS = PreTrainedConfig(name_or_path="somewhere", num_labels=3).to_dict() | {
    "_name_or_path": "somewhere",
    "attn_implementation": "eager",
    "torch_dtype": "bfloat16",
    "rope_theta": 5e4,
    "partial_rotary_factor": 0.5,
    "task_specific_params": None,
}


@pytest.mark.parametrize("key", [key for key in HOST_SETTINGS if key != "model_type"])
def test_keys_that_transformers_keeps_in_every_config_are_taken_in_silence(key, hears_everything):
    LoopedConfig(**{key: HOST_SETTINGS[key]})
    assert hears_everything.text == ""
