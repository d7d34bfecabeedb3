"""Merging: one weight for the several teacher layers that a shared layer stands for, and what sharing loses.

T loops; a weight is [out, in] (a projection) or [channels] (a bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Weights of the teacher layers in loop order, and the second moments [in, in] of their inputs -> the shared weight.
Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class InitialError(NamedTuple):
    """What one projection of the compressed model is off, in one loop.

    Attributes:
        core_layer, loop: counted from 0.
        teacher_layer: the layer that it stands for there.
        projection: its name.
        shared: relative error of the shared weight alone.
        adapted: the same with the loop's low-rank difference.
    """

    core_layer: int
    loop: int
    teacher_layer: int
    projection: str
    shared: float
    adapted: float


def average(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """The mean: nearest to all of them, every entry counting the same."""
    return torch.stack([weight.float() for weight in weights]).mean(dim=0)


def first(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """That of the first loop's layer."""
    return weights[0].float()


def last(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """That of the last loop's layer."""
    return weights[-1].float()


def middle(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """That of the middle loop's layer."""
    return weights[len(weights) // 2].float()


def least_squares(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    r"""The W that minimises \sum_t E |W x_t - W_t x_t|^2 over the inputs x_t that layer t really sees.

    With C_t = E[x_t x_t^T] it is (\sum_t W_t C_t) (\sum_t C_t)^{-1}: an average in which every layer counts in the
    directions where its inputs are large (the idea of RegMean, arXiv 2212.09849). A small multiple of the identity
    keeps directions that no input has at the plain average.
    """
    if weights[0].ndim == 1:  # a bias has no input
        return average(weights, moments)
    ridge = [1e-4 * moment.diagonal().mean().double() for moment in moments]
    identity = torch.eye(len(moments[0]), dtype=torch.float64, device=moments[0].device)
    regular = [moment.double() + amount * identity for moment, amount in zip(moments, ridge, strict=True)]
    weighted = sum(weight.double() @ moment for weight, moment in zip(weights, regular, strict=True))
    return torch.linalg.solve(sum(regular), weighted, left=False).float()


MERGES: dict[str, Merge] = {
    "average": average,
    "first": first,
    "last": last,
    "middle": middle,
    "least_squares": least_squares,
}

#: Rules that need the moments.
CALIBRATED_MERGES = frozenset({"least_squares"})


def low_rank(difference: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Factors B [out, r], A [r, in] with B A near a difference D [out, in]; beyond its full rank they hold zeros.

    Without a moment it is the truncated singular value decomposition, which minimises |D - B A|. With C = E[x x^T] it
    minimises E |D x - B A x|^2: for C = L L^T the decomposition is that of D L, and A = V^T L^{-1} (data-aware
    low-rank compression, as in SVD-LLM, arXiv 2403.07378).
    """
    exact = difference.double()
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp_min(1e-6 * values.max().clamp_min(1e-12)).sqrt()
        left, singular, right = torch.linalg.svd(exact @ vectors * values, full_matrices=False)
        # Where inputs hardly reach, A is large. The product's own decomposition loses fewest digits in float32.
        outer, upper = torch.linalg.qr(left[:, :rank] * singular[:rank])
        inner, lower = torch.linalg.qr((right[:rank] / values @ vectors.T).T)
        left, singular, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        left, right = outer @ left, right @ inner.T
    else:
        left, singular, right = torch.linalg.svd(exact, full_matrices=False)
    kept = min(rank, len(singular))
    root = singular[:kept].sqrt()
    B = torch.zeros(exact.shape[0], rank, dtype=torch.float64, device=exact.device)
    A = torch.zeros(rank, exact.shape[1], dtype=torch.float64, device=exact.device)
    B[:, :kept], A[:kept] = left[:, :kept] * root, root[:, None] * right[:kept]
    return B.float(), A.float()


def relative_error(difference: Tensor, weight: Tensor, moment: Tensor | None = None) -> float:
    r"""sqrt(E |D x|^2 / E |W x|^2) of an error D in a weight W; without a moment all directions count alike."""
    if moment is None:
        return (difference.double().norm() / weight.double().norm().clamp_min(1e-30)).item()
    exact = moment.double()
    error = torch.einsum("oi,ij,oj->", difference.double(), exact, difference.double())
    whole = torch.einsum("oi,ij,oj->", weight.double(), exact, weight.double())
    return (error.clamp_min(0) / whole.clamp_min(1e-30)).sqrt().item()


__all__ = ["CALIBRATED_MERGES", "MERGES", "InitialError", "Merge", "low_rank", "relative_error"]
