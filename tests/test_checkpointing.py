"""Gradient checkpointing, per layer and per loop.

Loss and gradients stay the same to the last bit, with and without a cache, and per loop the activation memory hardly
grows with the loop count.
"""

import weakref

import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Trainer, TrainingArguments

MODES = (None, "layer", "loop")


def trainable(mode: str | None, **overrides) -> torch.nn.Module:
    """A tiny model in training mode, with gradient checkpointing `mode`, the same at every call."""
    torch.manual_seed(0)
    model = tiny_model(**{"checkpoint_granularity": mode or "layer", **overrides}).train()
    if mode is not None:
        model.activation_checkpointing_enable()
    return model


def step(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step."""
    tokens = random_tokens()
    torch.manual_seed(1)  # for what training draws: dropout, a random first state
    model.zero_grad()
    loss = model(tokens, labels=tokens, **inputs).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_step(first, second) -> None:
    assert torch.equal(first[0], second[0])
    assert [name for name, gradient in first[1].items() if not torch.equal(gradient, second[1][name])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_bit_equal_in_every_mode(variant):
    """Also where loops share keys and values: these never travel through the cache, so it may be there or not."""
    reference = step(trainable(None, **VARIANTS[variant]), use_cache=False)
    for mode in MODES:
        model = trainable(mode, **VARIANTS[variant])
        for use_cache in (True, False):
            assert_same_step(step(model, use_cache=use_cache), reference)


@pytest.mark.parametrize("variant", ["nanbeige", "shared"])
@torch.no_grad()
def test_shared_keys_and_values_make_the_same_logits_with_a_cache_and_without(variant):
    model = tiny_model(**VARIANTS[variant])
    for num_loops in (1, 2, 5):
        with_cache, without = (model(random_tokens(), num_loops=num_loops, use_cache=use) for use in (True, False))
        assert torch.equal(with_cache.logits, without.logits)


@pytest.mark.parametrize(
    ("variant", "attn_implementation"), [("parcae", "eager"), ("parcae", "sdpa"), ("shared", "sdpa")]
)
@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_recomputation_repeats_the_dropout_of_the_first_pass(mode, variant, attn_implementation):
    settings = {"attention_dropout": 0.3, "attn_implementation": attn_implementation, **VARIANTS[variant]}
    with_dropout = step(trainable(None, **settings))
    assert_same_step(step(trainable(mode, **settings)), with_dropout)
    without = step(trainable(None, **{**settings, "attention_dropout": 0.0}))
    assert not torch.equal(with_dropout[0], without[0])


@pytest.mark.parametrize("mode", ["layer", "loop"])
@pytest.mark.parametrize("backprop_loops", [1, 2])
def test_truncation_and_checkpointing_combine(mode, backprop_loops):
    reference = step(trainable(None, backprop_loops=backprop_loops), num_loops=4)
    assert_same_step(step(trainable(mode, backprop_loops=backprop_loops), num_loops=4), reference)


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_padded_batches_are_bit_equal_too(mode):
    """The masks reach the recomputed layers as they reached the first pass."""
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    assert_same_step(step(trainable(mode), attention_mask=mask), step(trainable(None), attention_mask=mask))


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_checkpointing_can_be_switched_off_again(mode):
    model = trainable(mode)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert executions_per_step(model) == [1, 3, 3, 1]
    assert_same_step(step(model), step(trainable(None)))


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_evaluation_is_not_recomputed(mode):
    assert executions_per_step(trainable(mode).eval()) == [1, 3, 3, 1]


@pytest.mark.parametrize("variant", ["parcae", "shared", "sequence"])
@pytest.mark.parametrize(
    ("mode", "executions"), [(None, [1, 3, 3, 1]), ("layer", [2, 6, 6, 2]), ("loop", [2, 6, 6, 2])]
)
def test_every_layer_is_recomputed_exactly_once(mode, executions, variant):
    """Not at all without checkpointing; with it, once per pass: a checkpointed loop holds no checkpointed layers."""
    assert executions_per_step(trainable(mode, **VARIANTS[variant])) == executions


def executions_per_step(model: torch.nn.Module) -> list[int]:
    """How often each stored layer's input norm runs in a forward and a backward of three loops."""
    counts = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_, index=index):
            counts[index] += 1

        layer.input_layernorm.register_forward_pre_hook(count)
    step(model)
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_recorded_states_are_those_of_the_first_pass(mode):
    """Recomputation runs the layers, and their hooks, again; it must not add to what the forward returned."""
    model, tokens = trainable(mode), random_tokens()
    output = model(tokens, labels=tokens, output_hidden_states=True, output_loop_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.loss.backward()
    reference = trainable(None)(tokens, output_hidden_states=True, output_loop_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for ours, expected in zip(output.hidden_states, reference.hidden_states, strict=True):
        assert torch.equal(ours, expected)
        assert ours.grad is not None
    for ours, expected in zip(output.loop_hidden_states, reference.loop_hidden_states, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", ["layer", "loop"])
def test_a_cache_is_refused_while_layers_are_recomputed(mode):
    """The recomputation would write every key twice; without the cache, `generate` would produce other tokens."""
    model, tokens = trainable(mode), random_tokens()
    with pytest.raises(ValueError, match=r"past_key_values cannot be used.*model.eval\(\).*use_cache=False"):
        model(tokens, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="past_key_values cannot be used"):
        model.generate(tokens, max_new_tokens=3)
    expected = trainable(None).generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False), expected)
    assert torch.equal(model.eval().generate(tokens, max_new_tokens=5, do_sample=False), expected)


def enable_through_model(tmp_path, arguments):
    trainable(None).activation_checkpointing_enable(arguments)


def enable_through_old_name(tmp_path, arguments):
    trainable(None).gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def enable_through_trainer(tmp_path, arguments):
    tokens = random_tokens(4)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        activation_checkpointing=True,
        activation_checkpointing_kwargs=arguments,
        max_steps=1,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(trainable(None), args, train_dataset=rows).train()


WAYS = (enable_through_model, enable_through_old_name, enable_through_trainer)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("enable", WAYS)
def test_reentrant_checkpointing_is_refused_with_advice(enable, tmp_path):
    with pytest.raises(ValueError, match=r"use_reentrant=True does not work.*\"use_reentrant\": False"):
        enable(tmp_path, {"use_reentrant": True})


@pytest.mark.parametrize("arguments", [None, {}, {"preserve_rng_state": False}, {"use_reentrant": None}])
def test_checkpointing_is_not_reentrant_whatever_else_is_asked(arguments):
    """torch takes a missing `use_reentrant` as True, so options that leave it out would slip past the refusal."""
    model = trainable(None)
    model.activation_checkpointing_enable(arguments)
    assert model.model._gradient_checkpointing_func.keywords["use_reentrant"] is False
    assert_same_step(step(model), step(trainable(None)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, until it is freed, and remembers the maximum."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def saved_and_peak(model: torch.nn.Module, num_loops: int) -> tuple[float, float]:
    """What one step keeps for its backward, and the peak of all live tensors, in state tensors of [B, S, D]."""
    tokens = random_tokens(2, 32)
    state_bytes = tokens.numel() * model.config.hidden_size * 4
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, labels=tokens, num_loops=num_loops, use_cache=False)
    model.zero_grad()
    with LiveBytes() as tensors:
        model(tokens, labels=tokens, num_loops=num_loops, use_cache=False).loss.backward()
    return sum(saved.values()) / state_bytes, tensors.peak / state_bytes


@pytest.mark.parametrize(
    ("mode", "fewest", "most"),
    # Measured per extra loop of two layers: 31; 3 (each layer's input, and the state that the injection decays); 1.
    [(None, 25, 40), ("layer", 2.9, 3.1), ("loop", 0.9, 1.1)],
)
def test_activation_memory_per_extra_loop(mode, fewest, most, record_property):
    """Per-loop checkpointing keeps one state [B, S, D] for every further loop, both saved and at the peak."""
    model = trainable(mode)
    few, many = saved_and_peak(model, 2), saved_and_peak(model, 6)
    for name, at_few, at_many in zip(("saved", "peak"), few, many, strict=True):
        growth = (at_many - at_few) / 4
        record_property(f"{name}_states_per_loop", growth)
        assert fewest <= growth <= most, (name, growth)


def test_truncated_memory_does_not_grow_with_the_loops(record_property):
    model = trainable(None, backprop_loops=2)
    few, many = saved_and_peak(model, 2), saved_and_peak(model, 6)
    record_property("saved_states", many[0])
    assert many[0] == few[0]
    assert many[1] <= few[1] + 0.1
