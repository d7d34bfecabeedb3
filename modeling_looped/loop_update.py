"""Loop update: how the core's output becomes the next state.

T loops, D hidden size. With s the state before the loop, y the core's output on the injected state, both [B, S, D],
an update gives the next s. Loop indices count from 0.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, Strategy, check_table_loops, table_row

LOOP_UPDATES: Registry[LoopUpdate] = Registry("loop_update")


class LoopUpdate(Strategy):
    """Abstract loop update."""

    @abstractmethod
    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        """Next state from the previous `state` and the core's `output`; all [B, S, D].

        `num_loops` is the number of loops of the call, or of each row [B, 1, 1] or token [B, S, 1]; `group`: which of
        the groups of core layers that loop one after the other has run (`core_group_size`).
        """

    @abstractmethod
    def is_replace(self, num_loops: int) -> bool:
        """Whether with `num_loops` loops every update is s <- y, so that the model unrolls into a plain stack."""


def mixed(state: Tensor, output: Tensor, step: Tensor | float) -> Tensor:
    """s + step * (y - s) for a number, or one per channel or token, in the wider of the dtypes of s and y.

    They differ under autocast alone, where a matrix product is in half precision and a sum or a norm is not. The wider
    one, since many small steps add up in the state, and those below half a unit in the last place would be lost.
    """
    wider = torch.promote_types(state.dtype, output.dtype)
    return torch.lerp(state.to(wider), output.to(wider), step.to(wider) if isinstance(step, Tensor) else step)


@LOOP_UPDATES.register("replace")
@final
class ReplaceUpdate(LoopUpdate):
    """s <- y."""

    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        return output

    def is_replace(self, num_loops: int) -> bool:
        return True


@LOOP_UPDATES.register("recursion_encoding")
@final
class RecursionEncodingUpdate(LoopUpdate):
    """s <- c_t * y with a learned vector c_t per loop, which starts at one; where groups of core layers loop one after
    the other, each group has its own.

    The recursion encoding of Mixture-of-Recursions' code (arXiv 2507.10524, `relaxation/recursion_encoding`).
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        table_loops: loops with a vector of their own (`None`: the config's `num_loops`).
        """

        table_loops: int | None = None

        def __post_init__(self):
            check_table_loops(self.table_loops)

    def __init__(self, params, context):
        super().__init__(params, context)
        self.encoding = nn.Parameter(torch.empty(params.table_loops, context.core_groups, context.hidden_size))

    def init_weights(self) -> None:
        init.ones_(self.encoding)

    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        return output * self.encoding[table_row(loop_idx, self.params.table_loops), group].to(output.dtype)

    def is_replace(self, num_loops: int) -> bool:
        return False


@LOOP_UPDATES.register("damped")
@final
class DampedUpdate(LoopUpdate):
    """s <- (1 - 1/K) s + (1/K) y: K Euler steps that share one step's length.

    This is what lets the middle of a stacked checkpoint run more than once without training ("Training-free looped
    transformers", arXiv 2605.23872). With one loop and K = T it is s <- y, the stacked model itself.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        steps: K; `None` means the number of loops of the call.
        """

        steps: int | None = None

        def __post_init__(self):
            if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
                raise ValueError(f"steps={self.steps!r} must be None (the loop count) or an integer of at least 1.")

    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        step = 1.0 / (self.params.steps or num_loops)
        return mixed(state, output, step)

    def is_replace(self, num_loops: int) -> bool:
        return (self.params.steps or num_loops) == 1


@LOOP_UPDATES.register("learned_scale")
@final
class LearnedScaleUpdate(LoopUpdate):
    """s <- s + a_t * (y - s) with a learned scale a_t per loop and channel, all starting at `initial_scale`."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        initial_scale: value of every a_t at initialisation; 1 is s <- y.
        table_loops: loops with a scale of their own (`None`: the config's `num_loops`).
        """

        initial_scale: float = 1.0
        table_loops: int | None = None

        def __post_init__(self):
            if not math.isfinite(self.initial_scale):
                raise ValueError(f"initial_scale={self.initial_scale!r} must be a finite number.")
            check_table_loops(self.table_loops)

    def __init__(self, params, context):
        super().__init__(params, context)
        self.scale = nn.Parameter(torch.empty(params.table_loops, context.hidden_size))

    def init_weights(self) -> None:
        init.constant_(self.scale, self.params.initial_scale)

    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        return mixed(state, output, self.scale[table_row(loop_idx, self.params.table_loops)])

    def is_replace(self, num_loops: int) -> bool:
        return False


@LOOP_UPDATES.register("gated")
@final
class GatedUpdate(LoopUpdate):
    """s <- s + g * (y - s), g = sigmoid(gate) in (0, 1) per channel; the first `free_loops` loops take y whole.

    With `free_loops=1` one loop is the ungated model and later loops enter through the gate, so extra depth starts
    almost as the identity (the convex combination of LoopUS, arXiv 2605.11011, with a gate that does not look at its
    input).
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        initial_gate: g at initialisation, in (0, 1).
        free_loops: leading loops without a gate.
        """

        initial_gate: float = 0.1
        free_loops: int = 0

        def __post_init__(self):
            if not 0.0 < self.initial_gate < 1.0:
                raise ValueError(f"initial_gate={self.initial_gate!r} must lie strictly between 0 and 1.")
            if not isinstance(self.free_loops, int) or self.free_loops < 0:
                raise ValueError(f"free_loops={self.free_loops!r} must be an integer of at least 0.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.gate = nn.Parameter(torch.empty(context.hidden_size))

    def init_weights(self) -> None:
        init.constant_(self.gate, math.log(self.params.initial_gate / (1.0 - self.params.initial_gate)))

    def forward(self, state: Tensor, output: Tensor, loop_idx: int, num_loops: int | Tensor, group: int = 0) -> Tensor:
        gate = torch.sigmoid(self.gate.float())
        if loop_idx < self.params.free_loops:
            # A gate that a short run never opens still gets a (zero) gradient, as DDP and the Trainer expect.
            gate = gate * 0.0 + 1.0
        return mixed(state, output, gate)

    def is_replace(self, num_loops: int) -> bool:
        return num_loops <= self.params.free_loops
