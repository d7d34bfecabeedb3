"""The chunked loss against divergences written down from their definitions, in float64, with autograd's gradients."""

import pytest
import torch
import torch.nn.functional as F

from modeling_looped.training.losses import DIVERGENCES, TopK, distillation_loss


def naive(student, teacher, targets, *, divergence, beta, temperature, weight):
    """From the definitions, over the rows that count."""
    kept = targets != -100
    student, teacher, targets = student[kept], teacher[kept], targets[kept]
    q, p = (torch.softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    if divergence == "forward_kl":
        value = (p * (p.log() - q.log())).sum(-1)
    elif divergence == "reverse_kl":
        value = (q * (q.log() - p.log())).sum(-1)
    else:
        m = beta * p + (1 - beta) * q
        value = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    entropy = F.cross_entropy(student, targets, reduction="none")
    return ((1 - weight) * temperature**2 * value + weight * entropy).sum(), value, entropy


def cut_to(k, teacher):
    """The k likeliest tokens of each row and what the others have together."""
    log_p = torch.log_softmax(teacher, dim=-1)
    values, indices = log_p.topk(k)
    tail = log_p.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    return TopK(indices.int(), torch.cat((values, tail), dim=-1))


def inputs(rows=11, vocabulary=29):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, vocabulary, generator=generator) * 3
    teacher = torch.randn(rows, vocabulary, generator=generator) * 3
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[[0, 4, 5]] = -100
    return student, teacher, targets


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.3), (0.5, 1.0)])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_value_and_gradient_equal_the_definition(divergence, temperature, weight, chunk_tokens):
    student, teacher, targets = inputs()
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    settings = {"divergence": divergence, "beta": 0.3, "temperature": temperature}
    terms = distillation_loss(
        ours, teacher, targets, cross_entropy_weight=weight, chunk_tokens=chunk_tokens, **settings
    )
    loss, value, entropy = naive(theirs, teacher.double(), targets, weight=weight, **settings)
    (terms.loss * 0.7).backward()
    (loss * 0.7).backward()
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.cross_entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    if weight < 1:
        torch.testing.assert_close(terms.divergence.double(), value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert ours.grad[targets == -100].abs().max() == 0


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_top_k_equals_the_definition_over_k_tokens_and_a_bucket(divergence):
    student, teacher, targets = inputs()
    ours = student.clone().requires_grad_()
    settings = {"divergence": divergence, "beta": 0.5, "temperature": 1.0}
    top = cut_to(4, teacher)
    indices = top.indices.long()
    terms = distillation_loss(ours, top, targets, cross_entropy_weight=0.25, chunk_tokens=3, **settings)
    terms.loss.backward()

    theirs = student.double().requires_grad_()
    q = torch.log_softmax(theirs, dim=-1)
    bucket = torch.log1p(-q.gather(-1, indices).exp().sum(-1, keepdim=True))
    coarse = torch.cat((q.gather(-1, indices), bucket), dim=-1)
    teacher_coarse = top.log_probs.double()
    loss, value, _ = naive(coarse, teacher_coarse, targets.clamp(max=0), weight=0.0, **settings)
    kept = targets != -100
    loss = 0.75 * loss + 0.25 * F.cross_entropy(theirs[kept], targets[kept], reduction="sum")
    loss.backward()
    torch.testing.assert_close(terms.divergence.double(), value.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_merging_outcomes_only_lowers_a_divergence_and_without_any_merged_it_is_the_full_one():
    student, teacher, targets = inputs()
    full = distillation_loss(student, teacher, targets).divergence
    last = torch.zeros_like(full)
    for k in (2, 8, 16, 28):
        value = distillation_loss(student, cut_to(k, teacher), targets).divergence
        assert (value >= last - 1e-5).all()
        last = value
    torch.testing.assert_close(last, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_equal_logits_have_neither_loss_nor_gradient_and_extreme_ones_stay_finite(divergence):
    student, _, targets = inputs()
    same = student.clone().requires_grad_()
    terms = distillation_loss(same, student, targets, divergence=divergence)
    terms.loss.backward()
    assert terms.loss.abs() < 1e-4
    assert same.grad.abs().max() < 1e-5
    extreme = (student * 1e4).requires_grad_()
    distillation_loss(extreme, student.flip(0) * 1e4, targets, divergence=divergence).loss.backward()
    assert extreme.grad.isfinite().all()


def test_a_teacher_that_excludes_tokens_gives_a_finite_forward_kl():
    student, teacher, targets = inputs()
    teacher[:, :5] = float("-inf")
    for divergence in ("forward_kl", "jensen_shannon"):
        logits = student.clone().requires_grad_()
        terms = distillation_loss(logits, teacher, targets, divergence=divergence)
        terms.loss.backward()
        assert terms.loss.isfinite()
        assert logits.grad.isfinite().all()


def test_bf16_logits_get_their_gradient_in_bf16_from_arithmetic_in_fp32():
    student, teacher, targets = inputs()
    half = student.bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    for logits in (half, full):
        distillation_loss(logits, teacher.bfloat16(), targets).loss.backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad, full.grad.bfloat16(), rtol=0, atol=0)


def test_memory_holds_one_copy_of_the_logits_and_not_several_in_fp32():
    """Of what autograd keeps for the backward pass: the gradient, in the logits' own dtype."""
    student, teacher, targets = inputs(rows=64, vocabulary=256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        distillation_loss(student.bfloat16().requires_grad_(), teacher, targets, chunk_tokens=4)
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bfloat16, student.shape)]


def test_another_vocabulary_is_refused():
    student, teacher, targets = inputs()
    with pytest.raises(ValueError, match="vocabulary has 20 tokens and the student's 29"):
        distillation_loss(student, teacher[:, :20], targets)
    with pytest.raises(ValueError, match="7 rows"):
        distillation_loss(student, teacher[:7], targets)
