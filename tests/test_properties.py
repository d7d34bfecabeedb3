"""What holds for every configuration: cache, batch, padding and files change nothing, and it equals the reference."""

import copy
import tempfile

import pytest
import torch
from helpers import random_tokens, randomise
from hypothesis import given
from hypothesis import strategies as st
from random_configs import configs, few, in_place_configs, modest, random_model
from reference import reference_logits
from torch import Tensor

from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForMaskedLM

#: Deviations of fp32 sums in another order, relative to logits of order one.
EQUAL = {"rtol": 1e-4, "atol": 1e-4}

any_loops = st.none() | st.integers(1, 5)


def padded(tokens: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """The first `lengths[i]` tokens of row i, padded with token 0 to a common length; and the mask."""
    rows, masks = [], []
    for row, length in zip(tokens, lengths, strict=True):
        pads = torch.zeros(max(lengths) - length, dtype=torch.long)
        ones = torch.ones(length, dtype=torch.long)
        parts, mask = ((pads, row[:length]), (pads, ones)) if side == "left" else ((row[:length], pads), (ones, pads))
        rows.append(torch.cat(parts))
        masks.append(torch.cat(mask))
    return torch.stack(rows), torch.stack(masks)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@modest
@given(configs(), any_loops)
def test_the_model_equals_the_plain_reference(config, num_loops):
    model = random_model(config)
    weights = dict(model.named_parameters())
    tokens = random_tokens(1, 9)
    expected = reference_logits(weights, config, tokens[0], num_loops=num_loops)
    torch.testing.assert_close(model(tokens, num_loops=num_loops).logits[0], expected, **EQUAL)


@modest
@given(configs(), any_loops)
def test_cached_steps_equal_the_uncached_forward(config, num_loops):
    model, tokens = random_model(config), random_tokens(2, 8)
    whole = model(tokens, use_cache=False, num_loops=num_loops).logits
    cache, steps = None, []
    for column in tokens.split(1, dim=1):
        output = model(column, past_key_values=cache, use_cache=True, num_loops=num_loops)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **EQUAL)


@modest
@given(configs(), any_loops, st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_chunked_prefill_equals_the_whole(config, num_loops, chunks):
    model, tokens = random_model(config), random_tokens(2, sum(chunks))
    whole = model(tokens, use_cache=False, num_loops=num_loops).logits
    cache, parts = None, []
    for chunk in tokens.split(chunks, dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True, num_loops=num_loops)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EQUAL)


@modest
@given(configs(), any_loops, st.permutations(range(4)))
def test_rows_of_a_batch_do_not_see_each_other(config, num_loops, order):
    model, tokens = random_model(config), random_tokens(4, 6)
    together = model(tokens, num_loops=num_loops).logits
    torch.testing.assert_close(model(tokens[order], num_loops=num_loops).logits, together[order], **EQUAL)
    for row, expected in zip(tokens, together, strict=True):
        torch.testing.assert_close(model(row[None], num_loops=num_loops).logits[0], expected, **EQUAL)


@pytest.mark.parametrize("side", ["left", "right"])
@modest
@given(config=configs(), num_loops=any_loops, lengths=st.lists(st.integers(1, 8), min_size=2, max_size=3))
def test_padding_changes_nothing(side, config, num_loops, lengths):
    model, tokens = random_model(config), random_tokens(len(lengths), max(lengths))
    rows, mask = padded(tokens, lengths, side)
    for positions in (None, positions_of(mask)):
        logits = model(rows, attention_mask=mask, position_ids=positions, num_loops=num_loops).logits
        for row, length, kept, row_logits in zip(tokens, lengths, mask.bool(), logits, strict=True):
            alone = model(row[None, :length], num_loops=num_loops).logits[0]
            torch.testing.assert_close(row_logits[kept], alone, **EQUAL)


@modest
@given(configs(), any_loops, st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_cached_steps_of_a_left_padded_batch_equal_every_row_alone(config, num_loops, lengths):
    model, tokens = random_model(config), random_tokens(len(lengths), max(lengths))
    new = random_tokens(len(lengths), 3, seed=5)
    rows, mask = padded(tokens, lengths, "left")
    cache = model(rows, attention_mask=mask, use_cache=True, num_loops=num_loops).past_key_values
    steps = []
    for column in new.split(1, dim=1):
        mask = torch.cat((mask, torch.ones_like(column)), dim=1)
        output = model(column, attention_mask=mask, past_key_values=cache, num_loops=num_loops)
        steps.append(output.logits)
    for row, length, tail, logits in zip(tokens, lengths, new, torch.cat(steps, dim=1), strict=True):
        alone = model(torch.cat((row[:length], tail))[None], num_loops=num_loops).logits[0, length:]
        torch.testing.assert_close(logits, alone, **EQUAL)


@pytest.mark.parametrize("side", ["left", "right"])
@modest
@given(config=configs(is_causal=False), lengths=st.lists(st.integers(1, 8), min_size=2, max_size=3))
def test_padding_changes_nothing_for_the_bidirectional_model(side, config, lengths):
    torch.manual_seed(0)
    model = randomise(LoopedForMaskedLM(config)).eval()
    tokens = random_tokens(len(lengths), max(lengths))
    rows, mask = padded(tokens, lengths, side)
    logits = model(rows, attention_mask=mask).logits
    for row, length, kept, row_logits in zip(tokens, lengths, mask.bool(), logits, strict=True):
        torch.testing.assert_close(row_logits[kept], model(row[None, :length]).logits[0], **EQUAL)


@modest
@given(configs(), any_loops)
def test_later_tokens_change_nothing_before_them(config, num_loops):
    model, tokens = random_model(config), random_tokens(1, 7)
    changed = torch.cat((tokens[:, :4], random_tokens(1, 3, seed=8)), dim=1)
    first, second = (model(t, num_loops=num_loops).logits[:, :4] for t in (tokens, changed))
    torch.testing.assert_close(first, second, **EQUAL)


@modest
@given(configs(), any_loops)
def test_eager_and_sdpa_attention_agree(config, num_loops):
    model, tokens = random_model(config), random_tokens(2, 7)
    rows, mask = padded(tokens, [7, 4], "left")
    sdpa = model(rows, attention_mask=mask, num_loops=num_loops).logits
    model.set_attn_implementation("eager")
    eager = model(rows, attention_mask=mask, num_loops=num_loops).logits
    torch.testing.assert_close(eager[mask.bool()], sdpa[mask.bool()], **EQUAL)


@modest
@given(configs(), any_loops)
def test_evaluation_repeats_bit_by_bit(config, num_loops):
    model, tokens = random_model(config), random_tokens(2, 7)
    before = torch.get_rng_state()
    first = model(tokens, num_loops=num_loops).logits
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(model(tokens, num_loops=num_loops).logits, first)


@few
@given(configs())
def test_saved_and_loaded_a_model_is_bit_equal(config):
    model, tokens = random_model(config), random_tokens(2, 5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(99)
        loaded = LoopedForCausalLM.from_pretrained(folder).eval()
    state, back = model.state_dict(), loaded.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
    # a copy, because a loaded tensor may lie unaligned in the file's memory, where kernels sum in another order
    assert torch.equal(model(tokens).logits, copy.deepcopy(loaded)(tokens).logits)


@modest
@given(configs())
def test_the_json_round_trip_is_exact(config):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        back = LoopedConfig.from_pretrained(folder)
    expected = config.to_dict()
    assert back.to_dict() | {"_name_or_path": expected["_name_or_path"]} == expected


@few
@given(configs(), st.integers(1, 6))
def test_writing_the_loop_count_equals_passing_it(config, num_loops):
    model, tokens = random_model(config), random_tokens(1, 5)
    passed = model(tokens, num_loops=num_loops).logits
    model.config.num_loops = num_loops
    assert torch.equal(model(tokens).logits, passed)
    rebuilt = LoopedForCausalLM(copy.deepcopy(model.config)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens).logits, passed)


@modest
@given(in_place_configs())
def test_one_loop_in_place_is_bit_exactly_the_stacked_model(config):
    model, tokens = random_model(config), random_tokens(2, 7)
    stacked = copy.deepcopy(config)
    prelude = config.num_stored_layers
    stacked.num_prelude_layers, stacked.num_core_layers, stacked.num_coda_layers = prelude, 0, 0
    # what acts on the core, which a stack has no place for
    stacked.core_group_size, stacked.kv_sharing, stacked.loop_update = None, "none", "replace"
    if stacked.final_norm == "every_loop":
        stacked.final_norm = "end"
    stack = LoopedForCausalLM(stacked).eval()
    stack.load_state_dict(model.state_dict())
    assert torch.equal(stack(tokens).logits, model(tokens).logits)


@few
@given(configs())
def test_generation_with_a_cache_equals_generation_without(config):
    model, tokens = random_model(config), random_tokens(2, 4)
    inputs = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(tokens, use_cache=use, **inputs) for use in (True, False))
    assert torch.equal(cached, uncached)
