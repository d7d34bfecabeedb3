"""Layer plans: what they name, what they refuse, and what is found from activations."""

import copy

import pytest
import torch
from helpers import random_tokens
from hypothesis import given
from hypothesis import strategies as st
from random_configs import modest
from teachers import tiny_teacher

from modeling_looped.conversion.calibration import Calibration, calibrate
from modeling_looped.conversion.layer_drops import cheapest_drops, without_layers
from modeling_looped.conversion.layer_plan import (
    LayerPlan,
    fitting_plan,
    kept_plan,
    parse_layers,
    shared_plan,
    written,
)
from modeling_looped.conversion.plan_search import (
    cheapest_and_looped,
    droppable_block,
    dropped_and_looped,
    knee,
    least_influential,
    middle_by_knee,
    most_similar_groups,
    shared_middle,
)
from modeling_looped.conversion.verification import mean_loss

parts = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4))


@modest
@given(parts, st.sampled_from(["cycle", "sequence"]))
def test_a_shared_plan_executes_the_teachers_layers_in_order(sizes, order):
    prelude, core, coda, loops = sizes
    plan = shared_plan(prelude, core, coda, loops, order=order)
    assert plan.executed == tuple(range(prelude + core * loops + coda))
    assert (plan.num_loops, plan.num_stored_layers) == (loops, prelude + core + coda)
    assert plan.dropped(len(plan.executed)) == []


def test_orders_group_other_layers():
    assert shared_plan(1, 2, 0, 3).core == ((1, 3, 5), (2, 4, 6))
    assert shared_plan(1, 2, 0, 3, order="sequence").core == ((1, 2, 3), (4, 5, 6))


@modest
@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_written_layers_parse_back(layers):
    assert list(parse_layers(written(layers).replace("none", ""))) == layers


@pytest.mark.parametrize("text", ["3-1", "a", "1-2-3", "1;2"])
def test_text_that_is_no_layers_is_refused(text):
    with pytest.raises(ValueError, match=r"layers=.* must be a number or an ascending range"):
        parse_layers(text)


def test_sizes_that_do_not_divide_name_the_nearest_that_do():
    with pytest.raises(ValueError, match=r"= 29 must be the teacher's 30 layers; nearest with 3 loops: ") as error:
        fitting_plan(30, 5, 6, 6, 3, order="cycle")
    nearest = str(error.value).split("loops: ")[1].split(". ")[0].split(", ")
    assert len(nearest) == 3
    for choice in nearest:
        prelude, core, coda = map(int, choice.split("/"))
        assert prelude + 3 * core + coda == 30
        fitting_plan(30, prelude, core, coda, 3, order="cycle")


def test_a_kept_plan_loops_layers_that_are_kept():
    plan = kept_plan([0, 1, 2, 7, 8, 9], [2, 7], 3)
    assert plan == LayerPlan((0, 1), ((2, 2, 2), (7, 7, 7)), (8, 9))
    assert plan.dropped(10) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="must follow one another"):
        kept_plan([0, 1, 2, 7], [1, 7], 2)
    with pytest.raises(ValueError, match="must be some of the layers kept, 0-2"):
        kept_plan([0, 1, 2], [5], 2)


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="order='spiral' must be one of: cycle, sequence"):
        LayerPlan((), ((0,),), (), "spiral")
    with pytest.raises(ValueError, match="equally many for every layer"):
        LayerPlan((), ((0, 1), (2,)), ())
    with pytest.raises(ValueError, match="without a core nothing loops"):
        LayerPlan((0,), (), ())
    with pytest.raises(ValueError, match=r"layers \[6\] are not in the teacher, which has 0-5"):
        shared_plan(1, 2, 2, 2).check(6)


def made_up(angles: list[float]) -> Calibration:
    """A teacher whose layers turn the state by these angles (in units of pi), all in one plane."""
    positions = torch.tensor([0.0, *angles]).cumsum(0)
    return Calibration(torch.cos(torch.pi * (positions[:, None] - positions[None])), {}, 1)


def test_the_most_droppable_block_turns_the_state_least():
    calibration = made_up([0.1, 0.1, 0.01, 0.02, 0.01, 0.1])
    assert droppable_block(calibration, 3) == range(2, 5)
    assert least_influential(calibration, 2) == [2, 4]
    with pytest.raises(ValueError, match=r"size=6 must lie in 1\.\.5"):
        droppable_block(calibration, 6)


def test_the_knee_is_where_a_curve_bends_most():
    assert knee(torch.tensor([0.0, 0.8, 0.9, 0.95, 1.0])) == 1
    assert knee(torch.tensor([0.0, 0.4, 0.8, 0.9, 1.0])) == 2
    assert knee(torch.zeros(4)) == 0


def test_the_middle_begins_and_ends_where_layers_start_to_turn_little():
    calibration = made_up([0.1, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.1])
    assert middle_by_knee(calibration) == range(2, 9)
    plan = shared_middle(calibration, 2)
    assert (plan.prelude, plan.coda) == ((0, 1), (8, 9))
    assert plan.core == ((2, 5), (3, 6), (4, 7))


def test_groups_are_cut_where_the_state_turns():
    calibration = made_up([0.01, 0.01, 0.2, 0.01, 0.01, 0.01])
    assert most_similar_groups(calibration, 3, prelude=0, coda=0) == [range(2), range(2, 3), range(3, 6)]


def test_layers_around_the_gap_are_looped():
    calibration = made_up([0.1, 0.1, 0.01, 0.01, 0.1, 0.1])
    plan = dropped_and_looped(calibration, dropped=2, looped=2, loops=3)
    assert plan == LayerPlan((0,), ((1, 1, 1), (4, 4, 4)), (5,))


@pytest.mark.parametrize("family", ["llama", "qwen2-windows"])
def test_leaving_layers_out_equals_the_same_model_built_without_them(family):
    teacher = tiny_teacher(family)
    tokens = random_tokens(2, 9)
    whole = teacher(tokens).logits
    kept = [layer for layer in range(len(teacher.model.layers)) if layer not in (1, 2)]
    shorter = copy.deepcopy(teacher)
    shorter.model.layers = torch.nn.ModuleList(shorter.model.layers[layer] for layer in kept)
    shorter.config.num_hidden_layers = len(kept)
    if hasattr(shorter.config, "layer_types"):
        shorter.config.layer_types = [teacher.config.layer_types[layer] for layer in kept]
    with without_layers(teacher, [1, 2]):
        torch.testing.assert_close(teacher(tokens, use_cache=False).logits, shorter(tokens, use_cache=False).logits)
    assert torch.equal(teacher(tokens).logits, whole)  # and it is itself again
    windows = [tokens[:1], tokens[1:]]
    loss_without = calibrate(teacher, [tokens], layers=()).loss_without
    assert loss_without is not None
    assert loss_without([1, 2]) == pytest.approx(mean_loss(shorter, windows))


def test_the_cheapest_layers_are_dropped_one_by_one():
    """Of 6 layers that each save some loss, two of which only do so together."""
    worth = {0: 0.0, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.4, 5: 0.0}
    lines = []

    def loss(layers):
        return 1.0 + sum(worth[layer] for layer in layers) + (0.5 if {2, 3} <= set(layers) else 0.0)

    assert cheapest_drops(loss, 6, 2, report=lines.append) == [1, 3]
    assert [line.split(":")[0] for line in lines] == ["without layer 3 too, 1 of 2", "without layer 1 too, 2 of 2"]
    calibration = made_up([0.1] * 6)._replace(loss_without=loss)
    plan = cheapest_and_looped(calibration, dropped=2, looped=2, loops=2)
    assert plan == LayerPlan((), ((0, 0), (2, 2)), (4, 5))
    with pytest.raises(ValueError, match=r"count=5 must lie in 1\.\.4: the first and the last"):
        cheapest_drops(loss, 6, 5)
    with pytest.raises(ValueError, match="loss_without is None"):
        cheapest_and_looped(made_up([0.1] * 6), dropped=2, looped=2, loops=2)


def test_layers_that_cannot_loop_are_refused_before_the_search():
    asked: list[list[int]] = []

    def loss(layers):
        asked.append(list(layers))
        return 1.0

    calibration = made_up([0.1] * 6)._replace(loss_without=loss)
    with pytest.raises(ValueError, match=r"looped=5 must lie in 1\.\.4, the layers that are kept"):
        cheapest_and_looped(calibration, dropped=2, looped=5, loops=2)
    with pytest.raises(ValueError, match=r"count=9 must lie in 1\.\.4"):
        cheapest_and_looped(calibration, dropped=9, looped=2, loops=2)
    assert not asked


def test_calibration_measures_what_a_hook_on_every_layer_sees():
    """Against a plain loop: cosines token by token, moments row by row."""
    teacher = tiny_teacher("qwen3")
    windows = [random_tokens(1, 9), random_tokens(2, 5, seed=1)]
    calibration = calibrate(teacher, windows, layers=[2])
    states, inputs = [], []
    layer = teacher.model.layers[2]
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for window in windows:
            seen = []
            handles = [
                teacher.model.layers[0].register_forward_pre_hook(lambda module, args, s=seen: s.append(args[0]))
            ]
            handles += [
                each.register_forward_hook(lambda module, args, output, s=seen: s.append(output))
                for each in teacher.model.layers
            ]
            teacher(window)
            for each in handles:
                each.remove()
            states.append(torch.stack(seen).flatten(1, 2))
    handle.remove()
    states, rows = torch.cat(states, dim=1), torch.cat(inputs)
    assert calibration.tokens == 19
    for i in range(7):
        for j in range(7):
            expected = torch.cosine_similarity(states[i], states[j], dim=-1).mean()
            torch.testing.assert_close(calibration.similarity[i, j], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(calibration.moment(2, "down_proj"), rows.T @ rows / 19, atol=1e-4, rtol=1e-4)
    assert calibration.layers == {2}
    assert torch.equal(calibration.moment(2, "v_proj"), calibration.moment(2, "q_proj"))
    with pytest.raises(ValueError, match="windows is empty"):
        calibrate(teacher, [])
