"""Each strategy by itself computes the equation in its docstring, on numbers small enough to check by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import entering, random_tokens, tiny_config

from modeling_looped import LoopedForCausalLM
from modeling_looped.conditioning import LOOP_CONDITIONINGS
from modeling_looped.injection import INJECTIONS
from modeling_looped.loop_adapter import LoopLoRA
from modeling_looped.loop_update import LOOP_UPDATES
from modeling_looped.readout import READOUTS
from modeling_looped.registry import BuildContext, Strategy, table_row

WIDTH = 4
CONTEXT = BuildContext(hidden_size=WIDTH, num_core_layers=1, initializer_range=0.02, rms_norm_eps=1e-5)
STATE = torch.tensor([[[1.0, -2.0, 3.0, 0.5]]])
PRELUDE = torch.tensor([[[0.5, 4.0, -1.0, 2.0]]])
OUTPUT = torch.tensor([[[2.0, 2.0, -5.0, 0.0]]])
POSITIONS = torch.tensor([[5]])


def build(registry, spec: str | dict, *, num_loops: int = 3, context: BuildContext = CONTEXT) -> Strategy:
    module = registry.build(registry.normalise(spec, num_loops=num_loops), context)
    with torch.no_grad():
        module.init_weights()
    return module


def fill(parameter: torch.Tensor, value: float | torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))


def test_none_injects_nothing():
    assert torch.equal(entering(build(INJECTIONS, "none"), PRELUDE, STATE), STATE)


def test_add_injects_the_sum():
    assert torch.equal(entering(build(INJECTIONS, "add"), PRELUDE, STATE), STATE + PRELUDE)


@pytest.mark.parametrize(("start", "expected"), [("state", STATE), ("prelude", PRELUDE)])
def test_concat_can_start_by_passing_one_side_on(start, expected):
    assert torch.equal(entering(build(INJECTIONS, {"type": "concat", "start": start}), PRELUDE, STATE), expected)


def test_concat_multiplies_the_state_by_its_first_columns_and_the_prelude_by_its_last():
    injection = build(INJECTIONS, "linear")
    fill(injection.weight, torch.cat((2 * torch.eye(WIDTH), 10 * torch.eye(WIDTH)), dim=1))
    torch.testing.assert_close(entering(injection, PRELUDE, STATE), 2 * STATE + 10 * PRELUDE)


@pytest.mark.parametrize("training", [False, True])
def test_concat_may_skip_its_matrix_in_the_first_loop(training):
    injection = build(INJECTIONS, {"type": "concat", "start": "state", "first_loop": "skip"}).train(training)
    assert torch.equal(entering(injection, PRELUDE, STATE), PRELUDE)
    for later in (1, 2, 7):
        assert torch.equal(entering(injection, PRELUDE, STATE, later), STATE)


#: A state of three channels behind a prelude of four.
NARROW = dataclasses.replace(CONTEXT, hidden_size=3, outer_size=WIDTH)


def test_injections_and_readout_map_between_two_widths():
    """[D_state, D_prelude] in, [D_prelude, D_state] out; where they start as the identity, its upper left corner."""
    state = torch.tensor([[[1.0, -2.0, 3.0]]])
    specs = {
        "concat": ({"type": "concat", "start": "state"}, state),
        "prelude": ({"type": "concat", "start": "prelude"}, PRELUDE[..., :3]),
        "diagonal": ({"type": "diagonal", "initial_decay": 0.25}, 0.25 * state + math.log(4) * PRELUDE[..., :3]),
    }
    for name, (spec, expected) in specs.items():
        injection = build(INJECTIONS, spec, context=NARROW)
        torch.testing.assert_close(
            entering(injection, PRELUDE, state), expected, msg=lambda text, n=name: f"{n}: {text}"
        )
    readout = build(READOUTS, "linear", context=NARROW)
    assert readout.weight.shape == (4, 3)
    assert torch.equal(readout(state), torch.tensor([[[1.0, -2.0, 3.0, 0.0]]]))


def test_concat_starts_with_the_spread_of_the_models_initialisation():
    config = tiny_config(injection="concat", initializer_range=0.3, hidden_size=64)
    weight = LoopedForCausalLM(config).model.injection.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_diagonal_euler_is_the_published_system_and_starts_with_the_identity_for_b():
    injection = build(INJECTIONS, {"type": "diagonal", "initial_decay": 0.25})
    step = math.log(4)  # exp(-step) = 0.25
    torch.testing.assert_close(entering(injection, PRELUDE, STATE), 0.25 * STATE + step * PRELUDE)


def test_diagonal_zero_order_hold_keeps_a_constant_input_constant():
    """With A = -1 and B = I the exact hold is decay * s + (1 - decay) * e."""
    injection = build(INJECTIONS, {"type": "diagonal", "initial_decay": 0.25, "input_matrix": "zoh"})
    torch.testing.assert_close(entering(injection, PRELUDE, STATE), 0.25 * STATE + 0.75 * PRELUDE)
    torch.testing.assert_close(entering(injection, PRELUDE, PRELUDE), PRELUDE)


@pytest.mark.parametrize("input_matrix", ["euler", "zoh"])
def test_diagonal_reads_the_prelude_through_b(input_matrix):
    injection = build(INJECTIONS, {"type": "diagonal", "input_matrix": input_matrix})
    through_identity = entering(injection, PRELUDE, torch.zeros_like(STATE))
    swap = torch.eye(WIDTH).flip(0)
    fill(injection.B, swap)
    torch.testing.assert_close(entering(injection, PRELUDE, torch.zeros_like(STATE)), through_identity.flip(-1))


def test_replace_takes_the_output():
    assert torch.equal(build(LOOP_UPDATES, "replace")(STATE, OUTPUT, 0, 3), OUTPUT)


@pytest.mark.parametrize(("steps", "num_loops", "k"), [(None, 4, 4), (None, 1, 1), (2, 7, 2), (8, 1, 8)])
def test_damped_takes_a_kth_of_the_step(steps, num_loops, k):
    update = build(LOOP_UPDATES, {"type": "damped", "steps": steps})
    for loop_idx in range(num_loops):
        expected = (1 - 1 / k) * STATE + OUTPUT / k
        torch.testing.assert_close(update(STATE, OUTPUT, loop_idx, num_loops), expected)


def test_damped_at_one_loop_is_bit_exactly_replace():
    state, output = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    assert torch.equal(build(LOOP_UPDATES, "damped")(state, output, 0, 1), output)


def test_learned_scale_moves_by_its_own_scale_in_every_loop_and_channel():
    update = build(LOOP_UPDATES, {"type": "learned_scale", "initial_scale": 0.5, "table_loops": 2})
    torch.testing.assert_close(update(STATE, OUTPUT, 1, 9), (STATE + OUTPUT) / 2)
    fill(update.scale, torch.tensor([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(update(STATE, OUTPUT, 0, 9), torch.tensor([[[1.0, 2.0, -13.0, 1.0]]]))
    for beyond in (1, 2, 8):
        torch.testing.assert_close(update(STATE, OUTPUT, beyond, 9), torch.tensor([[[2.0, -2.0, 3.0, 0.5]]]))


def test_gated_mixes_by_its_gate_and_leaves_the_free_loops_alone():
    update = build(LOOP_UPDATES, {"type": "gated", "initial_gate": 0.25, "free_loops": 2})
    for loop_idx in (0, 1):
        torch.testing.assert_close(update(STATE, OUTPUT, loop_idx, 4), OUTPUT)
    for loop_idx in (2, 3, 9):
        torch.testing.assert_close(update(STATE, OUTPUT, loop_idx, 4), 0.75 * STATE + 0.25 * OUTPUT)


@pytest.mark.parametrize("num_loops", [1, 2])
def test_a_gate_that_never_opens_gets_a_gradient_of_zeros(num_loops):
    """As DistributedDataParallel and the Trainer expect of every parameter."""
    model = LoopedForCausalLM(tiny_config(loop_update={"type": "gated", "free_loops": 2})).train()
    model(random_tokens(), labels=random_tokens(), num_loops=num_loops).loss.backward()
    assert not model.model.loop_update.gate.grad.any()


@pytest.mark.parametrize(
    ("spec", "num_loops", "expected"),
    [
        ("replace", 5, True),
        ("damped", 1, True),
        ("damped", 2, False),
        ({"type": "damped", "steps": 1}, 5, True),
        ({"type": "damped", "steps": 2}, 1, False),
        ("learned_scale", 1, False),
        ("gated", 1, False),
        ({"type": "gated", "free_loops": 2}, 2, True),
        ({"type": "gated", "free_loops": 2}, 3, False),
    ],
)
def test_an_update_says_truly_whether_it_only_replaces(spec, num_loops, expected):
    update = build(LOOP_UPDATES, spec)
    assert update.is_replace(num_loops) is expected
    if expected:
        for loop_idx in range(num_loops):
            assert torch.equal(update(STATE, OUTPUT, loop_idx, num_loops), OUTPUT)


def test_the_loop_embedding_starts_at_zero_and_adds_its_row():
    conditioning = build(LOOP_CONDITIONINGS, {"type": "embedding", "table_loops": 2})
    assert torch.equal(conditioning(STATE, 1, POSITIONS), STATE)
    fill(conditioning.embedding, torch.tensor([[1.0] * WIDTH, [10.0] * WIDTH]))
    assert torch.equal(conditioning(STATE, 0, POSITIONS), STATE + 1)
    assert torch.equal(conditioning(STATE, 1, POSITIONS), STATE + 10)
    assert torch.equal(conditioning(STATE, 7, POSITIONS), STATE + 10)


def test_the_time_signal_is_the_universal_transformers():
    """Timescales run geometrically from 1 to 10^4; sines fill the first half of the channels, cosines the second."""
    conditioning = build(LOOP_CONDITIONINGS, {"type": "sinusoidal", "scale": 2.0})
    for t in (0, 1, 6):
        signal = [math.sin(t), math.sin(t * 1e-4), math.cos(t), math.cos(t * 1e-4)]
        torch.testing.assert_close(conditioning(STATE, t, POSITIONS), STATE + 2.0 * torch.tensor(signal))


def test_the_signal_of_the_position_is_added_in_every_loop():
    conditioning = build(LOOP_CONDITIONINGS, {"type": "sinusoidal", "scale": 2.0, "positions": "every_loop"})
    for t in (0, 3):
        signal = [math.sin(t), math.sin(t * 1e-4), math.cos(t), math.cos(t * 1e-4)]
        place = [math.sin(5), math.sin(5e-4), math.cos(5), math.cos(5e-4)]
        expected = STATE + 2.0 * (torch.tensor(signal) + torch.tensor(place))
        torch.testing.assert_close(conditioning(STATE, t, POSITIONS), expected)


def test_only_per_loop_norms_ask_for_rows_of_norm_weights():
    rows = {name: build(LOOP_CONDITIONINGS, name, num_loops=5).norm_rows for name in LOOP_CONDITIONINGS}
    assert rows.pop("norms") == 5
    assert set(rows.values()) == {None}


def test_per_loop_norms_share_every_projection():
    plain = LoopedForCausalLM(tiny_config()).state_dict()
    rows = LoopedForCausalLM(tiny_config(loop_conditioning="norms")).state_dict()
    assert plain.keys() == rows.keys()
    differing = {key for key in plain if plain[key].shape != rows[key].shape}
    core_norms = {key for key in plain if "norm" in key and any(f"layers.{i}." in key for i in (1, 2))}
    assert differing == core_norms
    assert all(rows[key].shape == (3, *plain[key].shape) for key in core_norms)


def loop_lora(**options: Any) -> LoopLoRA:
    adapter = LoopLoRA(3, 2, rank=1, scale=2.0, table_loops=2, **options)
    rows = len(adapter.loops)
    fill(adapter.A, torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])[-rows:])
    fill(adapter.B, torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])[-rows:])
    return adapter


INPUTS, SHARED = torch.tensor([5.0, 7.0, 11.0]), torch.tensor([100.0, 200.0])


def test_the_loop_lora_adds_the_low_rank_difference_of_its_loop():
    adapter = loop_lora()
    torch.testing.assert_close(adapter(INPUTS, 0, SHARED), torch.tensor([110.0, 200.0]))
    for beyond in (1, 2, 6):
        torch.testing.assert_close(adapter(INPUTS, beyond, SHARED), torch.tensor([100.0, 214.0]))


def test_the_loop_lora_leaves_the_other_loops_alone():
    adapter = loop_lora(loops=[1]).eval()
    assert adapter(INPUTS, 0, SHARED) is SHARED
    torch.testing.assert_close(adapter(INPUTS, 5, SHARED), torch.tensor([100.0, 214.0]))


def test_in_training_the_loop_lora_of_other_loops_takes_part_without_effect():
    adapter = loop_lora(loops=[1], bias=True, initial_scale=1.0).train()
    adapter.init_weights()
    output = adapter(INPUTS, 0, SHARED)
    assert torch.equal(output, SHARED)
    output.sum().backward()
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_the_loop_lora_scales_what_is_shared():
    adapter = loop_lora(loops=[1], initial_scale=1.0)
    adapter.init_weights()
    torch.testing.assert_close(adapter(INPUTS, 1, SHARED), SHARED)
    fill(adapter.shared_scale, torch.tensor([[0.5, 0.0]]))
    fill(adapter.B, torch.tensor([[[0.0], [1.0]]]))
    fill(adapter.A, torch.tensor([[[0.0, 1.0, 0.0]]]))
    torch.testing.assert_close(adapter(INPUTS, 1, SHARED), torch.tensor([50.0, 14.0]))


@pytest.mark.parametrize("options", [{}, {"loops": [1]}, {"initial_scale": 1.0}, {"bias": True, "initial_scale": 0.0}])
def test_what_a_loop_lora_merges_is_what_it_does(options):
    adapter = LoopLoRA(3, 2, rank=1, scale=2.0, table_loops=3, **options)
    for parameter in adapter.parameters():
        fill(parameter, torch.randn(parameter.shape))
    weight, bias = torch.randn(2, 3), torch.randn(2)
    for loop in range(4):
        merged = adapter.merged(weight, loop) @ INPUTS + adapter.merged_bias(bias, loop)
        torch.testing.assert_close(merged, adapter(INPUTS, loop, weight @ INPUTS + bias))


def test_the_loop_lora_starts_without_a_difference_at_the_scale_alpha_over_rank():
    config = tiny_config(loop_adapter={"type": "lora", "rank": 4, "alpha": 6.0, "targets": ["q_proj", "down_proj"]})
    model = LoopedForCausalLM(config).model
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoopLoRA)}
    expected = {
        f"layers.{i}.{part}"
        for i in (1, 2)
        for part in ("self_attn.loop_adapters.q_proj", "mlp.loop_adapters.down_proj")
    }
    assert set(adapters) == expected
    for adapter in adapters.values():
        assert adapter.scale == 1.5
        assert not adapter.B.any()
        assert 0 < adapter.A.abs().max() <= 1 / math.sqrt(adapter.A.shape[-1])


def test_the_linear_readout_starts_as_the_identity_and_multiplies():
    readout = build(READOUTS, "linear")
    assert torch.equal(readout(STATE), STATE)
    fill(readout.weight, torch.eye(WIDTH).flip(0))
    assert torch.equal(readout(STATE), STATE.flip(-1))
    assert torch.equal(build(READOUTS, "none")(STATE), STATE)


def test_loops_beyond_a_table_use_its_last_row():
    assert [table_row(loop, 3) for loop in range(6)] == [0, 1, 2, 2, 2, 2]
