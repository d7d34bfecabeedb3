"""Compression: at full rank the teacher itself, below it the best of what the rule promises."""

import pytest
import torch
from helpers import assert_close, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from random_configs import modest
from teachers import TEACHERS, tiny_teacher

from modeling_looped import LoopedForCausalLM
from modeling_looped.conversion.alignment import align
from modeling_looped.conversion.calibration import calibrate
from modeling_looped.conversion.compress import compress, layer_weights, teacher_layers
from modeling_looped.conversion.fitting import fit_adapters
from modeling_looped.conversion.layer_plan import kept_plan, shared_plan
from modeling_looped.conversion.merging import MERGES, low_rank, relative_error

#: Layers whose attention differs cannot share, so these teachers take another plan than the others.
MIXED = {"qwen2-windows"}
PLAN = shared_plan(1, 2, 1, 2)
FULL = 32  # the narrower side of every projection of a tiny teacher


def calibrated(teacher):
    return calibrate(teacher, [random_tokens(4, 64, seed=9)])


@pytest.mark.parametrize("order", ["cycle", "sequence"])
@pytest.mark.parametrize("name", [name for name in TEACHERS if name not in MIXED])
@torch.no_grad()
def test_at_full_rank_the_compressed_model_is_the_teacher(name, order):
    teacher, tokens = tiny_teacher(name), random_tokens(2, 11)
    model, errors = compress(teacher, shared_plan(1, 2, 1, 2, order=order), rank=FULL)
    assert_close(model(tokens).logits, teacher(tokens).logits)
    assert max(error.adapted for error in errors) < 1e-5 < min(error.shared for error in errors)


@pytest.mark.parametrize("merge", sorted(MERGES))
@pytest.mark.parametrize("adapter", ["svd", "weighted_svd"])
@pytest.mark.parametrize("alignment", ["none", "neurons", "neurons_and_heads"])
@torch.no_grad()
def test_no_rule_changes_what_full_rank_gives(merge, adapter, alignment):
    teacher, tokens = tiny_teacher("qwen3-biases"), random_tokens(2, 11)
    options = {"merge": merge, "adapter": adapter, "alignment": alignment, "calibration": calibrated(teacher)}
    assert_close(compress(teacher, PLAN, rank=FULL, **options).model(tokens).logits, teacher(tokens).logits)


@torch.no_grad()
def test_the_model_that_was_compressed_unrolls_into_the_teacher():
    teacher, tokens = tiny_teacher("qwen2"), random_tokens(2, 11)
    stacked = compress(teacher, PLAN, rank=FULL).model.unroll()
    assert stacked.config.model_type == "qwen2"
    assert_close(stacked(tokens).logits, teacher(tokens).logits)


@torch.no_grad()
def test_more_rank_is_nearer_and_stores_more():
    teacher = tiny_teacher("llama")
    results = [compress(teacher, PLAN, rank=rank) for rank in (0, 4, 16)]
    errors = [sum(error.adapted for error in result.errors) for result in results]
    sizes = [result.model.num_parameters() for result in results]
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[0] < teacher.num_parameters()


@torch.no_grad()
def test_weighed_rules_are_nearer_where_the_inputs_are():
    """Their errors are weighed by calibration, so the weighed rules must win every single one."""
    teacher = tiny_teacher("llama")
    calibration = calibrated(teacher)
    plain = compress(teacher, PLAN, rank=4, calibration=calibration).errors
    weighed = compress(teacher, PLAN, rank=4, adapter="weighted_svd", calibration=calibration).errors
    assert all(ours.adapted <= theirs.adapted + 1e-6 for ours, theirs in zip(weighed, plain, strict=True))
    assert sum(ours.adapted for ours in weighed) < 0.95 * sum(theirs.adapted for theirs in plain)


@torch.no_grad()
def test_least_squares_has_the_least_weighed_error_of_all_merges():
    teacher = tiny_teacher("llama")
    calibration = calibrated(teacher)

    def squares(merge: str) -> dict[tuple[int, str], float]:
        totals: dict[tuple[int, str], float] = {}
        stack = teacher_layers(teacher)
        for error in compress(teacher, PLAN, merge=merge, calibration=calibration).errors:
            part = "mlp" if error.projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weight = stack[f"model.layers.{error.teacher_layer}.{part}.{error.projection}.weight"].double()
            moment = calibration.moment(error.teacher_layer, error.projection).double()
            energy = torch.einsum("oi,ij,oj->", weight, moment, weight).item()
            key = (error.core_layer, error.projection)
            totals[key] = totals.get(key, 0.0) + error.shared**2 * energy
        return totals

    best = squares("least_squares")
    for merge in ("average", "first", "last", "middle"):
        others = squares(merge)
        assert all(best[key] <= 1.001 * others[key] for key in best), merge


@torch.no_grad()
def test_merging_equal_layers_loses_nothing():
    teacher, tokens = tiny_teacher("llama"), random_tokens(2, 11)
    for target, source in ((3, 1), (4, 2)):
        teacher.model.layers[target].load_state_dict(teacher.model.layers[source].state_dict())
    model, errors = compress(teacher, PLAN)
    assert_close(model(tokens).logits, teacher(tokens).logits)
    assert max(error.shared for error in errors) < 1e-6


@torch.no_grad()
def test_alignment_finds_a_permuted_copy_of_a_layer():
    """A layer whose neurons and heads were shuffled is the same function, and only aligned merging sees it."""
    teacher, tokens = tiny_teacher("olmo2-biases"), random_tokens(2, 11)
    layer, groups = teacher.model.layers[1], 2
    copy = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    neurons = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    heads = torch.tensor([3, 2, 0, 1])  # key-value group 1 before group 0, and the first pair swapped
    queries = (heads[:, None] * 8 + torch.arange(8)).flatten()
    keys = (torch.tensor([1, 0])[:, None] * 8 + torch.arange(8)).flatten()
    for name in copy:
        if name.startswith(("mlp.gate", "mlp.up")):
            copy[name] = copy[name][neurons]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            if name.startswith(f"self_attn.{part}_"):
                copy[name] = copy[name][rows]
    copy["mlp.down_proj.weight"] = copy["mlp.down_proj.weight"][:, neurons]
    copy["self_attn.o_proj.weight"] = copy["self_attn.o_proj.weight"][:, queries]
    assert groups == 4 // teacher.config.num_key_value_heads
    teacher.model.layers[3].load_state_dict(copy)
    teacher.model.layers[4].load_state_dict(teacher.model.layers[2].state_dict())
    expected = teacher(tokens).logits
    assert (compress(teacher, PLAN).model(tokens).logits - expected).abs().max() > 0.1
    assert_close(compress(teacher, PLAN, alignment="neurons_and_heads").model(tokens).logits, expected)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "olmo2", "llama-wide-heads"])
@torch.no_grad()
def test_an_aligned_layer_is_the_same_function(name):
    teacher, tokens = tiny_teacher(name), random_tokens(2, 11)
    expected, config = teacher(tokens).logits, teacher.config
    stack, head_dim = teacher_layers(teacher), teacher.model.layers[0].self_attn.head_dim
    heads = {"head_dim": head_dim, "groups": config.num_attention_heads // config.num_key_value_heads}
    aligned = align(layer_weights(stack, 2), layer_weights(stack, 4), what="neurons_and_heads", **heads)
    renamed = {name.replace("pre_feedforward", "post_attention"): tensor for name, tensor in aligned.weights.items()}
    if name == "olmo2":
        renamed = aligned.weights
    changed = not torch.equal(aligned.weights["mlp.up_proj.weight"], layer_weights(stack, 2)["mlp.up_proj.weight"])
    teacher.model.layers[2].load_state_dict(renamed)
    assert changed
    assert_close(teacher(tokens).logits, expected)


@torch.no_grad()
def test_a_kept_plan_with_a_closed_gate_starts_as_the_model_without_the_dropped_layers():
    teacher, tokens = tiny_teacher("llama"), random_tokens(2, 11)
    plan = kept_plan([0, 1, 4, 5], [1, 4], 3)
    gate = {"type": "gated", "initial_gate": 1e-6, "free_loops": 1}
    model = compress(teacher, plan, loop_update=gate).model
    dropped = tiny_teacher("llama", num_hidden_layers=4)
    dropped.load_state_dict(
        {
            name.replace("layers.4.", "layers.2.").replace("layers.5.", "layers.3."): tensor
            for name, tensor in teacher.state_dict().items()
            if not name.startswith(("model.layers.2.", "model.layers.3."))
        }
    )
    assert_close(model(tokens).logits, dropped(tokens).logits)


@modest
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(0, 5))
def test_the_weighed_factors_are_the_best_of_their_rank(out_features, in_features, rank, seed):
    """No factors of this rank have a smaller weighed error: checked against the theorem, through the square root."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(out_features, in_features, generator=generator)
    inputs = torch.randn(20, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    moment = inputs.T @ inputs / 20
    B, A = low_rank(difference, rank, moment)
    assert (B.shape, A.shape) == ((out_features, rank), (rank, in_features))
    values, vectors = torch.linalg.eigh(moment.double())
    root = vectors * values.clamp_min(0).sqrt()
    tail = torch.linalg.svdvals(difference.double() @ root)[rank:].norm()
    error = ((difference - B @ A).double() @ root).norm()
    torch.testing.assert_close(error, tail, atol=2e-3, rtol=1e-2)


def test_a_relative_error_without_a_moment_is_that_of_white_inputs():
    weight, difference = torch.randn(4, 6), torch.randn(4, 6)
    assert relative_error(difference, weight) == pytest.approx(
        relative_error(difference, weight, torch.eye(6)), rel=1e-5
    )


def test_the_result_is_saved_and_loads(tmp_path):
    teacher, tokens = tiny_teacher("qwen3", dtype=torch.bfloat16), random_tokens(2, 11)
    model = compress(teacher, PLAN, rank=4).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert torch.equal(LoopedForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "median"}, "merge='median' must be one of: average, first"),
        ({"adapter": "qr"}, "adapter='qr' must be one of: svd, weighted_svd"),
        ({"alignment": "all"}, "alignment='all' must be one of: none, neurons"),
        ({"rank": -1}, "rank=-1 must be at least 0"),
        ({"merge": "least_squares"}, "pass a calibration"),
        ({"rank": 2, "adapter": "weighted_svd"}, "pass a calibration"),
    ],
)
def test_options_that_do_not_exist_or_lack_their_calibration_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny_teacher("llama"), PLAN, **options)


def test_layers_that_calibration_has_not_seen_are_named():
    teacher = tiny_teacher("llama")
    partial = calibrate(teacher, [random_tokens(1, 32)], layers=[1, 2])
    with pytest.raises(ValueError, match=r"has not measured layers \[3, 4\]"):
        compress(teacher, PLAN, merge="least_squares", calibration=partial)


def test_layers_of_unlike_attention_do_not_share():
    with pytest.raises(ValueError, match=r"layers \[1, 3\] cannot share: their attention is"):
        compress(tiny_teacher("qwen2-windows"), PLAN)


def fitted(teacher, rank, plan=PLAN, merge="first", adapter="fitted", **options):
    windows = [random_tokens(1, 24, seed=seed) for seed in range(8)]
    return compress(teacher, plan, rank=rank, merge=merge, adapter=adapter, windows=windows, **options)


@pytest.mark.parametrize("merge", ["first", "last"])
@pytest.mark.parametrize("name", [name for name in TEACHERS if name not in MIXED])
@torch.no_grad()
def test_at_full_rank_the_fitted_model_is_the_teacher(name, merge):
    teacher, tokens = tiny_teacher(name), random_tokens(2, 11)
    model, errors = fitted(teacher, FULL, merge=merge)
    assert_close(model(tokens).logits, teacher(tokens).logits, atol=5e-4)  # a regression sees both models' rounding
    assert max(error.adapted for error in errors) < 1e-4 < min(error.shared for error in errors)


@torch.no_grad()
def test_the_loop_that_keeps_its_layers_gets_no_adapter():
    teacher = tiny_teacher("llama")
    first, last, average = (fitted(teacher, 4, merge=merge).model for merge in ("first", "last", "average"))
    assert [list(model.config.loop_adapter["loops"]) for model in (first, last, average)] == [[1], [0], [0, 1]]
    assert first.num_parameters() < average.num_parameters()


@torch.no_grad()
def test_one_loop_of_a_fitted_model_is_the_teacher_without_the_layers_that_loops_stand_for():
    teacher, tokens = tiny_teacher("llama"), random_tokens(2, 11)
    model = fitted(teacher, 4).model
    dropped = compress(teacher, kept_plan([0, 1, 2, 5], [1, 2], 1)).model
    assert_close(model(tokens, num_loops=1).logits, dropped(tokens).logits)


@torch.no_grad()
def test_fitted_alone_the_low_rank_weights_do_everything():
    teacher, tokens = tiny_teacher("llama"), random_tokens(2, 11)
    model = fitted(teacher, FULL, adapter="fitted_alone").model
    scales = [value for name, value in model.named_parameters() if name.endswith("shared_scale")]
    assert scales
    assert not any(scale.any() for scale in scales)
    assert_close(model(tokens).logits, teacher(tokens).logits, atol=5e-4)


@torch.no_grad()
def test_fitting_follows_the_teacher_better_than_the_truncated_differences():
    teacher = tiny_teacher("llama", num_hidden_layers=10)
    plan, tokens = shared_plan(1, 2, 1, 4), random_tokens(4, 24, seed=77)
    calibration = calibrate(teacher, [random_tokens(1, 24, seed=seed) for seed in range(8)])
    truncated = compress(teacher, plan, rank=8, merge="first", adapter="weighted_svd", calibration=calibration).model
    states = [model.model(tokens).last_hidden_state for model in (teacher, fitted(teacher, 8, plan).model, truncated)]
    assert (states[1] - states[0]).norm() < 0.95 * (states[2] - states[0]).norm()


def test_fitting_without_text_or_without_anything_to_fit_is_refused():
    teacher = tiny_teacher("llama")
    with pytest.raises(ValueError, match="adapter='fitted': pass windows"):
        compress(teacher, PLAN, rank=4, merge="first", adapter="fitted")
    with pytest.raises(ValueError, match="nothing to fit in num_loops=1"):
        fitted(teacher, 4, kept_plan([0, 1, 2], [1], 1))
    with pytest.raises(ValueError, match="must be a 'lora' with shared_scale='per_channel' to be fitted"):
        fit_adapters(compress(teacher, PLAN, rank=4).model, teacher, PLAN, [random_tokens(1, 8)])
    with pytest.raises(ValueError, match="windows is empty"):
        fit_adapters(fitted(teacher, 4).model, teacher, PLAN, [])
    with pytest.raises(ValueError, match="alignment='neurons' must be 'none'"):
        fitted(teacher, 4, alignment="neurons")
