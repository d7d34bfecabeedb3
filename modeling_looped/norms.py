"""Norms: the kinds that looped models use, each with one weight vector or one per loop.

D normalised channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import table_row


class LoopedRMSNorm(nn.Module):
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * w, with one weight vector, or with one per loop.

    Args:
        hidden_size: normalised channels.
        eps: added to the mean square.
        rows: weight vectors, one per loop (later loops use the last); `None`: one for all loops.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, rows: int | None = None):
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.ones(hidden_size if rows is None else (rows, hidden_size)))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        weight = self.weight if self.rows is None else self.weight[table_row(loop_idx, self.rows)]
        # torch's kernel accumulates in fp32 for every dtype and agrees with Llama's five separate operations
        if hidden_states.dtype == weight.dtype:
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        return F.rms_norm(hidden_states, weight.shape, None, self.variance_epsilon) * weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LoopedUnweightedRMSNorm(nn.Module):
    """Root-mean-square norm without a weight (HRM-Text; Parcae's queries and keys).

    Args:
        hidden_size: normalised channels.
        eps: added to the mean square; `None`: the smallest step of the input's dtype, as torch has it.
    """

    def __init__(self, hidden_size: int, eps: float | None = None):
        super().__init__()
        self.hidden_size = hidden_size
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        return F.rms_norm(hidden_states, (self.hidden_size,), None, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}"


class LoopedLayerNorm(nn.Module):
    """Layer norm with a bias, (x - mean(x)) / std * w + b (ALBERT; the Universal Transformer with `unbiased`).

    Args:
        hidden_size: normalised channels.
        eps: added to the variance; with `unbiased`, to the standard deviation.
        rows: pairs of weight and bias, one per loop (later loops use the last); `None`: one for all loops.
        unbiased: whether the standard deviation divides by D - 1, as the Universal Transformer's code has it.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, rows: int | None = None, *, unbiased: bool = False):
        super().__init__()
        shape = (hidden_size,) if rows is None else (rows, hidden_size)
        self.rows = rows
        self.unbiased = unbiased
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.rows is not None:
            row = table_row(loop_idx, self.rows)
            weight, bias = weight[row], bias[row]
        if self.unbiased:
            exact = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            std, mean = torch.std_mean(exact, dim=-1, keepdim=True)
            normed = ((exact - mean) / (std + self.variance_epsilon)).to(hidden_states.dtype)
        elif hidden_states.dtype == weight.dtype:
            return F.layer_norm(hidden_states, weight.shape, weight, bias, self.variance_epsilon)
        else:
            normed = F.layer_norm(hidden_states, weight.shape, None, None, self.variance_epsilon)
        return weight * normed + bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, unbiased={self.unbiased}"


Norm = LoopedRMSNorm | LoopedUnweightedRMSNorm | LoopedLayerNorm

#: Values of `config.norm_type`.
NORM_TYPES = ("rms", "rms_unweighted", "layer", "layer_unbiased")


def build_norm(norm_type: str, hidden_size: int, eps: float, rows: int | None = None) -> Norm:
    """The norm that `config.norm_type` names, over `hidden_size` channels."""
    match norm_type:
        case "rms":
            return LoopedRMSNorm(hidden_size, eps, rows)
        case "rms_unweighted":
            return LoopedUnweightedRMSNorm(hidden_size, eps)
        case "layer" | "layer_unbiased":
            return LoopedLayerNorm(hidden_size, eps, rows, unbiased=norm_type == "layer_unbiased")
        case _:
            raise ValueError(f"norm_type={norm_type!r} must be one of: {', '.join(NORM_TYPES)}.")


__all__ = ["NORM_TYPES", "LoopedLayerNorm", "LoopedRMSNorm", "LoopedUnweightedRMSNorm", "Norm", "build_norm"]
