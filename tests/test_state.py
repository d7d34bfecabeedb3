"""The seeded normal start: in evaluation a function of (seed, position, channel) and of nothing else; a good draw."""

import math

import pytest
import torch
from helpers import random_tokens, randomise, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_looped import LoopedForCausalLM
from modeling_looped.state import keyed_uniform, truncated_normal

#: Standard deviation of a standard normal cut at three.
TRUNCATED_STD = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def uniforms(seed: int = 0, positions: int = 2048, channels: int = 128) -> torch.Tensor:
    """[positions, channels] in float64."""
    return keyed_uniform(seed, torch.arange(positions)[None], channels)[0].double()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**31, 2**40 + 7, -1])
def test_the_uniforms_are_uniform(seed):
    u = uniforms(seed)
    n = u.numel()
    assert ((u > 0) & (u < 1)).all()
    assert u.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))
    counts = torch.histc(u, bins=256, min=0.0, max=1.0)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


@given(seed=st.integers(0, 2**62), position=st.integers(0, 2**31 - 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_key_gives_numbers_strictly_inside_0_and_1(seed, position):
    u = keyed_uniform(seed, torch.tensor([[position]]), 64)
    assert u.dtype == torch.float32
    assert ((u > 0) & (u < 1)).all()
    assert (truncated_normal(u).abs() <= 3).all()


@pytest.mark.slow
def test_no_number_rounds_up_to_1():
    """Sixty million draws would meet the largest hash several times."""
    assert max(uniforms(seed, 4096, 1024).max() for seed in range(15)) < 1


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64])
def test_neighbouring_positions_and_channels_are_uncorrelated(lag):
    u = uniforms()
    for x, y in ((u[lag:], u[:-lag]), (u[:, lag:], u[:, :-lag])):
        assert abs(correlation(x, y)) < 5 / math.sqrt(x.numel())


def test_rows_and_columns_have_independent_means():
    """A generator that mixes position and channel badly shows up as rows or columns that lean to one side."""
    u = uniforms()
    for axis in (0, 1):
        means = u.mean(axis)
        expected = 1 / 12 / u.shape[axis]
        spread = expected * math.sqrt(2 / len(means))
        assert means.var().item() == pytest.approx(expected, abs=5 * spread)


@pytest.mark.parametrize("other", [1, 2, 1000, 2**31, 2**31 + 1, -1])
def test_seeds_are_uncorrelated(other):
    u, v = uniforms(0), uniforms(other)
    assert abs(correlation(u, v)) < 5 / math.sqrt(u.numel())


@pytest.mark.parametrize("seed", [1, 2, 5, 17])
def test_no_seed_is_another_one_shifted(seed):
    first, other = uniforms(0, 64, 16), uniforms(seed, 64, 16)
    rows = {tuple(row) for row in first.tolist()}
    assert not any(tuple(row) in rows for row in other.tolist())


def test_positions_do_not_repeat():
    assert len({tuple(row) for row in uniforms(0, 8192, 4).tolist()}) == 8192


def test_the_normal_is_truncated_at_three_and_has_the_right_moments():
    x = truncated_normal(uniforms())
    n = x.numel()
    assert x.abs().max() <= 3
    assert x.mean().item() == pytest.approx(0, abs=5 / math.sqrt(n))
    assert x.std().item() == pytest.approx(TRUNCATED_STD, abs=5 / math.sqrt(2 * n))


def test_the_normal_is_the_inverse_of_its_distribution():
    u = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64)
    low = torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64))
    back = (torch.special.ndtr(truncated_normal(u)) - low) / (1 - 2 * low)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-12)


def first_state(model: LoopedForCausalLM, tokens: torch.Tensor, **inputs) -> torch.Tensor:
    return model(tokens, output_loop_hidden_states=True, **inputs).loop_hidden_states[0]


def normal_model(**params) -> LoopedForCausalLM:
    return tiny_model(state_init={"type": "normal", "std": 1.0, **params})


def test_evaluation_does_not_depend_on_tokens_weights_batch_or_any_generator():
    state = first_state(normal_model(), random_tokens(1, 7))
    torch.manual_seed(123)
    other = first_state(randomise(normal_model(), seed=9), random_tokens(3, 7, seed=4))
    for row in other:
        assert torch.equal(row, state[0])


def test_evaluation_does_not_depend_on_padding_or_chunks():
    model, tokens = normal_model(), random_tokens(1, 7)
    state = first_state(model, tokens)
    for side in ("left", "right"):
        pads = torch.zeros(1, 3, dtype=torch.long)
        padded = torch.cat((pads, tokens) if side == "left" else (tokens, pads), dim=1)
        mask = (padded != 0).long()
        assert torch.equal(first_state(model, padded, attention_mask=mask)[mask.bool()], state[0])
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    assert torch.equal(first_state(model, tokens[:, 4:], past_key_values=cache), state[:, 4:])


def test_evaluation_follows_the_seed_the_std_and_the_position():
    tokens = random_tokens(1, 7)
    state = first_state(normal_model(), tokens)
    assert not torch.equal(first_state(normal_model(seed=1), tokens), state)
    torch.testing.assert_close(first_state(normal_model(std=0.25), tokens), 0.25 * state)
    later = torch.arange(5, 12)[None]
    shifted = first_state(normal_model(), tokens, position_ids=later, attention_mask=torch.ones_like(tokens))
    assert torch.equal(shifted[:, :2], state[:, 5:])


@pytest.mark.parametrize("cut", [0.5, 2.0, math.inf])
def test_the_normal_may_be_cut_elsewhere_or_nowhere(cut):
    u = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64)
    low, high = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-cut, cut))
    back = (torch.special.ndtr(truncated_normal(u, cut=cut)) - low) / (high - low)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-12)
    state = first_state(normal_model(truncation=None if cut == math.inf else cut), random_tokens(1, 200))
    assert state.isfinite().all()
    assert 0.98 * min(cut, 3.5) < state.abs().max() <= cut


def test_an_uncut_normal_is_finite_for_every_uniform_number():
    """The smallest and the largest that either source draws."""
    u = torch.tensor([2.0**-25, 2.0**-24, 1 - 2.0**-24])
    assert truncated_normal(u, cut=math.inf).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_the_unit_normal_has_mean_0_and_deviation_1_in_every_token(training):
    model = tiny_model(state_init={"type": "unit_normal", "seed": 4}).train(training)
    state = first_state(model, random_tokens(2, 7))
    torch.testing.assert_close(state.mean(-1), torch.zeros(2, 7), rtol=0, atol=1e-6)
    torch.testing.assert_close(state.std(-1), torch.ones(2, 7), rtol=0, atol=1e-5)
    assert torch.equal(first_state(model, random_tokens(2, 7, seed=5)), state) is not training
    assert not torch.equal(state[:, 0], state[:, 1])
    assert not torch.equal(first_state(tiny_model(state_init="unit_normal"), random_tokens(2, 7)), state)


def test_training_draws_afresh_from_the_generator_with_the_same_distribution():
    config = tiny_config(state_init={"type": "normal", "std": 0.5}, max_position_embeddings=1024)
    model = LoopedForCausalLM(config).train()
    tokens = random_tokens(4, 256)
    torch.manual_seed(7)
    first, second = first_state(model, tokens, num_loops=1), first_state(model, tokens, num_loops=1)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(7)
    assert torch.equal(first_state(model, tokens, num_loops=1), first)
    assert first.abs().max() <= 1.5
    assert first.mean().item() == pytest.approx(0, abs=5 * 0.5 / math.sqrt(first.numel()))
    assert first.std().item() == pytest.approx(0.5 * TRUNCATED_STD, abs=5 * 0.5 / math.sqrt(2 * first.numel()))


def test_zeros_and_input_are_what_they_say():
    tokens = random_tokens(1, 5)
    assert not first_state(tiny_model(state_init="zeros"), tokens).any()
    model = tiny_model(state_init="input", num_prelude_layers=0, prelude_norm=False, embedding_scale=3.0)
    assert torch.equal(first_state(model, tokens), 3.0 * model.model.embed_tokens(tokens))
