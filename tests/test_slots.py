"""The slot arithmetic: execution order, its inverse, and what the model, its modules and its caches make of it."""

import dataclasses
import operator

import numpy as np
import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_looped import LoopedModel, SlotLayout
from modeling_looped.layers import LoopedDecoderLayer
from modeling_looped.slots import checked_num_loops

#: Layers of the core, and of each group of it that loops by itself.
cores = st.sampled_from([(0, None), (0, 1), (1, None), (2, None), (2, 1), (3, 3), (4, None), (4, 1), (4, 2)])
layouts = st.builds(
    lambda core, **counts: SlotLayout(core=core[0], group_size=core[1], **counts),
    cores,
    prelude=st.integers(0, 4),
    coda=st.integers(0, 4),
    loops=st.integers(1, 6),
    shares_key_values=st.booleans(),
).filter(lambda layout: layout.stored_layers > 0)
modest = settings(max_examples=200, deadline=None, derandomize=True)


def executed(layout: SlotLayout) -> list[tuple[int, int]]:
    """(layer, loop) in the order of execution, written out."""
    core = []
    for group in core_groups(layout):
        for loop in range(layout.loops):
            core += [(layer, loop) for layer in group]
    coda = [(layout.prelude + layout.core + i, 0) for i in range(layout.coda)]
    return [(i, 0) for i in range(layout.prelude)] + core + coda


def core_groups(layout: SlotLayout) -> list[list[int]]:
    """The stored layers of each group of the core."""
    layers = [layout.prelude + i for i in range(layout.core)]
    size = layout.group_size or max(layout.core, 1)
    return [layers[start : start + size] for start in range(0, layout.core, size)]


def owners(layout: SlotLayout) -> list[tuple[int, int]]:
    """(layer, loop) that first fills each slot: every invocation, or, where loops share, every layer's first."""
    return [(layer, loop) for layer, loop in executed(layout) if loop == 0 or not layout.shares_key_values]


@modest
@given(layouts)
def test_slots_count_in_the_order_of_execution(layout):
    assert layout.num_invocations == len(executed(layout))
    assert layout.num_slots == len(owners(layout))
    assert [layout.slot(layer, loop) for layer, loop in owners(layout)] == list(range(layout.num_slots))


@modest
@given(layouts)
def test_where_loops_share_every_loop_of_a_layer_has_its_slot(layout):
    for layer, loop in executed(layout):
        assert (layout.slot(layer, loop) == layout.slot(layer)) == (loop == 0 or layout.shares_key_values)
    if layout.shares_key_values:
        assert layout.num_slots == layout.stored_layers
        assert [layout.slot(layer) for layer in range(layout.stored_layers)] == list(range(layout.stored_layers))


@modest
@given(layouts)
def test_layer_and_loop_is_the_inverse_of_slot(layout):
    assert [layout.layer_and_loop(slot) for slot in range(layout.num_slots)] == owners(layout)
    assert [layout.invocation(index) for index in range(layout.num_invocations)] == executed(layout)


@modest
@given(layouts)
def test_ranges_cover_the_stored_layers_in_order(layout):
    prelude, core, coda = layout.stored_ranges()
    assert [*prelude, *core, *coda] == list(range(layout.stored_layers))
    assert (len(prelude), len(core), len(coda)) == (layout.prelude, layout.core, layout.coda)


@modest
@given(layouts)
def test_expanding_gives_every_slot_its_layers_value(layout):
    names = [f"layer {i}" for i in range(layout.stored_layers)]
    assert layout.expand(names) == [names[layer] for layer, _ in owners(layout)]


@modest
@given(layouts)
def test_turns_are_the_core_in_the_order_of_execution(layout):
    turns = layout.turns()
    assert [(layer, turn.loop) for turn in turns for layer in turn.layers] == [
        (layer, loop) for layer, loop in executed(layout) if layer in layout.stored_ranges()[1]
    ]
    assert [list(turn.layers) for turn in turns] == [g for g in core_groups(layout) for _ in range(layout.loops)]


@modest
@given(layouts.filter(lambda layout: not layout.shares_key_values), st.data())
def test_a_cut_keeps_the_turns_that_start_before_it(layout, data):
    cut = data.draw(st.integers(0, layout.num_slots))
    running = executed(layout)[:cut]
    started = [turn for turn in layout.turns() if (turn.layers[0], turn.loop) in running]
    assert layout.turns(cut) == started


@modest
@given(layouts, st.integers(-3, 30), st.integers(-3, 10))
def test_addresses_outside_are_refused_by_name_and_range(layout, layer, loop):
    if (layer, loop) in executed(layout):
        first = 0 if layout.shares_key_values else loop
        assert layout.layer_and_loop(layout.slot(layer, loop)) == (layer, first)
    else:
        with pytest.raises(IndexError, match=r"(layer|loop)=-?\d+ .*must lie in 0"):
            layout.slot(layer, loop)


@modest
@given(layouts)
def test_slots_outside_are_refused_by_name_and_range(layout):
    for slot in (-1, layout.num_slots):
        with pytest.raises(IndexError, match=rf"slot={slot} must lie in 0..{layout.num_slots - 1}"):
            layout.layer_and_loop(slot)


def test_the_layout_of_the_documentation():
    layout = SlotLayout(prelude=2, core=3, coda=1, loops=4)
    assert layout.num_slots == 2 + 3 * 4 + 1
    assert layout.slot(1) == 1
    assert layout.slot(2 + 1, loop=2) == 2 + 2 * 3 + 1
    assert layout.slot(5) == 2 + 4 * 3


def test_groups_run_one_after_the_other():
    """aa bb cc for groups of one; ab ab cd cd for groups of two."""
    letters, whole = "pabcde", "pabcdabcdabcde"
    for group_size, expected in ((1, "paaabbbcccddde"), (2, "pabababcdcdcde"), (4, whole), (None, whole)):
        layout = SlotLayout(prelude=1, core=4, coda=1, loops=3, group_size=group_size)
        assert "".join(layout.expand(list(letters))) == expected
        shared = dataclasses.replace(layout, shares_key_values=True)
        assert "".join(shared.expand(list(letters))) == letters


def test_the_config_asks_the_layout():
    config = tiny_config()
    assert config.slot_layout() == SlotLayout(1, 2, 1, 3)
    assert config.slot_layout(5) == SlotLayout(1, 2, 1, 5)
    assert [config.slot_of(loop, 2) for loop in range(3)] == [2, 4, 6]
    assert config.num_stored_layers == 4
    assert [config.is_core_layer(layer) for layer in range(-1, 5)] == [False, False, True, True, False, False]
    shared = tiny_config(kv_sharing="first_loop")
    assert shared.slot_layout() == SlotLayout(1, 2, 1, 3, None, True)
    assert [shared.slot_of(loop, 2) for loop in range(3)] == [2, 2, 2]
    sequence = tiny_config(core_group_size=1, injection="none", state_init="input")
    assert sequence.slot_layout() == SlotLayout(1, 2, 1, 3, 1)
    assert [sequence.slot_of(loop, 2) for loop in range(3)] == [4, 5, 6]


@pytest.mark.parametrize("good", [1, 7, np.int64(3), torch.tensor(2), torch.tensor([4])], ids=repr)
def test_any_integer_is_a_loop_count(good):
    checked = checked_num_loops(good)
    assert type(checked) is int
    assert checked == operator.index(good)


@pytest.mark.parametrize(
    "bad", [0, -1, True, False, 2.0, "3", None, torch.tensor(1.5), torch.tensor([1, 2])], ids=repr
)
def test_nothing_else_is_a_loop_count(bad):
    with pytest.raises(ValueError, match=r"num_loops=.* must be an integer of at least 1"):
        checked_num_loops(bad)


def visits(model: torch.nn.Module, **inputs) -> list[tuple[int, int, int]]:
    """(stored layer, slot, loop) of every invocation of a layer, as forward hooks see them."""
    seen = []
    for module in model.modules():
        if isinstance(module, LoopedDecoderLayer):
            hook = lambda layer, args, kwargs: seen.append((layer.layer, args[1], args[2]))  # noqa: E731
            module.register_forward_pre_hook(hook, with_kwargs=True)
    model(random_tokens(), **inputs)
    return seen


@pytest.mark.parametrize("variant", ["parcae", "sequence", "shared"])
@pytest.mark.parametrize("num_loops", [1, 3, 5])
def test_the_model_runs_the_layout(num_loops, variant):
    model = tiny_model(**VARIANTS[variant])
    layout = model.config.slot_layout(num_loops)
    expected = [(layer, layout.slot(layer, loop), loop) for layer, loop in executed(layout)]
    assert visits(model, num_loops=num_loops) == expected


@pytest.mark.parametrize("variant", ["parcae", "sequence", "shared"])
@pytest.mark.parametrize("num_loops", [1, 3, 5])
def test_every_invocation_dispatches_attention_by_the_module_of_its_address(num_loops, variant):
    model = tiny_model(attn_implementation="eager", **VARIANTS[variant])
    config = model.config
    for layer in model.model.layers:
        loops = range(num_loops if config.is_core_layer(layer.layer) else 1)
        for loop in loops:
            slot = config.slot_layout(num_loops).slot(layer.layer, loop)
            dispatcher = layer.self_attn.slot(slot)
            assert dispatcher.layer_idx == slot
            assert dispatcher is layer.self_attn.slot(slot)
            assert list(dispatcher.parameters()) == []


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_dispatcher_carries_what_engines_read_from_an_attention_module(is_causal):
    types = ["full_attention", "sliding_attention"] * 2
    config = tiny_config(is_causal=is_causal, sliding_window=4, stored_layer_types=types)
    for layer in LoopedModel(config).layers:
        for dispatcher in layer.self_attn.slots:
            assert dispatcher.is_causal is is_causal
            assert dispatcher.scaling == config.head_dim**-0.5
            assert dispatcher.num_key_value_groups == 2
            assert dispatcher.sliding_window == config.sliding_window_of(layer.layer)
            assert dispatcher.config is config


@pytest.mark.parametrize("variant", ["parcae", "sequence", "shared"])
def test_engines_find_exactly_the_configured_slots_among_the_modules(variant):
    model = tiny_model(**VARIANTS[variant])
    model(random_tokens(), num_loops=6)  # more than it was built for
    found = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    assert sorted(found) == list(range(model.config.num_hidden_layers))


def test_two_loop_counts_at_once_do_not_disturb_each_other():
    model, tokens = tiny_model(), random_tokens()
    alone = {k: model(tokens, num_loops=k).logits for k in (2, 5)}
    caches = {k: model(tokens[:, :4], num_loops=k, use_cache=True).past_key_values for k in (2, 5)}
    for k in (5, 2):
        step = model(tokens[:, 4:], num_loops=k, past_key_values=caches[k]).logits
        torch.testing.assert_close(step, alone[k][:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("made_for", "used_with"), [(2, 3), (3, 2), (1, 5)])
def test_a_cache_made_for_another_loop_count_is_refused_with_both_sizes(made_for, used_with):
    model, tokens = tiny_model(), random_tokens()
    cache = model(tokens, num_loops=made_for, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=rf"num_loops={used_with} needs a cache of {2 + 2 * used_with} slots.*has {2 + 2 * made_for}"
    ):
        model(tokens[:, :1], num_loops=used_with, past_key_values=cache)
    assert cache.get_seq_length() == tokens.shape[1], "a refused call must not have written"


def test_foreign_loop_names_are_refused_in_forward():
    model = tiny_model()
    for name in ("num_steps", "total_ut_steps", "loops"):
        with pytest.raises(TypeError, match=rf"forward\(\).*{name}.*num_loops"):
            model(random_tokens(), **{name: 2})


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True], ids=repr)
def test_a_bad_loop_count_is_refused_in_forward(bad):
    with pytest.raises(ValueError, match=r"num_loops=.* must be an integer of at least 1"):
        tiny_model()(random_tokens(), num_loops=bad)
