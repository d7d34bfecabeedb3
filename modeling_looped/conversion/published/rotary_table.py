"""The rotary table that Huginn and Parcae store beside their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def interleaved_table(head_dim: int, positions: int, *, theta: float, condense: float = 1.0) -> Tensor:
    """Cosines and sines of the angles p theta^(-2j / K) / condense at position p, fp32 [1, positions, 1, K / 2, 2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32) / condense, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]


__all__ = ["interleaved_table"]
