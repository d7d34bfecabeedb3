"""Every field of every published family's config class: imported, known to change nothing, or refused by its name."""

import dataclasses
from typing import Any

import pytest
from fixtures.published import described
from fixtures.published_options import FOLDER, option
from safetensors.torch import load_file
from test_published_variants import LLAMA, fields_of
from transformers import AlbertConfig, LlamaConfig

from modeling_looped.conversion.published.source_config import HARMLESS

SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
#: What the recordings' maker added to a config for the tests.
ADDED = {"parcae": {"emb_scale", "logit_scale"}}

LLAMA_PROBES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "rms_norm_eps": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "tie_word_embeddings": "other",
    "attention_dropout": 0.25,
    "attention_bias": True,
    "mlp_bias": True,
}
HUGINN_PROBES: dict[str, Any] = {
    "n_embd": 128,
    "n_heads": 2,
    "head_dim": 32,
    "num_key_value_heads": 1,
    "padded_vocab_size": 200,
    "tie_embeddings": "other",
    "intermediate_size": 96,
    "bias": True,
    "architecture_class_name": "GPT",
    "block_class_name": "PreNormBlock",
    "norm_class_name": "LayerNorm",
    "norm_eps": 0.5,
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "GELU",
    "state_init": "zero",
    "injection_type": "add",
    "n_layers_in_recurrent_block": 3,
    "mean_recurrence": 3,
    "n_layers_in_prelude": 3,
    "n_layers_in_coda": 3,
    "qk_bias": "other",
    "test_time_noise": 0.5,
    "init_values": {"std": 0.5, "embed_scale": 2.0},
}
#: Fields that only training, an implementation or a measurement reads, or that their code derives again -> why.
HUGINN_INERT = {
    "n_layers": "a sum that nothing reads",
    "vocab_size": "padded_vocab_size decides",
    "padding_multiple": "padded_vocab_size has been derived from it",
    "init_strategy": "init_values has been derived from it",
    "init_orthogonal": "how weights start",
    "sampling_scheme": "loops of a training step",
    "mean_backprop_depth": "training",
    "activation_checkpoint_impl": "training",
    "effective_expected_depth": "how weights start",
    "test_time_noise_type": "test_time_noise is 0",
    "tie_word_embeddings": "tie_embeddings decides",
}

#: Family -> its recording's config, a value of its own for each field that matters, those that do not.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "huginn": (
        "huginn",
        described("huginn")["peer_config"],
        HUGINN_PROBES | {"rope_base": 77, "block_size": 77},
        HUGINN_INERT,
    ),
    "retrofit": (
        "huginn",
        described("retro_raven_llama")["peer_config"],
        HUGINN_PROBES
        | {
            "initial_state_mode": "embed-init",
            "max_position_embeddings": 77,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        },
        HUGINN_INERT
        | {
            "rope_base": "the donor's rotary embedding is used",
            "rope_theta": "rope_parameters says it",
            "block_size": "max_position_embeddings decides",
        },
    ),
    "parcae": (
        "parcae",
        described("parcae")["peer_config"],
        {
            "block_size": 77,
            "n_embd": 128,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "padded_vocab_size": 200,
            "rope_settings": {"rope_base": 77},
            "randomize_positions_from": 77,
            "block_class_name": "SandwichBlock",
            "norm_class_name": "LayerNorm",
            "norm_eps": 0.5,
            "mlp_class_name": "GatedMLP",
            "nonlin_name": "GELU",
            "bias": True,
            "qk_bias": True,
            "init_strategy": "bert",
            "mup_model_scaling_factor": 2,
            "use_fused_head": "hhe",
            "clip_qkv": 2.0,
            "logit_softcap": 2.0,
            "qk_norm": "other",
            "injection_type": "add",
            "n_layers_in_recurrent_block": 3,
            "n_layers_in_prelude": 3,
            "n_layers_in_coda": 3,
            "state_init": "unit",
            "recurrent_embedding_dimension": 96,
            "recurrent_intermediation_embedding_dimension": 96,
            "recurrent_num_attention_heads": 2,
            "prelude_norm": "other",
            "mean_recurrence": 3,
            "tie_embeddings": "other",
            "model_class_name": "GPT",
        },
        {
            "name": "a name",
            "hf_config": "where it came from",
            "mean_backprop_depth": "training, and which layers have value gates, but only where the core is odd",
            "vocab_size": "padded_vocab_size decides",
            "padding_multiple": "padded_vocab_size has been derived from it",
            "use_abacus": "nothing reads it",
            "attn_impl": "another way to the same attention",
            "init_orthogonal": "how weights start",
            "skip_initialization": "how weights start",
            "debias_attention": "a measurement",
            "center_attention": "a measurement",
            "activation_checkpoint_impl": "training",
            "simple_ops": "the norm is already the RMSNorm that it chooses",
            "strategy": "parallelism",
            "sampling_scheme": "loops of a training step",
            "lockstep_n": "loops of a training step",
            "lockstep_k": "loops of a training step",
            "curriculum_target": "loops of a training step",
            "recurrent_iteration_method": "loops of a training step",
            "_is_recurrent_block_config": "set while the core's config is made",
        },
    ),
    "ouro": (
        "ouro",
        described("ouro")["peer_config"],
        {name: LLAMA_PROBES[name] for name in LLAMA_PROBES.keys() - {"attention_bias", "mlp_bias", "head_dim"}}
        | {
            "num_hidden_layers": 3,
            "total_ut_steps": 3,
            "early_exit_threshold": 0.5,
            "layer_types": ["full_attention", "chunked_attention"],
        },
        {
            "sliding_window": "layer_types decides",
            "use_sliding_window": "layer_types decides",
            "max_window_layers": "layer_types decides",
            "rope_theta": "rope_parameters says it",
        },
    ),
    "hrm_text": (
        "hrm_text",
        described("hrm_text")["peer_config"],
        {name: LLAMA_PROBES[name] for name in LLAMA_PROBES.keys() - {"num_key_value_heads"}}
        | {
            "H_cycles": 3,
            "L_cycles": 4,
            "num_layers_per_stack": 3,
            "embedding_scale": 2.0,
            "initializer_range": 0.5,
            "prefix_lm": "other",
        },
        {"L_bp_cycles": "training", "num_hidden_layers": "num_layers_per_stack decides"},
    ),
    "albert": (
        "albert",
        described("albert")["peer_config"],
        {
            "vocab_size": 200,
            "embedding_size": 48,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_hidden_groups": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "inner_group_num": 3,
            "hidden_act": "relu",
            "attention_probs_dropout_prob": 0.25,
            "max_position_embeddings": 77,
            "type_vocab_size": 5,
            "initializer_range": 0.5,
            "layer_norm_eps": 0.5,
            "classifier_dropout_prob": 0.5,
            "tie_word_embeddings": "other",
            "position_embedding_type": "relative_key",
        },
        {"hidden_dropout_prob": "training; our hidden states have no dropout"},
    ),
    "recursive": (
        "recursive",
        {**LLAMA, "num_hidden_layers": 6, "sharing": "cycle", "num_recursion": 2},
        LLAMA_PROBES
        | {
            "num_hidden_layers": 8,
            "sharing": "sequence",
            "num_recursion": 3,
            "kv_sharing": "first_loop",
            "ln_share": "other",
        },
        {"lora_alpha": "no low-rank weights", "lora_alpha_pattern": "no low-rank weights"},
    ),
    "mor": (
        "mor",
        option("mor_token_mlp_balanced")["peer_config"],
        LLAMA_PROBES
        | {
            "num_hidden_layers": 8,
            "kv_sharing": {"enable": True, "sharing": "middle_cycle", "num_recursion": 3},
            "mor_alpha": 0.5,
            "mor_router_func": "sigmoid",
            "mor_gating": "additive",
            "mor_temp": 2.0,
        },
        {},
    ),
    "nanbeige": (
        "nanbeige",
        described("nanbeige")["peer_config"],
        LLAMA_PROBES
        | {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "num_loops": 3,
            "loop_loss_weights": [0.1, 0.2],
            "enable_double_loop_split": True,
            "loop_share_kv": True,
            "qk_layernorm": True,
            "skip_loop_final_norm": True,
        },
        {"loop_middle_layers": "enable_double_loop_split is off", "rope_theta": "rope_parameters says it"},
    ),
}
#: Parts of Nanbeige's fields that tests of their own are about: hyper-connections, depth attention, n-grams.
OTHER_MECHANISMS = ("hyper", "mhc", "h_res", "residual_streams", "depth_attention", "ngram", "emb_")
#: Fields of the config classes in Transformers, which the recordings may have been made without.
CLASSES = {"albert": AlbertConfig, "recursive": LlamaConfig, "mor": LlamaConfig}


def names_of(case: str) -> Any:
    """The tensors that a family reads its config by, where it does."""
    if case == "mor":
        state = load_file(FOLDER / "mor_token_mlp_balanced" / "model.safetensors")
        return {name: tensor.shape for name, tensor in state.items()}
    return ["transformer.prelude.0.norm_3.weight"] if case == "huginn" else []


def probe_of(config: dict[str, Any], name: str, value: Any) -> Any:
    """The value to try; `other`: the opposite of a switch."""
    return not config.get(name, name == "ln_share") if value == "other" else value


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_a_published_config_is_imported_inert_or_refused_by_name(case):
    family, config, probes, inert = CASES[case]
    names = names_of(case)
    config = {name: value for name, value in config.items() if name not in ADDED.get(case, ())}
    known = fields_of(family, config, names).to_dict()
    ignored, moved, messages = [], [], {}
    for name, probe in {**probes, "is_encoder_decoder": True, "surprise": 1}.items():
        value = probe_of(config, name, probe)
        assert config.get(name) != value, name
        try:
            if fields_of(family, {**config, name: value}, names).to_dict() == known:
                ignored.append(name)
        except ValueError as refusal:
            messages[name] = str(refusal)
    for name in inert:
        value = 3 if config.get(name) is None else not config[name] if isinstance(config[name], bool) else "other"
        if isinstance(config.get(name), int | float) and not isinstance(config.get(name), bool):
            value = config[name] + 64
        if fields_of(family, {**config, name: value}, names).to_dict() != known:
            moved.append(name)
    assert (ignored, moved) == ([], [])
    # by its name, or by that of a field that it no longer fits
    assert [
        name for name, said in messages.items() if not any(word in said for word in (name, "num_", "head_dim"))
    ] == []


@pytest.mark.parametrize("case", CASES)
def test_no_field_of_a_published_config_class_is_left_out_above(case):
    _, config, probes, inert = CASES[case]
    declared = set(config)
    if case in CLASSES:
        declared |= {field.name for field in dataclasses.fields(CLASSES[case])}
    told = declared - HARMLESS - SPECIAL_TOKENS - ADDED.get(case, set()) - {"is_encoder_decoder", "rope_theta"}
    told = (
        {name for name in told if not any(part in name for part in OTHER_MECHANISMS)} if case == "nanbeige" else told
    )
    assert told - probes.keys() - inert.keys() == set()
