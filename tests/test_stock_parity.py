"""The stacked case, and an in-place loop run once, equal the stock models of Transformers whose weights they carry."""

import pytest
import torch
from helpers import random_tokens, randomise
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_looped import LoopedConfig, LoopedForCausalLM

EQUAL = {"rtol": 1e-5, "atol": 1e-5}

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
LAYERS = 4

#: Family -> its config, and what the looped config says to mean the same.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict, dict]] = {
    "llama": (LlamaConfig, {}, {}),
    "llama_biased_tied": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
        {
            "attention_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
        },
    ),
    "llama_wide_heads": (LlamaConfig, {"head_dim": 12}, {"head_dim": 12}),
    "qwen2": (Qwen2Config, {}, {"attention_bias": True}),
    "qwen2_sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        {
            "attention_bias": True,
            "sliding_window": 4,
            "stored_layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    "qwen3": (Qwen3Config, {"head_dim": 8}, {"qk_norm": "per_head"}),
    "mistral": (MistralConfig, {"sliding_window": 4}, {"sliding_window": 4}),
    "mistral_full": (MistralConfig, {"sliding_window": None}, {}),
    "olmo2": (Olmo2Config, {}, {"norm_placement": "post_branch", "qk_norm": "flat"}),
}


def stock_model(config_class: type[PreTrainedConfig], **settings) -> nn.Module:
    config = config_class(num_hidden_layers=LAYERS, **(SHAPE | settings))
    return randomise(AutoModelForCausalLM.from_config(config)).eval()


def looped_twin(weights: dict[str, Tensor], *, num_core_layers: int = 0, **settings) -> LoopedForCausalLM:
    """A stock model's weights in a looped one: stacked, or with a core in the middle that is looped in place."""
    prelude = (LAYERS - num_core_layers) // 2 if num_core_layers else LAYERS
    config = LoopedConfig(
        num_prelude_layers=prelude,
        num_core_layers=num_core_layers,
        num_coda_layers=LAYERS - prelude - num_core_layers,
        num_loops=1,
        prelude_norm=False,
        injection="none",
        state_init="input",
        **(SHAPE | settings),
    )
    looped = LoopedForCausalLM(config).eval()
    if config.norm_placement == "pre":  # Llama calls the MLP's norm by what it comes after
        theirs, ours = "post_attention_layernorm", "pre_feedforward_layernorm"
        weights = {name.replace(theirs, ours): tensor for name, tensor in weights.items()}
    looped.load_state_dict(weights)
    return looped


@pytest.mark.parametrize("num_core_layers", [0, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_equals_the_stock_model(family, num_core_layers):
    config_class, theirs, ours = FAMILIES[family]
    stock = stock_model(config_class, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, **theirs)
    looped = looped_twin(
        stock.state_dict(), num_core_layers=num_core_layers, rope_parameters=dict(stock.config.rope_parameters), **ours
    )
    tokens = random_tokens(2, 11)
    torch.testing.assert_close(looped(tokens).logits, stock(tokens).logits, **EQUAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_the_stock_model(family):
    config_class, theirs, ours = FAMILIES[family]
    stock = stock_model(config_class, **theirs)
    looped = looped_twin(stock.state_dict(), **ours)
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    # stock models want the positions of a left-padded row spelt out; ours counts them from the mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = stock(tokens, attention_mask=mask, position_ids=positions).logits
    for given in (None, positions):
        logits = looped(tokens, attention_mask=mask, position_ids=given).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **EQUAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_the_stock_model(family):
    config_class, theirs, ours = FAMILIES[family]
    stock = stock_model(config_class, **theirs)
    looped = looped_twin(stock.state_dict(), **ours)
    tokens = random_tokens(2, 6)
    ones = torch.ones_like(tokens)
    expected = stock.generate(tokens, attention_mask=ones, max_new_tokens=8, do_sample=False)
    assert torch.equal(looped.generate(tokens, attention_mask=ones, max_new_tokens=8, do_sample=False), expected)


#: One entry per type in Transformers' ROPE_INIT_FUNCTIONS, with ranges short enough that 40 tokens leave them.
ROPE_TYPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "original_max_position_embeddings": 16,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def rope_parameters(rope_type: str) -> dict:
    return {"rope_type": rope_type, "rope_theta": 1e4, **ROPE_TYPES[rope_type]}


def test_every_rope_type_of_transformers_is_covered():
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPE_TYPES)


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_equals_llama(rope_type, length):
    """At 9 tokens every type is within its original range, at 40 the growing ones have left it."""
    window = {"max_position_embeddings": 16 if rope_type == "dynamic" else 64}
    stock = stock_model(LlamaConfig, rope_parameters=rope_parameters(rope_type), **window)
    looped = looped_twin(stock.state_dict(), rope_parameters=rope_parameters(rope_type), **window)
    tokens = random_tokens(2, length)
    torch.testing.assert_close(looped(tokens).logits, stock(tokens).logits, **EQUAL)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_rotates_differently_from_plain_rope(rope_type):
    window = {"max_position_embeddings": 16}
    stock = stock_model(LlamaConfig, rope_parameters=rope_parameters(rope_type), **window)
    scaled = looped_twin(stock.state_dict(), rope_parameters=rope_parameters(rope_type), **window)
    plain = looped_twin(stock.state_dict(), **window)
    tokens = random_tokens(1, 40)
    assert (scaled(tokens).logits - plain(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_short_sequence_after_a_long_one_is_as_before(rope_type):
    window = {"max_position_embeddings": 16 if rope_type == "dynamic" else 64}
    stock = stock_model(LlamaConfig, rope_parameters=rope_parameters(rope_type), **window)
    looped = looped_twin(stock.state_dict(), rope_parameters=rope_parameters(rope_type), **window)
    short, long = random_tokens(1, 5), random_tokens(1, 40)
    before = looped(short).logits
    looped(long)
    assert torch.equal(looped(short).logits, before)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("rope_type", ["default", "longrope"])
def test_partial_rotary_equals_phi3(rope_type, factor):
    """Phi-3 is Llama with fused projections and, as an option, with only a part of each head's channels rotated."""
    pairs = int(16 * factor) // 2
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": factor}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.5] * pairs, "long_factor": [3.0] * pairs}
        rope |= {"original_max_position_embeddings": 16}
    settings = {"hidden_size": 64, "rope_parameters": rope}
    stock = stock_model(Phi3Config, original_max_position_embeddings=16, bos_token_id=1, eos_token_id=2, **settings)
    unfused = {}
    for name, tensor in stock.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([64, 32, 32]), strict=True):
                unfused[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                unfused[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            unfused[name] = tensor
    looped = looped_twin(unfused, **(settings | {"rope_parameters": dict(stock.config.rope_parameters)}))
    for length in (9, 40):
        tokens = random_tokens(1, length)
        torch.testing.assert_close(looped(tokens).logits, stock(tokens).logits, **EQUAL)
