"""Every attention implementation and every way to say who sees whom gives the same logits.

FlashAttention has a file of its own, `test_flash_attention.py`.
"""

import warnings

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_config, tiny_model
from transformers import DynamicCache

from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM

PACKED_LENGTHS = (4, 1, 9, 6)


def with_attention(model: LoopedForCausalLM, name: str) -> LoopedForCausalLM:
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_eager_and_flex_equal_sdpa(variant):
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(2, 11)
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    for kwargs in ({}, {"attention_mask": mask}, {"num_loops": 1}):
        expected = with_attention(model, "sdpa")(tokens, **kwargs).logits
        seen = mask.bool() if "attention_mask" in kwargs else torch.ones_like(tokens).bool()
        assert_close(with_attention(model, "eager")(tokens, **kwargs).logits[seen], expected[seen])
        assert_close(flex_logits(model, tokens, **kwargs)[seen], expected[seen])


def flex_logits(model: LoopedForCausalLM, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits of `flex_attention`, which on a CPU without a compiler runs unfused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return with_attention(model, "flex_attention")(tokens, **kwargs).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
@torch.no_grad()
def test_a_2d_mask_may_have_any_dtype(dtype, attention):
    model = tiny_model(attn_implementation=attention, **VARIANTS["sliding"])
    tokens = random_tokens(2, 9)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    logits = model(tokens, attention_mask=mask.to(dtype)).logits
    assert_close(logits[0, 3:], model(tokens[:1, 3:]).logits[0])
    assert_close(logits[1], model(tokens[1:]).logits[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_4d_mask_is_used_as_it_is(attention):
    """A block-diagonal mask makes two texts of one row, boolean where the implementation takes it, else additive."""
    model = tiny_model(attn_implementation=attention)
    tokens = random_tokens(1, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    causal[4:, :4] = False
    additive = torch.zeros(9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    expected = torch.cat((model(tokens[:, :4]).logits, model(tokens[:, 4:]).logits), dim=1)
    for mask in (additive,) if attention == "eager" else (additive, causal):
        logits = model(tokens, attention_mask=mask[None, None], position_ids=positions).logits
        assert_close(logits, expected)


@torch.no_grad()
def test_a_4d_mask_reaches_into_the_cache():
    model = tiny_model()
    tokens = random_tokens(1, 9)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :5], past_key_values=cache)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None, 5:]
    positions = torch.arange(5, 9)[None]
    logits = model(tokens[:, 5:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert_close(logits, model(tokens).logits[:, 5:])


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Several texts in one row: tokens, position ids that restart, and where each text begins and ends."""
    positions = torch.cat([torch.arange(length) for length in PACKED_LENGTHS])[None]
    begins = torch.tensor([0, *torch.tensor(PACKED_LENGTHS).cumsum(0)], dtype=torch.int32)
    return random_tokens(1, sum(PACKED_LENGTHS)), positions, begins


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("variant", ["parcae", "concat", "in_place", "sliding"])
@torch.no_grad()
def test_packed_texts_equal_separate_texts(variant, attention, use_cache):
    model = tiny_model(**VARIANTS[variant])
    tokens, positions, begins = packed()
    expected = torch.cat([model(text).logits for text in tokens.split(PACKED_LENGTHS, dim=1)], dim=1)
    lengths = {"max_length_q": max(PACKED_LENGTHS), "max_length_k": max(PACKED_LENGTHS)}
    by_lengths = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, **lengths}
    for kwargs in ({"position_ids": positions}, by_lengths, {"position_ids": positions, **by_lengths}):
        run = flex_logits if attention == "flex_attention" else with_attention(model, attention)
        arguments = (model, tokens) if attention == "flex_attention" else (tokens,)
        logits = run(*arguments, use_cache=use_cache, **kwargs)
        assert_close(getattr(logits, "logits", logits), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_a_sliding_layer_sees_its_window_and_no_more(attention):
    """The same weights with full attention and the window written out as a mask."""
    window = 4
    sliding = tiny_model(sliding_window=window)
    full = LoopedForCausalLM(tiny_config()).eval()
    full.load_state_dict(sliding.state_dict())
    tokens = random_tokens(2, 15)
    distance = torch.arange(15)[:, None] - torch.arange(15)[None, :]
    in_window = (distance >= 0) & (distance < window)
    expected = full(tokens, attention_mask=in_window[None, None].expand(2, 1, -1, -1)).logits
    assert (expected - full(tokens).logits).abs().max() > 0.01
    if attention == "flex_attention":
        assert_close(flex_logits(sliding, tokens), expected)
    else:
        assert_close(with_attention(sliding, attention)(tokens).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_an_encoder_sees_both_sides_and_no_padding(attention):
    model = LoopedForMaskedLM(tiny_config(is_causal=False)).eval()
    tokens = random_tokens(2, 9)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    changed = tokens.clone()
    changed[:, 5] = 3 + (tokens[:, 5] - 2) % 90
    run = (lambda *a, **k: flex_logits(model, *a, **k)) if attention == "flex_attention" else None
    logits = run or (lambda *a, **k: with_attention(model, attention)(*a, **k).logits)
    assert (logits(tokens)[:, 0] - logits(changed)[:, 0]).abs().max() > 1e-4
    assert_close(logits(tokens, attention_mask=mask)[0, :6], logits(tokens[:1, :6])[0])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        tiny_model().set_attn_implementation("ring_attention")
