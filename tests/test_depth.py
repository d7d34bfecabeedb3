"""A depth for each sequence or token: what a forward and its gradients are then.

The reference is `reference.py`, which freezes and cuts token by token. Which depths are drawn is in
`test_depth_sampling.py`.
"""

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from random_configs import configs, few, random_model
from reference import reference_logits, reference_trace
from torch.func import functional_call

from modeling_looped import LoopedModel
from modeling_looped.injection import INJECTIONS

TOKENS = random_tokens(4, 7)
DEPTHS = torch.tensor([3, 1, 5, 2])

#: Variants that read the last state, as rows with depths of their own must.
READ_LAST = [
    name
    for name, v in VARIANTS.items()
    if not {"halting", "depth_attention"} & v.keys() and v.get("num_core_layers", 2)
]
TRUNCATABLE = [
    name
    for name in READ_LAST
    if INJECTIONS[tiny_config(**VARIANTS[name]).injection["type"]].carries_prelude
    and VARIANTS[name].get("kv_sharing", "none") == "none"
]
MORE = {"nested": {"schedule": {"type": "nested", "inner_loops": 2}, "injection": "none", "state_init": "input"}}


def same_model(mode: str | None = None, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    if overrides.get("state_init") not in (None, "zeros", "input"):
        overrides["state_init"] = "zeros"  # training draws a random one anew for each call
    model = tiny_model(checkpoint_granularity=mode or "layer", **overrides)
    if mode is not None:
        model.train().activation_checkpointing_enable()
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, gradient in first.items():
        torch.testing.assert_close(
            second[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("variant", [*READ_LAST, *MORE])
def test_each_sequence_is_what_it_is_alone_at_its_own_depth(variant):
    """Logits and, with every sequence in the loss, gradients."""
    settings = {**VARIANTS, **MORE}[variant]
    model = same_model(**settings).train()
    output = model(TOKENS, num_loops=DEPTHS)
    assert torch.equal(output.num_loops, DEPTHS)
    output.logits.square().mean(dim=(1, 2)).sum().backward()
    together = gradients(model)
    model.zero_grad()
    for row, depth in enumerate(DEPTHS.tolist()):
        alone = model(TOKENS[row : row + 1], num_loops=depth).logits
        assert_close(output.logits[row : row + 1], alone)
        alone.square().mean().backward()
    assert_same_gradients(together, gradients(model))


@pytest.mark.parametrize("mode", [None, "layer", "loop"])
@pytest.mark.parametrize("variant", TRUNCATABLE)
def test_truncation_keeps_the_last_loops_of_each_sequence(variant, mode):
    """As it does for the sequence alone; also where a loop or a layer is computed again."""
    model = same_model(mode, **{**VARIANTS[variant], "backprop_loops": 2}).train()
    output = model(TOKENS, num_loops=DEPTHS)
    output.logits.square().mean(dim=(1, 2)).sum().backward()
    together = gradients(model)
    model.zero_grad()
    for row, depth in enumerate(DEPTHS.tolist()):
        model(TOKENS[row : row + 1], num_loops=depth).logits.square().mean().backward()
    assert_same_gradients(together, gradients(model))


def test_a_row_of_padding_on_either_side_is_what_its_tokens_are_alone():
    model = same_model()
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    logits = model(TOKENS, attention_mask=mask, num_loops=DEPTHS).logits
    assert_close(logits[0, 3:], model(TOKENS[:1, 3:], num_loops=3).logits[0])
    assert_close(logits[1, :5], model(TOKENS[1:2, :5], num_loops=1).logits[0])


@given(config=configs(halting="none", depth_attention="none"), seed=st.integers(0, 99))
@few
@torch.no_grad()
def test_tokens_with_depths_of_their_own_equal_the_reference(config, seed):
    model = random_model(config)
    depths = torch.randint(1, 5, (2, 5), generator=torch.Generator().manual_seed(seed))
    tokens = random_tokens(2, 5, seed=seed)
    logits = model(tokens, num_loops=depths).logits
    weights = dict(model.named_parameters())
    for row in range(2):
        assert_close(logits[row], reference_logits(weights, config, tokens[row], depths=depths[row]), atol=1e-3)


@pytest.mark.parametrize("backprop_loops", [None, 1, 2])
@pytest.mark.parametrize("variant", ["parcae", "norms", "lora", "huginn"])
def test_gradients_of_tokens_equal_the_references(variant, backprop_loops):
    """Cut after each loop that is not among the last of the token, in fp64."""
    model = same_model(**{**VARIANTS[variant], "backprop_loops": backprop_loops}).train().double()
    tokens = TOKENS[0]
    depths = torch.tensor([4, 1, 3, 2, 5, 1, 2])
    output = model(tokens[None], num_loops=depths[None])
    assert torch.equal(output.num_loops, depths[None])
    output.logits.square().mean().backward()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits = reference_logits(weights, model.config, tokens, depths=depths, backprop_loops=backprop_loops)
    torch.testing.assert_close(output.logits[0], logits, rtol=1e-5, atol=1e-6)
    logits.square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-4, atol=1e-6)


def test_a_token_keeps_its_state_once_its_depth_is_reached():
    model = same_model()
    depths = torch.tensor([[4, 1, 3, 2, 5, 1, 2]])
    output = model(TOKENS[:1], num_loops=depths, output_loop_hidden_states=True)
    assert len(output.loop_hidden_states) == 6
    for loop in range(1, 6):
        still = depths[0] < loop
        before, after = output.loop_hidden_states[loop - 1][0], output.loop_hidden_states[loop][0]
        assert torch.equal(after[still], before[still])
        assert (after[~still] != before[~still]).any(dim=-1).all()
    states = reference_trace(dict(model.named_parameters()), model.config, TOKENS[0], depths=depths[0]).states
    for state, expected in zip(output.loop_hidden_states, states, strict=True):
        assert_close(state[0], expected)


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_recomputation_uses_the_same_draw(granularity, mode):
    """Loss and gradients of a drawn depth are those without checkpointing, to the last bit."""
    spec = {"type": "poisson", "granularity": granularity, "mean": 4}
    results = []
    for checkpointing in (None, mode):
        model = same_model(checkpointing, depth_sampling=spec, backprop_loops=2).train()
        for _ in range(2):
            model.zero_grad()
            output = model(TOKENS, labels=TOKENS)
            output.loss.backward()
        assert model.model.depth_sampling.step == 2
        results.append((output, gradients(model)))
    (plain, expected), (recomputed, found) = results
    assert torch.equal(plain.num_loops, recomputed.num_loops)
    assert torch.equal(plain.loss, recomputed.loss)
    assert [name for name, gradient in expected.items() if not torch.equal(gradient, found[name])] == []


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_every_parameter_gets_a_gradient_at_every_drawn_depth(granularity):
    spec = {"type": "uniform", "granularity": granularity}
    model = same_model(depth_sampling=spec, loop_adapter="lora", loop_conditioning="norms", backprop_loops=1).train()
    for _ in range(3):
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_stay_near_fp32(dtype):
    model = same_model(loop_update="damped")
    expected = model(TOKENS, num_loops=DEPTHS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(TOKENS, num_loops=DEPTHS).logits.float(), expected, atol=5e-2)
    output = model.to(dtype)(TOKENS, num_loops=DEPTHS, output_loop_hidden_states=True)
    assert {state.dtype for state in output.loop_hidden_states} == {dtype}
    assert_close(output.logits.float(), expected, atol=5e-2)


def test_encoders_take_depths_per_sequence_too():
    torch.manual_seed(0)
    model = LoopedModel(tiny_config(is_causal=False)).eval()
    states = model(TOKENS, num_loops=DEPTHS).last_hidden_state
    for row, depth in enumerate(DEPTHS.tolist()):
        assert_close(states[row : row + 1], model(TOKENS[row : row + 1], num_loops=depth).last_hidden_state)


def test_functional_calls_see_depths_as_any_other_input():
    model = same_model()
    output = functional_call(model, dict(model.named_parameters()), (TOKENS,), {"num_loops": DEPTHS})
    assert torch.equal(output.logits, model(TOKENS, num_loops=DEPTHS).logits)


@pytest.mark.parametrize(
    ("num_loops", "message"),
    [
        (torch.tensor([1, 2]), r"num_loops of shape \(2,\) .* integers of shape \(4,\) or \(4, 7\)"),
        (torch.ones(4), r"num_loops of shape \(4,\) and torch.float32 must be an integer"),
        (torch.ones(4, dtype=torch.bool), "torch.bool must be an integer"),
        (torch.tensor([1, 2, 0, 3]), "num_loops contains 0; it must be at least 1 everywhere"),
    ],
)
def test_depths_that_make_no_sense_are_refused(num_loops, message):
    with pytest.raises(ValueError, match=message):
        same_model()(TOKENS, num_loops=num_loops)


def test_depths_of_rows_are_refused_on_a_cache_and_beside_a_halting_rule():
    model = same_model()
    cache = model(TOKENS, num_loops=3, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache belongs to one loop count"):
        model(TOKENS[:, :1], num_loops=DEPTHS, past_key_values=cache)
    assert model(TOKENS, num_loops=DEPTHS, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="halting='gate' chooses among the loops"):
        same_model(halting="gate")(TOKENS, num_loops=DEPTHS)
