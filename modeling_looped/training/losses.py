r"""Losses of distillation: how far the student's next-token distribution is from the teacher's, in chunks of tokens.

N tokens, V vocabulary, k entries kept of a teacher's distribution. p is the teacher's distribution and q the
student's, both softmaxes of logits / temperature.

A vocabulary of 49,152 makes the logits of 2,048 tokens 400 MB in float32, and a divergence written with torch's
operations keeps several copies of them for the backward pass. Here loss and gradient are computed together, in
float32, for `chunk_tokens` tokens at a time, and all that stays is one tensor of the logits' own dtype: the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: From log q [n, V], log p [n, V] and beta: the divergence [n], and its gradient with respect to the logits z of
#: q = softmax(z), [n, V].
Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


class TopK(NamedTuple):
    """A teacher's distributions, cut to their largest entries and one bucket for all others.

    Attributes:
        indices: tokens, integers [N, k].
        log_probs: their log-probabilities, and in the last column that of all other tokens together, [N, k + 1].
    """

    indices: Tensor
    log_probs: Tensor


class DistillationTerms(NamedTuple):
    """What `distillation_loss` gives.

    Attributes:
        loss: sum over tokens of (1 - w) * T^2 * divergence + w * cross-entropy, a scalar with a gradient.
        divergence: of each token, [N], without T^2 and without a gradient.
        cross_entropy: of each token, [N], without a gradient.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q), which covers all that the teacher says (Hinton et al., 1503.02531)."""
    p = log_p.exp()
    # a token that the teacher excludes has p = 0, log p = -inf and adds nothing
    terms = p * (log_p - log_q).nan_to_num_(nan=0.0, neginf=0.0)
    return terms.sum(-1), log_q.exp().sub_(p)


def reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p), which keeps to what the teacher finds likely (MiniLLM, 2306.08543)."""
    q, ratio = log_q.exp(), log_q - log_p
    value = (q * ratio).sum(-1)
    return value, q.mul_(ratio.sub_(value.unsqueeze(-1)))


def jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""\beta KL(p || m) + (1 - \beta) KL(q || m) with m = \beta p + (1 - \beta) q (GKD, 2306.13649, equation 1).

    Divided by \beta it tends to the forward KL as \beta tends to 0, divided by 1 - \beta to the reverse KL at 1.
    """
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p).add_(q, alpha=1.0 - beta).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    own = (log_q - log_m).mul_(1.0 - beta)
    value = (q * own).sum(-1) + beta * (p * (log_p - log_m).nan_to_num_(neginf=0.0)).sum(-1)
    # m depends on q too, but what that adds to the gradient is the same for all tokens, which a softmax cancels
    return value, q.mul_(own - (q * own).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | TopK | None,
    targets: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    chunk_tokens: int = 128,
) -> DistillationTerms:
    """Divergence from the teacher, mixed with the cross-entropy of the targets, summed over tokens.

    Args:
        student_logits: [M, V], of any floating dtype.
        teacher: the teacher's logits [M, V], or its largest entries (N rows, M in `indices` and `log_probs`; at
            the same temperature); `None`: there is no teacher, and the divergence is zero.
        targets: the next token of each row, [M]; rows of -100 do not count. N is the number of those that do.
        divergence: `forward_kl`, `reverse_kl` or `jensen_shannon`.
        beta: weight of the teacher in `jensen_shannon`, strictly between 0 and 1.
        temperature: T, by which both logits are divided in the divergence, which counts T^2 times to keep the size of
            its gradient (Hinton et al., 1503.02531, section 2).
        cross_entropy_weight: w, in [0, 1].
        chunk_tokens: rows that are computed at a time; changes memory, not the result.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    logits = teacher.log_probs if isinstance(teacher, TopK) else teacher
    if logits is not None and len(logits) != len(student_logits):
        raise ValueError(f"the teacher gave {len(logits)} rows of logits for the student's {len(student_logits)}.")
    if isinstance(teacher, Tensor) and teacher.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            f"the teacher's vocabulary has {teacher.shape[-1]} tokens and the student's {student_logits.shape[-1]}: "
            "distillation compares their distributions token by token, so both must share one tokenizer."
        )
    indices = teacher.indices if isinstance(teacher, TopK) else None
    settings = (DIVERGENCES[divergence], beta, temperature, cross_entropy_weight, chunk_tokens)
    return DistillationTerms(*ChunkedLoss.apply(student_logits, logits, indices, targets, settings))


class ChunkedLoss(torch.autograd.Function):
    """`distillation_loss` with its gradient, which is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor | None,
        indices: Tensor | None,
        targets: Tensor,
        settings: tuple[Divergence, float, float, float, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        divergence, beta, temperature, weight, chunk_tokens = settings
        rows = targets.ne(-100).nonzero().squeeze(-1)
        divergences = torch.zeros(len(rows), device=logits.device)
        cross_entropies = torch.zeros_like(divergences)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        if teacher is None:
            weight = 1.0
        for start in range(0, len(rows), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            row = rows[chunk]
            z = logits[row].float()
            log_q = torch.log_softmax(z, dim=-1)
            target = targets[row].unsqueeze(-1)
            cross_entropies[chunk] = -log_q.gather(-1, target).squeeze(-1)
            total = None
            if teacher is not None and weight < 1.0:
                tempered = log_q if temperature == 1.0 else torch.log_softmax(z.div_(temperature), dim=-1)
                if indices is None:
                    log_p = torch.log_softmax(teacher[row].float().div_(temperature), dim=-1)
                    divergences[chunk], total = divergence(tempered, log_p, beta)
                else:
                    log_p = torch.log_softmax(teacher[row].float(), dim=-1)  # rounding to float16 left them unnormed
                    divergences[chunk], total = over_buckets(divergence, tempered, log_p, indices[row].long(), beta)
                # dz = T^2 * (1 / T) * gradient with respect to z / T
                total.mul_((1.0 - weight) * temperature)
            if gradient is None:
                continue
            if weight > 0.0:
                towards = log_q.exp()
                towards.scatter_add_(-1, target, torch.full_like(target, -1, dtype=towards.dtype))
                total = towards.mul_(weight) if total is None else total.add_(towards, alpha=weight)
            if total is not None:
                gradient[row] = total.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(divergences, cross_entropies)
        loss = (1.0 - weight) * temperature**2 * divergences.sum() + weight * cross_entropies.sum()
        return loss, divergences, cross_entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def over_buckets(
    divergence: Divergence, log_q: Tensor, log_p: Tensor, indices: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """A divergence over k tokens and one bucket of all others, and its gradient with respect to the logits [n, V].

    Merging outcomes can only lower a KL (the data-processing inequality), so this is a lower bound of the full one; no
    mass is lost and none is invented, as when the kept entries are normed alone.

    Args:
        log_q: student's log-probabilities [n, V].
        log_p: teacher's, of k tokens and of the bucket, [n, k + 1].
        indices: those tokens [n, k].
    """
    rest = log_q.scatter(-1, indices, float("-inf"))
    tail = torch.logsumexp(rest, dim=-1, keepdim=True)
    value, gradient = divergence(torch.cat((log_q.gather(-1, indices), tail), dim=-1), log_p, beta)
    # the bucket's "logit" is the logsumexp of the others, whose gradient is a softmax among them
    within = rest.sub_(tail).exp_().mul_(gradient[:, -1:])
    return value, within.scatter_(-1, indices, gradient[:, :-1])


__all__ = ["DIVERGENCES", "DistillationTerms", "TopK", "distillation_loss"]
