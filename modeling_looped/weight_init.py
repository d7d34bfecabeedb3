"""Random weights: how linear maps and embeddings start when a model is not loaded.

s is `config.initializer_range`, N the number of layers that one forward runs at `config.num_loops` (the effective
depth), and a weight has the shape [rows, columns].

| `weight_init` | linear and embedding weights |
|---|---|
| `normal` | N(0, s^2): Transformers' default |
| `truncated_normal` | N(0, s^2), cut at three standard deviations: Huginn (arXiv 2502.05171) |
| `orthogonal` | s sqrt(max(rows, columns)) Q with orthonormal rows or columns, of root mean square s: Parcae's code |

| `output_projection_init` | the maps with which attention and MLP write to the residual stream |
|---|---|
| `normal` | as all others |
| `depth_scaled` | as all others, with s / sqrt(2 N): 2 N of them add up (GPT-2, Huginn, `scaled` in Parcae's code) |
| `zeros` | 0, so that every layer starts as the identity: the released Parcae (arXiv 2604.12946; `scaled-zero`) |

A looped layer counts in N as often as it runs, which makes this depth-aware: its weights are drawn once, but its
output is added in every loop.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

if TYPE_CHECKING:
    from .configuration_looped import LoopedConfig

WEIGHT_INITS = ("normal", "truncated_normal", "orthogonal")
OUTPUT_PROJECTION_INITS = ("normal", "depth_scaled", "zeros")

#: Names of the maps whose output is added to the residual stream, in the modules that own them.
OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


def mark_output_projections(layer: nn.Module) -> None:
    """Mark the maps of a layer that write to the residual stream.

    Transformers asks modules that own parameters how they start, and no other (of code outside of its package), so a
    linear map must know by itself what it is for.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[-1] in OUTPUT_PROJECTIONS:
            marked: Any = module
            marked.writes_residual = True


def init_weights(module: nn.Module, config: LoopedConfig) -> None:
    """Draw the weight of a linear map or an embedding as the tables above say; Transformers has made it `normal`."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return
    std, kind = config.initializer_range, config.weight_init
    scheme = config.output_projection_init if getattr(module, "writes_residual", False) else "normal"
    if scheme == "zeros":
        init.zeros_(module.weight)
    elif scheme == "depth_scaled":
        draw(module.weight, kind, std / math.sqrt(2 * config.slot_layout().num_invocations))
    elif kind != "normal":
        draw(module.weight, kind, std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and is_open(module.weight):
            init.zeros_(module.weight[module.padding_idx])


def draw(weight: Tensor, kind: str, std: float) -> None:
    """Fill `weight` with random numbers of root mean square `std` (before they are cut), unless it was loaded.

    Args:
        weight: [rows, columns].
        kind: one of `WEIGHT_INITS`.
        std: at least 0.
    """
    if not is_open(weight):
        return
    if kind == "normal":
        init.normal_(weight, mean=0.0, std=std)
    elif kind == "truncated_normal":
        if std == 0.0:
            init.zeros_(weight)  # torch divides by it
        else:
            init.trunc_normal_(weight, mean=0.0, std=std, a=-3.0 * std, b=3.0 * std)
    else:
        # in fp32: torch has no orthogonal matrices in half precision
        drawn = torch.empty_like(weight, dtype=torch.float32)
        init.copy_(weight, torch.nn.init.orthogonal_(drawn, gain=std * math.sqrt(max(weight.shape))))


def is_open(weight: Tensor) -> bool:
    """Whether a weight is still to be initialised: those that were loaded carry Transformers' mark."""
    return not getattr(weight, "_is_hf_initialized", False)


__all__ = ["OUTPUT_PROJECTION_INITS", "WEIGHT_INITS", "init_weights", "mark_output_projections"]
