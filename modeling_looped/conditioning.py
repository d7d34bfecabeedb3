"""Loop conditioning: how the shared layers learn which loop they are in.

T loops, D hidden size; loop indices count from 0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import final

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, Strategy, check_table_loops, table_row

LOOP_CONDITIONINGS: Registry[LoopConditioning] = Registry("loop_conditioning")


@dataclasses.dataclass(frozen=True)
class TableParams:
    """Parameters of a conditioning with one table row per loop.

    Attributes:
        table_loops: loops with a row of their own (`None`: the config's `num_loops`).
    """

    table_loops: int | None = None

    def __post_init__(self):
        check_table_loops(self.table_loops)


class LoopConditioning(Strategy):
    """Abstract conditioning: may add a signal to the core's input, and may give its norms one weight per loop."""

    #: Whether the signal changes the state, so that the loop cannot be unrolled into a plain stack.
    adds_signal = False

    @property
    def norm_rows(self) -> int | None:
        """Weights that each norm of the core keeps, one per loop; `None`: one for all loops."""
        return None

    def forward(self, hidden_states: Tensor, loop_idx: int, position_ids: Tensor) -> Tensor:
        """The core's input [B, S, D] in loop `loop_idx`, of tokens at `position_ids` [B or 1, S]."""
        return hidden_states


@LOOP_CONDITIONINGS.register("none")
@final
class NoConditioning(LoopConditioning):
    """Every loop is alike."""


@LOOP_CONDITIONINGS.register("embedding")
@final
class LoopEmbedding(LoopConditioning):
    """x <- x + E[t], E a learned [T, D] table that starts at zero."""

    Params = TableParams
    adds_signal = True

    def __init__(self, params, context):
        super().__init__(params, context)
        self.embedding = nn.Parameter(torch.empty(params.table_loops, context.hidden_size))

    def init_weights(self) -> None:
        init.zeros_(self.embedding)

    def forward(self, hidden_states: Tensor, loop_idx: int, position_ids: Tensor) -> Tensor:
        return hidden_states + self.embedding[table_row(loop_idx, self.params.table_loops)].to(hidden_states.dtype)


@LOOP_CONDITIONINGS.register("sinusoidal")
@final
class SinusoidalTime(LoopConditioning):
    """x <- x + scale * [sin(t w) | cos(t w)], w_k = exp(-k ln(10^4) / (D/2 - 1)).

    The time signal of the Universal Transformer (arXiv 1807.03819, equation 6, in the layout of its code). It has no
    parameters and is defined at every loop, trained or not.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        scale: factor in front of the signal.
        positions: `none`, or `every_loop`: the same signal of the token's position is added too, in every loop.
        """

        scale: float = 1.0
        positions: str = "none"

        def __post_init__(self):
            if not math.isfinite(self.scale):
                raise ValueError(f"scale={self.scale!r} must be a finite number.")
            if self.positions not in ("none", "every_loop"):
                raise ValueError(f"positions={self.positions!r} must be one of: none, every_loop.")

    adds_signal = True

    def forward(self, hidden_states: Tensor, loop_idx: int, position_ids: Tensor) -> Tensor:
        signal = self.signal(torch.full((1, 1), loop_idx, device=hidden_states.device))
        if self.params.positions == "every_loop":
            signal = signal + self.signal(position_ids.to(hidden_states.device))
        if hidden_states.ndim > signal.ndim:  # the same for all residual streams
            signal = signal.unsqueeze(-2)
        return hidden_states + (self.params.scale * signal).to(hidden_states.dtype)

    def signal(self, times: Tensor) -> Tensor:
        """Times [B, S] -> signals [B, S, D], fp32. An odd width keeps its last channel."""
        half = self.context.hidden_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=times.device) / max(half - 1, 1)
        angles = times.float().unsqueeze(-1) * torch.exp(exponent * -math.log(1e4))
        signal = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return nn.functional.pad(signal, (0, self.context.hidden_size - 2 * half))


@LOOP_CONDITIONINGS.register("norms")
@final
class PerLoopNorms(LoopConditioning):
    """Every norm of the core keeps one weight vector per loop; the projections stay shared."""

    Params = TableParams

    @property
    def norm_rows(self) -> int | None:
        return self.params.table_loops
