"""Stability by construction: the diagonal injection contracts for every parameter, and deep loops stay finite."""

import math

import pytest
import torch
from helpers import VARIANTS, entering, random_tokens, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_looped import LoopedForCausalLM
from modeling_looped.injection import DiagonalInjection
from modeling_looped.registry import BuildContext

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 3

steady = settings(max_examples=150, deadline=None, derandomize=True)
#: Parameters far beyond anything that training reaches, in all dtypes' range, with plain sizes in between.
extreme = st.one_of(
    st.floats(-1e4, 1e4),
    st.floats(-120, 120),
    st.floats(-2, 2),
    st.sampled_from([-1e4, 1e4, -88.0, 88.0, 0.0, -104.0]),
)


def diagonal(
    a_log: float = 0.0, dt_bias: float = 0.0, dtype: torch.dtype = torch.float32, **params
) -> DiagonalInjection:
    """A diagonal injection with these values in all channels and the identity for B."""
    injection = DiagonalInjection(DiagonalInjection.Params(**params), BuildContext(WIDTH, 1, 0.02, 1e-5))
    with torch.no_grad():
        injection.A_log.fill_(a_log)
        injection.dt_bias.fill_(dt_bias)
        injection.B.copy_(torch.eye(WIDTH))
    return injection.to(dtype)


@steady
@given(a_log=extreme, dt_bias=extreme, dtype=st.sampled_from(DTYPES))
def test_the_decay_lies_strictly_inside_0_and_1_for_every_parameter(a_log, dt_bias, dtype):
    decay = diagonal(a_log, dt_bias, dtype).decay(dtype)
    assert decay.dtype == dtype
    assert (decay > 0).all()
    assert (decay < 1).all()


@steady
@given(a_log=extreme, dt_bias=extreme, dtype=st.sampled_from(DTYPES), input_matrix=st.sampled_from(["euler", "zoh"]))
def test_the_injection_and_its_gradients_are_finite_for_every_parameter(a_log, dt_bias, dtype, input_matrix):
    injection = diagonal(a_log, dt_bias, dtype, input_matrix=input_matrix)
    prelude = torch.ones(1, 2, WIDTH, dtype=dtype, requires_grad=True)
    state = torch.ones(1, 2, WIDTH, dtype=dtype, requires_grad=True)
    output = entering(injection, prelude, state)
    assert output.isfinite().all()
    output.sum().backward()
    for tensor in (prelude, state, *injection.parameters()):
        assert tensor.grad.isfinite().all()


@steady
@given(a_log=st.floats(-150, 20), dt_bias=st.floats(-60, 20))
def test_the_zero_order_hold_is_the_integral_of_the_decay(a_log, dt_bias):
    r"""\bar B = (1 - exp(-\Delta r)) / r with r = exp(A_log), whose limit for r -> 0 is \Delta; checked in float64."""
    step = math.log1p(math.exp(dt_bias))
    rate = math.exp(a_log)
    expected = -math.expm1(-step * rate) / rate
    injected = entering(
        diagonal(a_log, dt_bias, input_matrix="zoh"), torch.ones(1, 1, WIDTH), torch.zeros(1, 1, WIDTH)
    )
    torch.testing.assert_close(injected, torch.full_like(injected, expected), rtol=1e-5, atol=1e-37)


@steady
@given(a_log=st.floats(-3, 3), dt_bias=st.floats(-10, 3))
def test_euler_and_zero_order_hold_agree_for_small_steps_and_hold_is_smaller(a_log, dt_bias):
    prelude, state = torch.ones(1, 1, WIDTH), torch.zeros(1, 1, WIDTH)
    euler = entering(diagonal(a_log, dt_bias, input_matrix="euler"), prelude, state)
    hold = entering(diagonal(a_log, dt_bias, input_matrix="zoh"), prelude, state)
    assert (hold <= euler).all()
    small = math.log1p(math.exp(dt_bias)) * math.exp(a_log)
    torch.testing.assert_close(hold, euler, rtol=small, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("initial_decay", [1e-3, 0.1, math.sqrt(1 / 5), 0.9, 0.99])
def test_at_initialisation_the_decay_is_the_configured_one(initial_decay, dtype):
    config = tiny_config(injection={"type": "diagonal", "initial_decay": initial_decay})
    injection = LoopedForCausalLM(config).to(dtype).model.injection
    # the parameters themselves are rounded to the dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    expected = torch.full((config.hidden_size,), initial_decay)
    torch.testing.assert_close(injection.decay(), expected, rtol=tolerance, atol=0)


def test_the_published_start_is_the_square_root_of_one_fifth():
    assert tiny_config().injection["initial_decay"] == math.sqrt(1 / 5)


def test_the_linear_part_converges_to_its_fixed_point():
    r"""x = \bar A x + \bar B e iterated from anywhere ends at (I - \bar A)^{-1} \bar B e: the hold's A^{-1} B e."""
    injection = diagonal(0.3, -0.2, input_matrix="zoh")
    prelude = torch.tensor([[[1.0, -2.0, 0.5]]])
    state = torch.full_like(prelude, 100.0)
    for _ in range(200):
        state = entering(injection, prelude, state)
    torch.testing.assert_close(state, prelude / math.exp(0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name not in ("stacked", "sliding", "capped", "lora")]
)
def test_256_loops_stay_finite(variant):
    model = tiny_model(**VARIANTS[variant], num_core_layers=1, num_coda_layers=0)
    with torch.no_grad():
        output = model(random_tokens(1, 3), num_loops=256, output_loop_hidden_states=True)
    assert output.logits.isfinite().all()
    assert all(state.isfinite().all() for state in output.loop_hidden_states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_256_loops_stay_finite_in_half_precision(dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        assert model(random_tokens(1, 3), num_loops=256).logits.isfinite().all()


def test_gradients_through_64_loops_stay_finite():
    model = tiny_model()
    model(random_tokens(1, 3), num_loops=64, labels=random_tokens(1, 3)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
