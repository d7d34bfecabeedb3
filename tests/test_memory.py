"""Memory estimates against what torch's own profiler sees on the CPU."""

import pytest
import torch
from helpers import random_tokens, tiny_config, tiny_model

from modeling_looped import LoopedForCausalLM
from modeling_looped.reporting.measured_memory import measured_peak, saved_bytes
from modeling_looped.reporting.memory import CHECKPOINTING, inference_memory, training_memory

SIZES = {"hidden_size": 64, "intermediate_size": 192}
BATCH, LENGTH = 4, 48
LORA = {"loop_adapter": {"type": "lora", "rank": 4}}


@pytest.mark.parametrize(
    ("fields", "attention", "checkpointing"),
    [
        *(({}, "sdpa", checkpointing) for checkpointing in CHECKPOINTING),
        ({"backprop_loops": 1}, "sdpa", "none"),
        (LORA, "eager", "loop"),
    ],
)
def test_a_training_step_takes_what_was_estimated(fields, attention, checkpointing):
    config = tiny_config(**SIZES, **fields)
    config._attn_implementation = attention
    model = LoopedForCausalLM(config).train()
    if checkpointing != "none":
        config.checkpoint_granularity = checkpointing
        model.activation_checkpointing_enable()
    tokens = random_tokens(BATCH, LENGTH)

    def step():
        model(tokens, labels=tokens, num_loops=5, use_cache=False).loss.backward()
        model.zero_grad()

    sizes = {"batch_size": BATCH, "sequence_length": LENGTH, "num_loops": 5}
    estimate = training_memory(model, checkpointing=checkpointing, **sizes)
    assert estimate.peak == pytest.approx(measured_peak(step), rel=0.03)
    assert estimate.gradients == 4 * model.num_parameters()
    assert estimate.weights - estimate.gradients == sum(buffer.nbytes for buffer in model.buffers())
    assert estimate.optimizer == 2 * estimate.gradients
    assert estimate.total == estimate.weights + estimate.optimizer + estimate.peak


def test_a_forward_takes_what_was_estimated():
    model = tiny_model(**SIZES)
    tokens = random_tokens(BATCH, LENGTH)

    @torch.no_grad()
    def step():
        model(tokens, num_loops=5, use_cache=False)

    estimate = inference_memory(model, batch_size=BATCH, sequence_length=LENGTH, num_loops=5)
    assert estimate.activations == pytest.approx(measured_peak(step), rel=0.03)
    assert estimate.key_values == model.kv_cache_bytes(LENGTH, num_loops=5, batch_size=BATCH)
    assert inference_memory(model, sequence_length=8, dtype=torch.bfloat16).weights < 2.01 * model.num_parameters()


@pytest.mark.parametrize(("checkpointing", "least", "most"), [("none", 2.5, 4.0), ("loop", 1.0, 1.5)])
def test_activations_grow_with_the_loops_unless_they_are_recomputed(checkpointing, least, most):
    model = tiny_model(**SIZES)
    two, eight = (
        training_memory(model, sequence_length=LENGTH, num_loops=loops, checkpointing=checkpointing).activations
        for loops in (2, 8)
    )
    assert least < eight / two < most


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_what_a_graph_keeps_is_what_was_estimated(checkpointing):
    """But for what no hook sees: what a checkpoint's closure holds, an eighth of so small a model's."""
    model = tiny_model(**SIZES).train()
    if checkpointing != "none":
        model.config.checkpoint_granularity = checkpointing
        model.activation_checkpointing_enable()
    tokens = random_tokens(BATCH, LENGTH)

    def forward():
        return model(tokens, labels=tokens, num_loops=8, use_cache=False).loss

    estimate = training_memory(
        model, batch_size=BATCH, sequence_length=LENGTH, num_loops=8, checkpointing=checkpointing
    )
    assert saved_bytes(model, forward) == pytest.approx(
        estimate.activations, rel=0.15 if checkpointing == "loop" else 0.05
    )


def test_truncated_backpropagation_keeps_activations_flat():
    model = tiny_model(**SIZES, backprop_loops=1)
    few, many = (training_memory(model, sequence_length=LENGTH, num_loops=loops).activations for loops in (2, 8))
    assert many == few


def test_unknown_options_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="checkpointing='block' must be one of: none, layer, loop"):
        training_memory(model, sequence_length=4, checkpointing="block")
    with pytest.raises(ValueError, match="optimizer='lion' must be one of: sgd, momentum, adamw"):
        training_memory(model, sequence_length=4, optimizer="lion")
    with pytest.raises(ValueError, match="sequence_length=0"):
        inference_memory(model, sequence_length=0)
