"""What a forward returns beside the logits, what hooks see of it, and that evaluation is deterministic."""

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_model

from modeling_looped import LoopedForCausalLM


def capture_by_slot(model: LoopedForCausalLM) -> dict[int, tuple[int, int, torch.Tensor]]:
    """Hook every layer the documented way; what it fills: slot -> (layer, loop, output)."""
    captured: dict[int, tuple[int, int, torch.Tensor]] = {}

    def hook(layer, args, output):
        _, slot, loop_idx = args
        captured[slot] = (layer.layer, loop_idx, output)

    for layer in model.model.layers:
        layer.register_forward_hook(hook)
    return captured


@pytest.mark.parametrize("variant", ["parcae", "sequence"])
@pytest.mark.parametrize("num_loops", [1, 3, 5])
@torch.no_grad()
def test_hooks_see_which_slot_and_loop_they_are_in(num_loops, variant):
    model = tiny_model(**VARIANTS[variant])
    captured = capture_by_slot(model)
    model(random_tokens(), num_loops=num_loops)
    layout = model.config.slot_layout(num_loops)
    assert list(captured) == list(range(layout.num_slots)), "every slot once, in ascending order"
    for slot, (layer, loop_idx, _) in captured.items():
        assert (layer, loop_idx) == layout.layer_and_loop(slot)
    assert captured[1][2] is not captured[2][2]


@pytest.mark.parametrize("of", ["base", "causal"])
@pytest.mark.parametrize("num_loops", [1, 5])
@pytest.mark.parametrize("variant", ["in_place", "sandwich", "huginn", "halting_act", "stacked", "sequence", "shared"])
@torch.no_grad()
def test_hidden_states_are_the_outputs_of_the_invocations(variant, num_loops, of):
    model = tiny_model(**VARIANTS[variant])
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    tokens = random_tokens()
    embeddings = model.get_input_embeddings()(tokens) * model.config.embedding_scale
    run = model if of == "causal" else model.model
    states = run(tokens, num_loops=num_loops, output_hidden_states=True).hidden_states
    assert len(states) == model.config.slot_layout(num_loops).num_invocations + 1
    assert torch.equal(states[0], embeddings)
    for state, output in zip(states[1:-1], outputs, strict=False):
        # where loops share keys and values, these come with the residual stream
        assert torch.equal(state, output[0] if isinstance(output, tuple) else output)
    # as in every Transformers model, the last one is what the head reads
    assert torch.equal(states[-1], model.model(tokens, num_loops=num_loops).last_hidden_state)
    assert torch.equal(model.to_logits(states[-1]), model(tokens, num_loops=num_loops).logits)


@pytest.mark.parametrize("num_loops", [None, 1, 5])
@pytest.mark.parametrize("selected", [-1, 2, [-1], [0, -2], [3, 4]])
@pytest.mark.parametrize("variant", ["parcae", "shared"])
@torch.no_grad()
def test_selected_hidden_states_are_those_of_the_whole_list(variant, selected, num_loops):
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens()
    everything = model(tokens, num_loops=num_loops, output_hidden_states=True).hidden_states
    some = model(tokens, num_loops=num_loops, output_hidden_states=selected).hidden_states
    chosen = {range(len(everything))[i] for i in (selected if isinstance(selected, list) else [selected])}
    assert len(some) == len(everything)
    for index, (one, other) in enumerate(zip(some, everything, strict=True)):
        assert one is None if index not in chosen else torch.equal(one, other)


@pytest.mark.parametrize("num_loops", [1, 3, 5])
@pytest.mark.parametrize("variant", ["parcae", "sliding", "halting_act", "shared"])
@torch.no_grad()
def test_eager_attention_returns_the_weights_of_every_invocation(variant, num_loops):
    model = tiny_model(attn_implementation="eager", **VARIANTS[variant])
    tokens = random_tokens(2, 9)
    weights = model(tokens, num_loops=num_loops, output_attentions=True).attentions
    layout = model.config.slot_layout(num_loops)
    types = [model.config.stored_layer_type(layout.invocation(index).layer) for index in range(layout.num_invocations)]
    assert len(weights) == len(types)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for kind, of_slot in zip(types, weights, strict=True):
        assert of_slot.shape == (2, 4, 9, 9)
        assert_close(of_slot.sum(-1), torch.ones(2, 4, 9))
        assert of_slot[..., future].abs().max() == 0
        beyond = torch.ones(9, 9, dtype=torch.bool).tril(-4)
        assert (of_slot[..., beyond].abs().max() == 0) == (kind == "sliding_attention")


@pytest.mark.parametrize("num_loops", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_loop_hidden_states_are_the_state_before_and_after_each_loop(variant, num_loops):
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens()
    if variant == "stacked":
        assert model(tokens, output_loop_hidden_states=True).loop_hidden_states is None
        return
    states = model(tokens, num_loops=num_loops, output_loop_hidden_states=True).loop_hidden_states
    of_base = model.model(tokens, num_loops=num_loops, output_loop_hidden_states=True).loop_hidden_states
    groups = model.config.num_core_layers // (model.config.core_group_size or model.config.num_core_layers)
    assert len(states) == len(of_base) == groups * num_loops + 1
    assert all(torch.equal(one, other) for one, other in zip(states, of_base, strict=True))
    streams = (2,) if variant in ("mhc", "hyperloop") else ()
    assert all(state.shape == (2, 7, *streams, model.config.state_size) for state in states)
    assert model(tokens, num_loops=num_loops).loop_hidden_states is None
    # the recurrence: the last state of a shorter run is the state of the longer one at that loop
    # but a damped step depends on the number of loops, and a group's loops come before the next group's
    if model.config.loop_update["type"] != "damped" and groups == 1:
        for loops in range(1, num_loops):
            shorter = model(tokens, num_loops=loops, output_loop_hidden_states=True).loop_hidden_states
            assert torch.equal(shorter[-1], states[loops])


@torch.no_grad()
def test_a_given_initial_state_is_the_first_loop_state():
    model = tiny_model()
    tokens, start = random_tokens(), torch.randn(2, 7, 32)
    states = model(tokens, initial_state=start, output_loop_hidden_states=True).loop_hidden_states
    assert torch.equal(states[0], start)
    resumed = model(tokens, num_loops=2, initial_state=states[1]).logits
    assert_close(resumed, model(tokens, num_loops=3, initial_state=start).logits, atol=0)


@torch.no_grad()
def test_a_tuple_holds_the_same_as_the_named_output():
    model = tiny_model(attn_implementation="eager")
    tokens = random_tokens()
    kwargs = {"output_hidden_states": True, "output_attentions": True, "output_loop_hidden_states": True}
    named = model(tokens, **kwargs).to_tuple()
    plain = model(tokens, return_dict=False, **kwargs)
    assert torch.equal(plain[0], named[0])
    assert [type(item) for item in plain] == [type(item) for item in named]


def test_generate_returns_the_hidden_states_of_every_step():
    model = tiny_model(attn_implementation="eager")
    output = model.generate(
        random_tokens(),
        max_new_tokens=3,
        eos_token_id=-1,
        num_loops=5,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_logits=True,
    )
    assert [len(step) for step in output.hidden_states] == [13] * 3
    assert [len(step) for step in output.attentions] == [12] * 3
    assert [step[0].shape[1] for step in output.hidden_states] == [7, 1, 1]


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=["last", "last three", "chosen"])
@torch.no_grad()
def test_logits_to_keep_keeps_those(keep):
    model = tiny_model()
    tokens = random_tokens()
    everything = model(tokens).logits
    index = keep if isinstance(keep, torch.Tensor) else torch.arange(7 - keep, 7)
    assert_close(model(tokens, logits_to_keep=keep).logits, everything[:, index])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_evaluation_is_deterministic_and_draws_no_random_numbers(variant):
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(3, 9)
    before = torch.get_rng_state()
    first = model(tokens).logits
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(model(tokens).logits, first)
    # ... and does not depend on who else is in the batch, or on what follows
    assert_close(model(tokens[1:2]).logits[0], first[1])
    assert_close(model(tokens[[2, 0, 0, 1]]).logits, first[[2, 0, 0, 1]])
    assert_close(model(tokens[:, :5]).logits, first[:, :5])
