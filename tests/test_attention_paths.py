"""Every attention implementation and every way to say who sees whom gives the same logits.

FlashAttention has a file of its own, `test_flash_attention.py`.
"""

import functools
from collections.abc import Sequence

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_config, tiny_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache, masking_utils
from transformers.integrations import flex_attention as flex_integration

from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM

PACKED_LENGTHS = (4, 1, 9, 6)


# What torch says of the fixture `flex_uncompiled`.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture
def flex_uncompiled(monkeypatch):
    """FlexAttention and its block mask in plain operations: compiling each of them takes half a minute here."""
    monkeypatch.setattr(
        masking_utils,
        "create_block_mask",
        lambda *args, **kwargs: create_block_mask(*args, **{**kwargs, "_compile": False}),
    )
    monkeypatch.setattr(
        flex_integration,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )


def logits_with(model: LoopedForCausalLM, attention: str, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(tokens, **kwargs).logits


MASK = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])


def assert_implementations_agree(
    model: LoopedForCausalLM, calls: Sequence[dict] = ({}, {"attention_mask": MASK}, {"num_loops": 1})
) -> None:
    tokens = random_tokens(2, 11)
    for kwargs in calls:
        expected = logits_with(model, "sdpa", tokens, **kwargs)
        seen = MASK.bool() if "attention_mask" in kwargs else torch.ones_like(tokens).bool()
        for attention in ("eager", "flex_attention"):
            assert_close(logits_with(model, attention, tokens, **kwargs)[seen], expected[seen])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("flex_uncompiled")
@torch.no_grad()
def test_eager_and_flex_equal_sdpa(variant):
    assert_implementations_agree(tiny_model(**VARIANTS[variant]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning")
@torch.no_grad()
def test_compiled_flex_equals_sdpa():
    """As it runs for a user: FlexAttention compiled by inductor, which also works without a GPU.

    With one kind of mask, since each compiles anew.
    """
    assert_implementations_agree(tiny_model(**VARIANTS["sliding"]), [{"attention_mask": MASK}])


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


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("variant", ["parcae", "huginn", "sliding", "shared"])
@torch.no_grad()
def test_packed_texts_equal_separate_texts(variant, attention, use_cache):
    model = tiny_model(**VARIANTS[variant])
    tokens, positions, begins = packed()
    expected = torch.cat([model(text).logits for text in tokens.split(PACKED_LENGTHS, dim=1)], dim=1)
    lengths = {"max_length_q": max(PACKED_LENGTHS), "max_length_k": max(PACKED_LENGTHS)}
    by_lengths = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, **lengths}
    for kwargs in ({"position_ids": positions}, by_lengths, {"position_ids": positions, **by_lengths}):
        assert_close(logits_with(model, attention, tokens, use_cache=use_cache, **kwargs), expected)


@pytest.mark.usefixtures("flex_uncompiled")
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
    assert_close(logits_with(sliding, attention, tokens), expected)


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_an_encoder_sees_both_sides_and_no_padding(attention):
    model = LoopedForMaskedLM(tiny_config(is_causal=False)).eval()
    tokens = random_tokens(2, 9)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    changed = tokens.clone()
    changed[:, 5] = 3 + (tokens[:, 5] - 2) % 90
    logits = functools.partial(logits_with, model, attention)
    assert (logits(tokens)[:, 0] - logits(changed)[:, 0]).abs().max() > 1e-4
    assert_close(logits(tokens, attention_mask=mask)[0, :6], logits(tokens[:1, :6])[0])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        tiny_model().set_attn_implementation("ring_attention")
