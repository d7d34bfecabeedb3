"""Halting rules against their equations, token by token, and what they must never change."""

from itertools import pairwise

import pytest
import torch
from helpers import TOLERANCE, random_tokens, tiny_config, tiny_model

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.halting import HALTINGS, Readings, Step
from modeling_looped.registry import BuildContext

CONTEXT = BuildContext(hidden_size=8, num_core_layers=1, initializer_range=0.5, rms_norm_eps=1e-6)
CHOOSING = [
    {"type": "state_change", "threshold": 0.9},
    {"type": "gate", "threshold": 0.6},
    {"type": "gate", "threshold": 0.6, "output": "expected"},
    {"type": "act", "threshold": 0.8, "initial_bias": -0.5},
    {"type": "act", "threshold": 0.8, "initial_bias": -0.5, "form": "universal"},
]


def build(spec: dict):
    rule = HALTINGS.build(HALTINGS.normalise(spec), CONTEXT)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.normal_(std=0.7)
    return rule.eval()


def random_states(loops: int) -> list[torch.Tensor]:
    """States that settle down, so that every rule has something to decide: loops + 1 of shape [2, 5, 8]."""
    steps = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(t)) * 0.8**t for t in range(loops + 1)]
    return list(torch.stack(steps).cumsum(0))


def core_inputs(states: list[torch.Tensor]) -> list[torch.Tensor]:
    """What enters the core in each loop: something else than the state that enters the loop."""
    return [state.roll(1, dims=-1) - 0.3 for state in states[:-1]]


def run(rule, states: list[torch.Tensor]) -> Readings:
    readings = rule.start(states[0])
    inputs = core_inputs(states)
    for loop, (previous, state) in enumerate(pairwise(states)):
        readings = rule(readings, Step(previous, inputs[loop], state), loop, loop == len(states) - 2)
    return readings


def reference_weights(spec: dict, rule, states: list[torch.Tensor]) -> list[float]:
    """Weights of the states of one token, [loops], from the definition and in double precision.

    Of the Universal Transformer's form they are those of the running mix, and sum to less than one where a token has
    not halted.
    """
    loops, inputs = len(states) - 1, core_inputs(states)

    def gate(state: torch.Tensor) -> float:
        return torch.sigmoid(rule.weight[0].double() @ state.double() + rule.bias[0].double()).item()

    if spec["type"] == "state_change":
        for loop in range(1, loops):
            if (states[loop] - states[loop - 1]).norm() <= spec["threshold"] * states[loop].norm():
                return [float(t == loop) for t in range(1, loops + 1)]
        return [0.0] * (loops - 1) + [1.0]
    if spec["type"] == "gate":
        probabilities, survival = [], 1.0
        for loop in range(1, loops):
            probabilities.append(survival * gate(states[loop]))
            survival *= 1 - gate(states[loop])
        probabilities.append(survival)
        if spec.get("output") == "expected":
            return probabilities
        reached = [sum(probabilities[: t + 1]) >= spec["threshold"] for t in range(loops - 1)] + [True]
        return [float(t == reached.index(True)) for t in range(loops)]
    weights, given = [], 0.0
    if spec.get("form") == "universal":
        for loop in range(loops):
            probability = gate(inputs[loop])
            if given + probability > spec["threshold"]:
                probability = 1 - given
            given += probability
            weights = [weight * (1 - probability) for weight in weights] + [probability]
        return weights
    for loop in range(loops):
        probability = gate(states[loop])
        if given + probability > spec["threshold"] or loop == loops - 1:
            return [*weights, 1 - given] + [0.0] * (loops - 1 - loop)
        weights.append(probability)
        given += probability
    raise AssertionError("the last loop takes the remainder")


@pytest.mark.parametrize("loops", [1, 2, 6])
@pytest.mark.parametrize("spec", CHOOSING, ids=str)
def test_the_output_is_the_weighted_sum_of_the_definition(spec, loops):
    rule, states = build(spec), random_states(loops)
    readings = run(rule, states)
    for row in range(2):
        for token in range(5):
            alone = [state[row, token] for state in states]
            weights = reference_weights(spec, rule, alone)
            assert sum(weights) == pytest.approx(1.0) or (sum(weights) < 1.0 and spec.get("form") == "universal")
            expected = sum(w * s for w, s in zip(weights, alone[1:], strict=True))
            torch.testing.assert_close(readings.output[row, token], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", CHOOSING, ids=str)
def test_tokens_halt_at_different_loops(spec):
    exits = run(build(spec), random_states(6)).exit_loops
    assert exits.min() >= 1
    assert exits.max() <= 6
    assert len(exits.unique()) > 1


@pytest.mark.parametrize("spec", CHOOSING, ids=str)
@pytest.mark.parametrize("loops", [1, 6])
def test_exit_probabilities_are_a_distribution_over_the_loops(spec, loops):
    readings = run(build(spec), random_states(loops))
    probabilities = torch.stack(readings.probabilities, dim=-1)
    assert probabilities.shape == (2, 5, loops)
    assert probabilities.dtype == torch.float32
    assert (probabilities >= 0).all()
    given = probabilities.sum(-1)
    if spec.get("form") == "universal":  # a token that has not halted gives no remainder
        assert (given <= 1 + 1e-6).all()
        given = given[(readings.exit_loops < loops) & (loops > 1)]
    torch.testing.assert_close(given, torch.ones_like(given))
    after_exit = torch.arange(1, loops + 1) > readings.exit_loops.unsqueeze(-1)
    if spec["type"] != "gate":  # whose distribution does not end where the token is read
        assert not probabilities[after_exit].any()


@pytest.mark.parametrize("num_loops", [1, 4])
def test_both_models_return_the_exit_probabilities_of_the_call(num_loops):
    for spec in CHOOSING:
        model, tokens = tiny_model(halting=spec), random_tokens()
        output = model(tokens, num_loops=num_loops)
        assert output.exit_probabilities.shape == (2, 7, num_loops)
        of_base = model.model(tokens, num_loops=num_loops).exit_probabilities
        assert torch.equal(of_base, output.exit_probabilities)


def test_off_is_bit_identical_to_full_depth():
    tokens = random_tokens()
    plain, gated = tiny_model(), LoopedForCausalLM(tiny_config(halting={"type": "gate", "threshold": 1.0})).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        gated.model.halting.bias.fill_(50.0)  # saturated: it would stop at once, were it asked
    assert torch.equal(plain(tokens).logits, gated(tokens).logits)


@pytest.mark.parametrize("spec", CHOOSING, ids=str)
def test_a_token_halts_alike_in_a_batch_alone_and_from_a_cache(spec):
    model, tokens = tiny_model(halting=spec), random_tokens(3, 9)
    together = model(tokens, num_loops=4)
    for row in range(3):
        alone = model(tokens[row : row + 1], num_loops=4)
        assert torch.equal(alone.exit_loops[0], together.exit_loops[row])
        first = model(tokens[row : row + 1, :4], num_loops=4, use_cache=True)
        rest = model(tokens[row : row + 1, 4:], num_loops=4, past_key_values=first.past_key_values)
        expected = together.logits[row : row + 1, 4:]
        torch.testing.assert_close(rest.logits, expected, atol=TOLERANCE[torch.float32], rtol=0)


def test_exit_loops_are_absent_where_nothing_chooses():
    output = tiny_model()(random_tokens())
    assert output.exit_loops is None
    assert output.exit_probabilities is None


def test_training_and_evaluation_read_the_same_state_and_the_gate_learns():
    model, tokens = tiny_model(halting={"type": "gate", "threshold": 0.6}), random_tokens()
    evaluated = model(tokens).logits
    model.train()
    trained = model(tokens, labels=tokens)
    assert torch.equal(trained.logits, evaluated)
    trained.loss.backward()
    assert model.model.halting.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("spec", CHOOSING, ids=str)
@pytest.mark.parametrize("num_loops", [1, 3])
def test_every_parameter_gets_a_gradient(spec, num_loops):
    model = tiny_model(halting=spec).train()
    model(random_tokens(), labels=random_tokens(), num_loops=num_loops).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "gate", "threshold": 1.5}, r"threshold=1.5 must lie in \(0, 1\]"),
        ({"type": "gate", "output": "mean"}, "output='mean' must be one of"),
        ({"type": "act", "threshold": 1.0}, "threshold=1.0 must lie strictly between"),
        ({"type": "act", "form": "adaptive"}, "form='adaptive' must be one of: graves, universal"),
        ({"type": "state_change", "threshold": -1.0}, "threshold=-1.0 must not be negative"),
        ({"type": "state_change", "min_loops": 0}, "min_loops=0 must be an integer of at least 1"),
    ],
)
def test_bad_parameters_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        LoopedConfig(halting=spec)
