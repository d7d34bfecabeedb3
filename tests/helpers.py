"""What the tests share: tiny configurations, models and inputs, and one table of tolerances."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.injection import Injection

#: Largest absolute difference that counts as equal, per dtype, for logits of order one.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

#: What the common batteries run over: a configuration of every strategy, and the combinations that published looped
#: models are made of. `test_reference_parity.MORE_VARIANTS` has what those leave out.
VARIANTS: dict[str, dict[str, Any]] = {
    "parcae": {},
    "add": {"injection": "add"},
    "concat": {"injection": "concat", "state_init": {"type": "normal", "seed": 3}},
    "in_place": {"injection": "none", "state_init": "input", "prelude_norm": False},
    "damped": {"injection": "none", "state_init": "input", "prelude_norm": False, "loop_update": "damped"},
    "scaled": {"loop_update": {"type": "learned_scale", "initial_scale": 0.5}},
    "gated": {"loop_update": {"type": "gated", "initial_gate": 0.3, "free_loops": 1}},
    "embedding": {"loop_conditioning": "embedding"},
    "norms": {"loop_conditioning": "norms", "qk_norm": "per_head"},
    "lora": {"loop_adapter": {"type": "lora", "rank": 3}},
    "sandwich": {"norm_placement": "sandwich", "final_norm": "every_loop", "injection": "none", "state_init": "input"},
    "post_branch": {"norm_placement": "post_branch", "qk_norm": "flat", "attention_bias": True},
    "sliding": {"sliding_window": 4, "stored_layer_types": ["full_attention", "sliding_attention"] * 2},
    "capped": {"final_logit_softcapping": 3.0, "logit_scale": 0.5, "tie_word_embeddings": True, "mlp_bias": True},
    "halting_gate": {"halting": {"type": "gate", "threshold": 0.6}, "final_norm": "every_loop"},
    "halting_act": {"halting": {"type": "act", "threshold": 0.9, "initial_bias": 0.0}},
    "halting_change": {"halting": {"type": "state_change", "threshold": 0.8}},
    "stacked": {"num_core_layers": 0, "num_prelude_layers": 3},
    "huginn": {
        "norm_placement": "sandwich_sum",
        "final_norm": "after_loops",
        "injection": "concat",
        "state_init": {"type": "normal", "std": 0.4, "seed": 3, "truncation": 2.0},
        "attention_bias": True,
        "attention_value_bias": False,
        "embedding_scale": 2.0,
    },
    "parcae_code": {
        "mlp_type": "plain",
        "hidden_act": "half_relu2",
        "qk_norm": "per_head_unweighted",
        "state_init": "unit_normal",
        "value_embedding": {"type": "gated", "layers": [0, 1], "gate_channels": 12},
        "readout": "linear",
    },
    "nanbeige": {
        "kv_sharing": "first_loop",
        "injection": "none",
        "state_init": "input",
        "prelude_norm": False,
        "final_norm": "every_loop",
    },
    "shared": {"kv_sharing": "first_loop", "qk_norm": "per_head", "loop_conditioning": "norms"},
    "sequence": {"core_group_size": 1, "injection": "none", "state_init": "input", "final_norm": "after_loops"},
    "wide": {
        "core_hidden_size": 48,
        "core_intermediate_size": 40,
        "core_num_attention_heads": 6,
        "core_num_key_value_heads": 3,
        "injection": {"type": "diagonal", "input_matrix": "zoh"},
        "readout": "linear",
    },
    "albert": {
        "norm_type": "layer",
        "norm_placement": "post",
        "final_norm": "none",
        "position_embedding": "learned",
        "embedding_size": 16,
        "embedding_norm": True,
        "type_vocab_size": 2,
        "mlp_type": "plain",
        "hidden_act": "gelu",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "injection": "none",
        "state_init": "input",
        "prelude_norm": False,
    },
    "universal": {
        "norm_type": "layer_unbiased",
        "position_embedding": "none",
        "mlp_type": "plain",
        "hidden_act": "relu",
        "mlp_output_act": "relu",
        "injection": "none",
        "state_init": "input",
        "loop_conditioning": {"type": "sinusoidal", "positions": "every_loop"},
        "halting": {"type": "act", "form": "universal", "threshold": 0.9, "initial_bias": -0.5},
    },
    "mhc": {"residual_streams": {"type": "mhc", "core_num_streams": 2, "own_loops": 2}},
    "hyperloop": {
        "residual_streams": {"type": "hyperloop", "num_streams": 2, "table_loops": 2},
        "injection": "none",
        "state_init": "input",
    },
    "depth_attention": {"depth_attention": "anchors", "qk_norm": "per_head", "injection": "add"},
    "ngrams": {"ngram_embedding": {"type": "hashed", "table_sizes": [53, 59, 61, 67], "boundary_token_id": 40}},
    "gated_attention": {"attention_gate": "per_channel", "norm_type": "rms_unweighted", "injection": "add"},
    "skip": {
        "injection": {"type": "concat", "first_loop": "skip"},
        "state_init": {"type": "normal", "truncation": None},
        "qkv_clip": 0.6,
    },
}


def tiny_config(**overrides: Any) -> LoopedConfig:
    """One prelude layer, two core layers run three times, one coda layer; 32 wide, 4 heads over 2 key-value heads."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "num_loops": 3,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LoopedConfig(**{**settings, **overrides})


def randomise(model: torch.nn.Module, *, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Give every parameter a random value, so that nothing that a start at 0 or 1 would hide stays hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((std * noise / max(1, parameter.shape[-1]) ** 0.5).to(parameter.dtype))
    return model


def tiny_model(
    *, attn_implementation: str = "sdpa", seed: int = 0, std: float = 0.3, **overrides: Any
) -> LoopedForCausalLM:
    """A randomised tiny causal model in evaluation mode. At `std=1` each loop count chooses other tokens."""
    config = tiny_config(**overrides)
    config._attn_implementation = attn_implementation
    return randomise(LoopedForCausalLM(config), seed=seed, std=std).eval()


def entering(injection: Injection, prelude: torch.Tensor, state: torch.Tensor, loop_idx: int = 0) -> torch.Tensor:
    """The core's input that an injection makes of a prelude output and a state."""
    return injection.inject(injection(prelude), state, loop_idx)


def random_tokens(batch: int = 2, length: int = 7, *, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    """Token ids [batch, length], none of them a special token."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def stepwise_logits(
    model: LoopedForCausalLM, tokens: torch.Tensor, cache: Cache, chunks: Sequence[int], **kwargs: Any
) -> torch.Tensor:
    """Logits of `tokens` fed in pieces of the lengths `chunks`, the rest one by one."""
    logits, start = [], 0
    lengths = list(chunks)
    lengths += [1] * (tokens.shape[1] - sum(lengths))
    for length in lengths:
        piece = tokens[:, start : start + length]
        logits.append(model(piece, past_key_values=cache, use_cache=True, **kwargs).logits)
        start += length
    return torch.cat(logits, dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = TOLERANCE[torch.float32]) -> None:
    """Equal up to an absolute difference of `atol`."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
