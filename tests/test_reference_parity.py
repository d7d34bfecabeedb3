"""The model equals the plain reference of `reference.py`: logits, states, keys and values, and every gradient."""

import pytest
import torch
from helpers import VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from reference import reference_logits, reference_trace
from torch import Tensor, nn

from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM

#: fp32 of two different orders of summation, logits of order one.
LOGITS = {"rtol": 1e-5, "atol": 1e-5}
#: Largest difference between two gradients of one parameter, as a part of its largest entry.
GRADIENT_TOLERANCE = 2e-5

#: Fewer than the tables hold (the tiny models are built with three loops), and more.
LOOP_COUNTS = (1, 5)

IN_PLACE = {"injection": "none", "state_init": "input", "prelude_norm": False}
#: What the shared variants leave out.
MORE_VARIANTS = {
    "recursion_encoding": {"loop_update": "recursion_encoding", **IN_PLACE},
    "recursion_encoding_of_groups": {"loop_update": "recursion_encoding", "core_group_size": 1, **IN_PLACE},
    "biased_injection": {
        "injection": {"type": "concat", "bias": True},
        "readout": {"type": "linear", "bias": True},
        "attention_bias": True,
        "qkv_clip": 0.6,
    },
    "concat_input": {"injection": "linear", "state_init": "input", "prelude_norm": False},
    "zoh": {"injection": {"type": "diagonal", "input_matrix": "zoh"}, "readout": "linear"},
    "sandwich_sum": {"norm_placement": "sandwich_sum", "final_norm": "end"},
    "post": {"norm_placement": "post", "mlp_type": "plain", "hidden_act": "gelu"},
    "concat_wide": {
        "core_hidden_size": 20,
        "core_num_attention_heads": 3,
        "injection": "concat",
        "state_init": {"type": "normal", "std": 1.0},
        "loop_update": "gated",
        "loop_conditioning": "norms",
        "loop_adapter": {"type": "lora", "rank": 2},
        "halting": {"type": "gate", "threshold": 0.5},
        "readout": "linear",
        "final_norm": "after_loops",
        "qk_norm": "flat",
    },
    "groups": {
        "num_core_layers": 4,
        "core_group_size": 2,
        "kv_sharing": "first_loop",
        "injection": "none",
        "state_init": "input",
        "loop_update": "learned_scale",
        "loop_conditioning": {"type": "norms", "table_loops": 2},
        "value_embedding": {"type": "gated", "layers": [1, 4, 5], "gate_channels": 1},
        "stored_layer_types": ["full_attention", "sliding_attention"] * 3,
        "sliding_window": 3,
    },
    "shared_add": {
        "kv_sharing": "first_loop",
        "injection": "add",
        "loop_adapter": {"type": "lora", "rank": 2},
        "attention_gate": "per_channel",
        "qkv_clip": 0.4,
        "value_embedding": {"type": "gated", "layers": [2], "gate_channels": 3},
    },
    "ngrams_concat": {
        "ngram_embedding": {"type": "hashed", "max_n": 4, "table_sizes": [31, 37, 41], "width": 9, "fusion": "concat"},
        "embedding_scale": 3.0,
    },
    "hyper_connections": {
        "residual_streams": {"type": "hyper_connections", "num_streams": 3, "core_num_streams": 4, "own_loops": 2},
        "norm_placement": "sandwich_sum",
        "final_norm": "after_loops",
        "injection": "concat",
        "state_init": "normal",
        "kv_sharing": "first_loop",
        "loop_update": "gated",
        "loop_conditioning": {"type": "sinusoidal", "positions": "every_loop"},
        "readout": "linear",
    },
    "streams_of_a_part": {
        "residual_streams": {"type": "mhc", "span": "part", "mixing": "identity"},
        "injection": "none",
        "state_init": "input",
        "final_norm": "every_loop",
        "halting": {"type": "gate", "threshold": 0.5},
    },
    "wide_streams": {
        "residual_streams": {"type": "mhc", "core_num_streams": 8, "sinkhorn_iterations": 3},
        "core_hidden_size": 24,
        "core_num_attention_heads": 3,
        "core_num_key_value_heads": 3,
        "readout": "linear",
    },
    "hyperloop": {
        "residual_streams": {"type": "hyperloop", "num_streams": 3, "table_loops": 2},
        "injection": "none",
        "state_init": "input",
        "final_norm": "after_loops",
        "loop_conditioning": "embedding",
    },
    "hyperloop_wide": {
        "residual_streams": "hyperloop",
        "core_hidden_size": 24,
        "core_num_attention_heads": 3,
        "core_num_key_value_heads": 3,
        "readout": "linear",
        "kv_sharing": "first_loop",
    },
    "sinusoidal": {"loop_conditioning": "sinusoidal"},
    "sinusoidal_positions": {
        "loop_conditioning": {"type": "sinusoidal", "scale": 0.3, "positions": "every_loop"},
        "hidden_size": 33,
        "head_dim": 8,
    },
    "value_bias": {"attention_value_bias": True, "attention_output_bias": True, "norm_type": "layer"},
    "layer_rows": {"norm_type": "layer_unbiased", "loop_conditioning": "norms", "norm_placement": "sandwich"},
    "narrow_embeddings": {
        "embedding_size": 12,
        "embedding_projection_bias": False,
        "embedding_norm": True,
        "embedding_scale": 3.0,
        "norm_type": "rms_unweighted",
        "position_embedding": "none",
        "final_norm": "none",
    },
    "output_act": {"mlp_output_act": "tanh", "qk_norm": "per_head_unweighted", "hidden_act": "half_relu2"},
    "act_universal": {
        "halting": {"type": "act", "form": "universal", "threshold": 0.8, "initial_bias": -0.6},
        "state_init": "input",
    },
    "damped_fixed": {"loop_update": {"type": "damped", "steps": 4}},
    "lora_some": {"loop_adapter": {"type": "lora", "rank": 2, "alpha": 5.0, "targets": ["v_proj", "down_proj"]}},
    "lora_plain": {
        "mlp_type": "plain",
        "hidden_act": "relu2",
        "loop_adapter": {"type": "lora", "rank": 2, "targets": ["o_proj", "up_proj", "down_proj"]},
    },
    "norms_everywhere": {
        "loop_conditioning": {"type": "norms", "table_loops": 2},
        "norm_placement": "sandwich",
        "qk_norm": "flat",
    },
    "sinusoidal_odd": {"loop_conditioning": {"type": "sinusoidal", "scale": 0.7}, "hidden_size": 33, "head_dim": 8},
    "every_loop_no_coda": {"final_norm": "every_loop", "num_coda_layers": 0},
    "after_loops_no_coda": {"final_norm": "after_loops", "num_coda_layers": 0, "readout": "linear"},
    "no_prelude": {"num_prelude_layers": 0, "num_coda_layers": 0, "injection": "none", "state_init": "input"},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 12, "num_key_value_heads": 1},
    "partial_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e3,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
        }
    },
    "dynamic_rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 4.0},
        "max_position_embeddings": 6,
    },
    "all_sliding": {"sliding_window": 3, "num_core_layers": 1},
    "state_change": {"halting": {"type": "state_change", "threshold": 0.25}, "state_init": "input"},
    "gate": {"halting": {"type": "gate", "threshold": 0.5}, "state_init": "input"},
    "gate_off": {"halting": "gate"},
    "gate_expected": {"halting": {"type": "gate", "threshold": 0.7, "output": "expected"}, "readout": "linear"},
    "act": {"halting": {"type": "act", "threshold": 0.8, "initial_bias": 0.0}, "state_init": "input"},
    "act_sandwich": {
        "halting": {"type": "act", "threshold": 0.5, "initial_bias": -0.5},
        "norm_placement": "sandwich",
        "final_norm": "every_loop",
        "num_coda_layers": 0,
    },
    "stacked_options": {"num_core_layers": 0, "final_norm": "none", "norm_placement": "post", "qk_norm": "flat"},
}
ALL_VARIANTS = VARIANTS | MORE_VARIANTS


def reference_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters as leaves of their own graph."""
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


def assert_same_gradients(model: nn.Module, weights: dict[str, Tensor], loss: Tensor, reference_loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()
    reference_loss.backward()
    for name, parameter in model.named_parameters():
        # what a run does not touch, as a gate that it never reaches, has no gradient or one of zeros
        zeros = torch.zeros_like(parameter)
        expected = zeros if weights[name].grad is None else weights[name].grad
        allowed = max(GRADIENT_TOLERANCE * expected.abs().max().item(), 1e-6)
        difference = ((zeros if parameter.grad is None else parameter.grad) - expected).abs().max().item()
        assert difference <= allowed, f"{name}: gradients differ by {difference}, allowed are {allowed}"


def cotangent(logits: Tensor) -> Tensor:
    """Fixed weights that make a scalar of logits, so that every logit takes part in the gradient by itself."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("num_loops", LOOP_COUNTS)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_logits_and_gradients_equal_the_reference(variant, num_loops):
    model = tiny_model(**ALL_VARIANTS[variant])
    weights = reference_weights(model)
    tokens = random_tokens(2, 7)
    logits = model(tokens, num_loops=num_loops).logits
    expected = torch.stack([reference_logits(weights, model.config, row, num_loops=num_loops) for row in tokens])
    torch.testing.assert_close(logits, expected, **LOGITS)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (expected * direction).sum())


@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_eager_attention_equals_the_reference(variant):
    """For the shared variants, `test_attention_paths.py` compares it with sdpa."""
    model = tiny_model(attn_implementation="eager", **MORE_VARIANTS[variant])
    tokens = random_tokens(1, 9)
    expected = reference_logits(reference_weights(model), model.config, tokens[0])
    torch.testing.assert_close(model(tokens).logits[0], expected, **LOGITS)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_slot_holds_the_keys_and_values_of_its_invocation(variant):
    model = tiny_model(**ALL_VARIANTS[variant])
    tokens = random_tokens(1, 3)  # no longer than the shortest window, of which the cache keeps all
    cache = model(tokens, use_cache=True, num_loops=5).past_key_values
    trace = reference_trace(reference_weights(model), model.config, tokens[0], num_loops=5)
    assert len(cache) == len(trace.slots)
    for layer, (keys, values) in zip(cache.layers, trace.slots, strict=True):
        held = slice(-layer.keys.shape[-2], None)
        torch.testing.assert_close(layer.keys[0], keys[:, held], **LOGITS)
        torch.testing.assert_close(layer.values[0], values[:, held], **LOGITS)


@pytest.mark.parametrize("variant", ["parcae", "sandwich", "damped", "concat", "norms", "sequence", "groups", "wide"])
def test_loop_hidden_states_equal_the_reference_states(variant):
    model = tiny_model(**ALL_VARIANTS[variant])
    tokens = random_tokens(1, 5)
    states = model(tokens, num_loops=4, output_loop_hidden_states=True).loop_hidden_states
    trace = reference_trace(reference_weights(model), model.config, tokens[0], num_loops=4)
    assert len(states) == len(trace.states) == 1 + 4 * (2 if model.config.core_group_size else 1)
    for state, expected in zip(states, trace.states, strict=True):
        torch.testing.assert_close(state[0], expected, **LOGITS)


@pytest.mark.parametrize(
    "variant",
    ["state_change", "gate", "gate_off", "gate_expected", "act", "act_sandwich", "act_universal", "concat_wide"],
)
@pytest.mark.parametrize("training", [False, True])
def test_tokens_halt_after_the_loops_and_with_the_probabilities_of_the_reference(variant, training):
    tokens = random_tokens(1, 31)
    settings = {"state_init": "zeros"} if training and variant == "concat_wide" else {}  # its own start is drawn
    model = tiny_model(**(MORE_VARIANTS[variant] | settings)).train(training)
    output = model(tokens, num_loops=5)
    trace = reference_trace(reference_weights(model), model.config, tokens[0], num_loops=5, training=training)
    exits = output.exit_loops[0].tolist()
    assert exits == trace.exit_loops.tolist()
    assert len(set(exits)) > 1 or variant in ("gate_off", "concat_wide")
    torch.testing.assert_close(output.exit_probabilities[0], trace.exit_probabilities, **LOGITS)


@pytest.mark.parametrize("num_loops", LOOP_COUNTS)
def test_the_gates_straight_through_gradient_equals_the_reference(num_loops):
    model = tiny_model(**MORE_VARIANTS["gate"]).train()
    weights = reference_weights(model)
    tokens = random_tokens(2, 7)
    logits = model(tokens, num_loops=num_loops).logits
    expected = torch.stack(
        [reference_logits(weights, model.config, row, num_loops=num_loops, training=True) for row in tokens]
    )
    torch.testing.assert_close(logits, expected, **LOGITS)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (expected * direction).sum())


@pytest.mark.parametrize(("backprop_loops", "granularity"), [(1, "layer"), (3, "loop")])
@pytest.mark.parametrize("variant", ["parcae", "concat", "lora", "norms", "embedding", "gated", "skip"])
def test_truncated_backpropagation_equals_an_explicit_detach(variant, granularity, backprop_loops):
    settings = {"state_init": "zeros", "backprop_loops": backprop_loops, "checkpoint_granularity": granularity}
    model = tiny_model(**(VARIANTS[variant] | settings)).train()
    model.activation_checkpointing_enable()
    weights = reference_weights(model)
    tokens = random_tokens(2, 5)
    logits = model(tokens, num_loops=4).logits
    expected = torch.stack(
        [reference_logits(weights, model.config, row, num_loops=4, backprop_loops=backprop_loops) for row in tokens]
    )
    torch.testing.assert_close(logits, expected, **LOGITS)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (expected * direction).sum())


def test_truncation_changes_the_gradient_and_nothing_else():
    model = tiny_model().train()
    gradients, losses = [], []
    for backprop_loops in (None, 1):
        model.config.backprop_loops = backprop_loops
        model.zero_grad()
        loss = model(random_tokens(), labels=random_tokens()).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.injection.A_log.grad.clone())
    assert torch.equal(*losses)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(("attn_implementation", "num_loops"), [("sdpa", 5), ("eager", 1)])
@pytest.mark.parametrize(
    "variant",
    ["parcae", "in_place", "lora", "sliding", "all_sliding", "capped", "nanbeige", "wide", "albert"],
)
def test_the_bidirectional_model_equals_the_reference(variant, attn_implementation, num_loops):
    config = tiny_config(is_causal=False, **ALL_VARIANTS[variant])
    config._attn_implementation = attn_implementation
    model = randomise(LoopedForMaskedLM(config)).eval()
    weights = reference_weights(model)
    tokens = random_tokens(2, 7)
    logits = model(tokens, num_loops=num_loops).logits
    expected = torch.stack([reference_logits(weights, config, row, num_loops=num_loops) for row in tokens])
    torch.testing.assert_close(logits, expected, **LOGITS)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (expected * direction).sum())


#: The head of ALBERT and BERT, with the embeddings as its output matrix and without.
TRANSFORM_HEADS = {
    "albert": VARIANTS["albert"] | {"tie_word_embeddings": True},
    "untied": VARIANTS["albert"] | {"tie_word_embeddings": False, "logit_scale": 0.5, "final_logit_softcapping": 3.0},
    "full_width": {"hidden_act": "silu", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("head", TRANSFORM_HEADS)
def test_the_transform_head_equals_the_reference(head):
    config = tiny_config(is_causal=False, mlm_head="transform", **TRANSFORM_HEADS[head])
    model = randomise(LoopedForMaskedLM(config)).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
    weights = reference_weights(model)
    tokens = random_tokens(2, 7)
    logits = model(tokens).logits
    expected = torch.stack([reference_logits(weights, config, row) for row in tokens])
    torch.testing.assert_close(logits, expected, **LOGITS)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (expected * direction).sum())


def test_token_types_equal_the_reference_with_those_types():
    model = tiny_model(**VARIANTS["albert"])
    weights = reference_weights(model)
    tokens, types = random_tokens(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1]])
    logits = model(tokens, token_type_ids=types).logits
    rows = [
        reference_logits(weights, model.config, row, token_types=of) for row, of in zip(tokens, types, strict=True)
    ]
    torch.testing.assert_close(logits, torch.stack(rows), **LOGITS)
    assert not torch.allclose(logits, model(tokens).logits)
    direction = cotangent(logits)
    assert_same_gradients(model, weights, (logits * direction).sum(), (torch.stack(rows) * direction).sum())


@pytest.mark.parametrize("variant", ["parcae", "huginn", "parcae_code", "albert", "universal"])
def test_explicit_positions_equal_the_reference_at_those_positions(variant):
    model = tiny_model(**VARIANTS[variant])
    tokens, positions = random_tokens(1, 6), torch.tensor([[3, 4, 7, 9, 20, 21]])
    ones = torch.ones_like(tokens)  # with a mask, gaps between positions are gaps and not packed sequences
    expected = reference_logits(reference_weights(model), model.config, tokens[0], positions=positions[0])
    logits = model(tokens, position_ids=positions, attention_mask=ones).logits[0]
    torch.testing.assert_close(logits, expected, **LOGITS)


@pytest.mark.parametrize("variant", ["parcae", "sliding", "concat"])
def test_packed_sequences_equal_the_reference_of_each(variant):
    model = tiny_model(**VARIANTS[variant])
    weights = reference_weights(model)
    first, second = random_tokens(1, 6, seed=1), random_tokens(1, 5, seed=2)
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits[0]
    expected = [reference_logits(weights, model.config, part[0]) for part in (first, second)]
    torch.testing.assert_close(packed, torch.cat(expected), **LOGITS)


def test_a_given_initial_state_replaces_the_configured_one():
    """The last state of a three-loop run, continued for two loops, is the five-loop run."""
    model = tiny_model()
    tokens = random_tokens()
    whole = model(tokens, num_loops=5, output_loop_hidden_states=True)
    middle = whole.loop_hidden_states[3]
    torch.testing.assert_close(model(tokens, num_loops=2, initial_state=middle).logits, whole.logits, **LOGITS)


def test_float64_equals_the_reference_tightly():
    model = LoopedForCausalLM(tiny_config(readout="linear", qk_norm="per_head")).double().eval()
    randomise(model)
    tokens = random_tokens(1, 7)
    expected = reference_logits(reference_weights(model), model.config, tokens[0])
    # the injection's decay is computed in fp32 for every dtype
    torch.testing.assert_close(model(tokens).logits[0], expected, rtol=1e-6, atol=1e-6)
