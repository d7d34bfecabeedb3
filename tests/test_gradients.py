"""Gradients of a looped model.

Every parameter gets one, a shared weight's is the sum over the loops that used it, and truncated backpropagation cuts
exactly what lies before the last loops.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError

from modeling_looped import (
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
)
from modeling_looped.injection import INJECTIONS
from modeling_looped.loop_update import LOOP_UPDATES

MODES = (None, "layer", "loop")

#: Variants whose core is s <- layers(s) and whose prelude only starts the state, so that a stacked model can be their
#: unrolled copy.
PLAIN_LOOPS = {
    "pre": {},
    "sandwich": {"norm_placement": "sandwich", "qk_norm": "per_head"},
    "post_branch": {"norm_placement": "post_branch", "qk_norm": "flat", "attention_bias": True},
    "sliding": {"sliding_window": 4, "stored_layer_types": ["full_attention", "sliding_attention"] * 2},
}

#: Variants in which loops before the last can be cut off without cutting off the prelude.
TRUNCATABLE = [
    name
    for name, settings in VARIANTS.items()
    if settings.get("num_core_layers", 2)
    and INJECTIONS[tiny_config(**settings).injection["type"]].carries_prelude
    and settings.get("kv_sharing", "none") == "none"  # refused: later loops use no key or value projection
]

#: Where autocast leaves the state and the core's output in different dtypes: a state in fp32 meets the output of a
#: matrix product in half precision, or what a projection of the embeddings made meets the output of a norm in fp32.
NARROW = {"embedding_size": 16, "num_prelude_layers": 0, "prelude_norm": False, "state_init": "input"}
AUTOCAST_PLACEMENTS = {
    "pre": {"state_init": "input"},
    "sandwich": {"norm_placement": "sandwich", **NARROW},
    "post": {"norm_placement": "post", **NARROW},
    "post_branch": {"norm_placement": "post_branch", **NARROW},
}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trainable(mode: str | None, **overrides) -> torch.nn.Module:
    """A tiny model in training mode, with gradient checkpointing `mode`, the same at every call."""
    torch.manual_seed(0)
    model = tiny_model(checkpoint_granularity=mode or "layer", **overrides).train()
    if mode is not None:
        model.activation_checkpointing_enable()
    return model


def assert_all_gradients_at_every_loop_count(model: torch.nn.Module) -> None:
    """With fewer loops than the tables have rows, as many, and more; also rows that the run never reads."""
    tokens = random_tokens()
    for num_loops in (1, 3, 5):
        model.zero_grad()
        model(tokens, labels=tokens, num_loops=num_loops).loss.backward()
        assert [name for name, gradient in gradients(model).items() if gradient is None] == [], num_loops
        assert all(gradient.isfinite().all() for gradient in gradients(model).values()), num_loops


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    """With checkpointing they are the same to the last bit: `test_checkpointing.py`."""
    assert_all_gradients_at_every_loop_count(trainable(None, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", TRUNCATABLE)
def test_every_parameter_gets_a_gradient_when_truncated(variant):
    assert_all_gradients_at_every_loop_count(trainable(None, **{**VARIANTS[variant], "backprop_loops": 1}))


@pytest.mark.parametrize("backprop_loops", [None, 2])
@pytest.mark.parametrize("options", [{"loops": [1, 2]}, {"loops": [1]}, {"loops": [0, 2]}], ids=repr)
def test_an_adapter_of_some_loops_gets_a_gradient_where_none_of_them_runs(options, backprop_loops):
    adapter = {"type": "lora", "rank": 3, "shared_scale": "per_channel", "biases": "per_loop", **options}
    model = trainable(None, loop_adapter=adapter, attention_bias=True, backprop_loops=backprop_loops)
    assert_all_gradients_at_every_loop_count(model)


@pytest.mark.parametrize("placement", AUTOCAST_PLACEMENTS)
@pytest.mark.parametrize("loop_update", list(LOOP_UPDATES))
@pytest.mark.parametrize("injection", list(INJECTIONS))
def test_autocast_stays_near_fp32_and_gives_every_parameter_a_gradient(injection, loop_update, placement):
    model = trainable(None, injection=injection, loop_update=loop_update, **AUTOCAST_PLACEMENTS[placement])
    tokens = random_tokens()
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, labels=tokens)
    assert not torch.equal(output.logits.float(), expected)
    # on average: norms of the branches blow single rounding errors up, in every loop anew
    assert (output.logits.float() - expected).square().mean().sqrt() < TOLERANCE[torch.bfloat16]
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("loop_update", ["damped", "learned_scale", "gated"])
def test_autocast_keeps_a_state_that_moves_in_steps_in_fp32(loop_update):
    """Steps below half a unit of bf16 would leave the state where it is."""
    model = trainable(None, injection="concat", loop_update=loop_update)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(random_tokens(), output_loop_hidden_states=True).loop_hidden_states
    assert {state.dtype for state in states} == {torch.float32}


@pytest.mark.parametrize("backprop_loops", [1, 3, 9])
def test_truncation_that_would_cut_off_the_prelude_is_refused_for_every_loop_count(backprop_loops):
    refused = pytest.raises(StrictDataclassError, match=r"backprop_loops=\d.*injection='none'.*backprop_loops=None")
    with refused:
        tiny_config(**VARIANTS["in_place"], backprop_loops=backprop_loops)


@pytest.mark.parametrize(("loops", "backprop_loops"), [([0], 2), ([0, 1], 1), ([1], 1)])
def test_truncation_that_would_cut_off_an_adapter_is_refused_and_one_more_loop_is_not(loops, backprop_loops):
    adapter = {"type": "lora", "rank": 3, "loops": loops}
    remedy = rf"backprop_loops={backprop_loops} with loop_adapter.*use backprop_loops={backprop_loops + 1} or more"
    with pytest.raises(StrictDataclassError, match=remedy):
        tiny_config(loop_adapter=adapter, backprop_loops=backprop_loops)
    model = trainable(None, loop_adapter=adapter, backprop_loops=backprop_loops + 1)
    model(random_tokens(), labels=random_tokens()).loss.backward()
    assert all(gradient.any() for name, gradient in gradients(model).items() if "loop_adapters" in name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (LoopedForMaskedLM, random_tokens(2, 7)),
        (LoopedForSequenceClassification, torch.tensor([0, 1])),
        (LoopedForTokenClassification, torch.ones(2, 7, dtype=torch.long)),
    ],
    ids=["masked_lm", "sequence", "token"],
)
def test_every_parameter_of_a_bidirectional_head_gets_a_gradient(head, labels, mode):
    model = randomise(head(tiny_config(is_causal=False, checkpoint_granularity=mode or "layer"))).train()
    if mode is not None:
        model.activation_checkpointing_enable()
    model(random_tokens(2, 7), labels=labels).loss.backward()
    assert [name for name, gradient in gradients(model).items() if gradient is None] == []


def test_every_parameter_of_the_question_answering_head_gets_a_gradient():
    model = randomise(LoopedForQuestionAnswering(tiny_config())).train()
    at = torch.tensor([1, 2])
    model(random_tokens(2, 7), start_positions=at, end_positions=at + 2).loss.backward()
    assert [name for name, gradient in gradients(model).items() if gradient is None] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("placement", PLAIN_LOOPS)
def test_shared_gradient_is_the_sum_over_an_untied_copy(placement, mode):
    """The copy has a layer of its own for every slot; the shared layer's gradient must be the sum over its slots."""
    looped = trainable(mode, injection="none", state_init="input", prelude_norm=False, **PLAIN_LOOPS[placement])
    config, layout = looped.config, looped.config.slot_layout()
    stored_types = config.layer_types if config.sliding_window else None
    stacked = tiny_model(
        **{**PLAIN_LOOPS[placement], "stored_layer_types": stored_types},
        num_prelude_layers=layout.num_slots,
        num_core_layers=0,
        num_coda_layers=0,
    ).train()
    for slot, layer in enumerate(stacked.model.layers):
        stored, _ = layout.layer_and_loop(slot)
        layer.load_state_dict(looped.model.layers[stored].state_dict())
    for name in ("embed_tokens", "norm"):
        getattr(stacked.model, name).load_state_dict(getattr(looped.model, name).state_dict())
    stacked.lm_head.load_state_dict(looped.lm_head.state_dict())

    tokens = random_tokens()
    losses = [model(tokens, labels=tokens).loss for model in (looped, stacked)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for loss in losses:
        loss.backward()
    for stored, shared in enumerate(looped.model.layers):
        slots = [slot for slot in range(layout.num_slots) if layout.layer_and_loop(slot)[0] == stored]
        for name, parameter in shared.named_parameters():
            untied = [stacked.model.layers[slot].get_parameter(name).grad for slot in slots]
            torch.testing.assert_close(parameter.grad, torch.stack(untied).sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stacked"])
def test_gradient_of_the_core_predicts_finite_differences(variant):
    """The derivative of the loss along one random direction of all core weights, in fp64: every loop counts in it."""
    # halting computes in fp32, which shows where its gates read what the core made
    settings = VARIANTS[variant] | ({"halting": "none"} if variant == "universal" else {})
    model = trainable(None, **settings).eval().double()
    tokens = random_tokens()
    core = [
        parameter
        for index, layer in enumerate(model.model.layers)
        if model.config.is_core_layer(index)
        for parameter in layer.parameters()
    ]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in core]

    def loss() -> torch.Tensor:
        logits = model(tokens).logits  # the model's own loss is computed in fp32
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(core, direction, strict=True))

    def loss_at(step: float) -> torch.Tensor:
        with torch.no_grad():
            for p, d in zip(core, direction, strict=True):
                p.add_(step * d)
            moved = loss()
            for p, d in zip(core, direction, strict=True):
                p.sub_(step * d)
        return moved

    step = 1e-5
    torch.testing.assert_close(slope, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("mode", "backprop_loops"), [(None, 1), ("loop", 2)])
# A halting gate and depth attention read loops before the cut too, which hooks on the states cannot cut.
@pytest.mark.parametrize(
    "variant", [name for name in TRUNCATABLE if name not in ("halting_gate", "halting_act", "depth_attention")]
)
def test_truncated_gradients_equal_those_of_a_cut_full_graph(variant, mode, backprop_loops):
    """The reference keeps the whole graph and multiplies by zero what flows back through the states up to the cut."""
    tokens, num_loops = random_tokens(), 4
    truncated = trainable(mode, **{**VARIANTS[variant], "backprop_loops": backprop_loops})
    torch.manual_seed(2)  # a random start of the state is drawn from torch's generator
    loss = truncated(tokens, labels=tokens, num_loops=num_loops).loss
    loss.backward()

    full = trainable(None, **VARIANTS[variant])
    torch.manual_seed(2)
    output = full(tokens, labels=tokens, num_loops=num_loops, output_loop_hidden_states=True)
    for state in output.loop_hidden_states[: num_loops - backprop_loops + 1]:
        if state.requires_grad:  # a first state of zeros does not
            state.register_hook(torch.zeros_like)
    output.loss.backward()

    assert torch.equal(loss, output.loss)
    expected = gradients(full)
    for name, gradient in gradients(truncated).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_truncation_changes_gradients_and_not_the_loss():
    tokens = random_tokens()
    full, truncated = trainable(None), trainable(None, backprop_loops=1)
    losses = [model(tokens, labels=tokens).loss for model in (full, truncated)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(gradients(full)[name], gradients(truncated)[name])


def test_evaluation_mode_is_never_truncated():
    tokens = random_tokens()
    full, truncated = trainable(None).eval(), trainable(None, backprop_loops=1).eval()
    for model in (full, truncated):
        model(tokens, labels=tokens).loss.backward()
    for name, gradient in gradients(truncated).items():
        assert torch.equal(gradient, gradients(full)[name]), name


@pytest.mark.parametrize("variant", ["parcae", "sandwich", "post_branch", "stacked"])
def test_every_recorded_hidden_state_retains_its_gradient(variant):
    model, tokens = trainable(None, **VARIANTS[variant]), random_tokens()
    output = model(tokens, labels=tokens, output_hidden_states=True, output_loop_hidden_states=True)
    recorded = (*output.hidden_states, *(output.loop_hidden_states or ())[1:])
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for state in recorded:
        state.retain_grad()
    output.loss.backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in recorded)


def test_attention_weights_retain_their_gradient_in_every_slot():
    model, tokens = trainable(None, attn_implementation="eager"), random_tokens()
    output = model(tokens, labels=tokens, output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        weights.retain_grad()
    output.loss.backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in output.attentions)


def test_a_copied_model_trains_apart_from_its_original():
    """`copy.deepcopy` is how trainers make reference models; the copy must not share slots or weights."""
    model, tokens = trainable(None), random_tokens()
    twin = copy.deepcopy(model)
    model(tokens, labels=tokens).loss.backward()
    assert all(gradient is None for gradient in gradients(twin).values())
    for ours, theirs in zip(model.model.layers, twin.model.layers, strict=True):
        assert not set(map(id, ours.self_attn._slot_at.values())) & set(map(id, theirs.self_attn._slot_at.values()))
        assert list(map(id, theirs.self_attn.slots)) == list(map(id, theirs.self_attn._slot_at.values()))
