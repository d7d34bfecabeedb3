"""Schedule: in which order the layers of the core run, and on which state.

B batch, S tokens, D hidden size, T loops. `SlotLayout.turns` says which layers run when; a schedule says what they
read and write.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, Strategy

SCHEDULES: Registry[Schedule] = Registry("schedule")


class Schedule(Strategy):
    """Abstract schedule."""

    @abstractmethod
    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        """The states before the first loop, each [B, S, D]. The first is the one that halting and coda read."""

    @abstractmethod
    def read(self, states: tuple[Tensor, ...], own: int) -> Tensor:
        """What the layers that write state number `own` read, [B, S, D]."""


@SCHEDULES.register("flat")
@final
class FlatSchedule(Schedule):
    """One state; the core, or each group of it, runs T times."""

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        return (state,)

    def read(self, states: tuple[Tensor, ...], own: int) -> Tensor:
        return states[0]


@SCHEDULES.register("nested")
@final
class NestedSchedule(Schedule):
    r"""Two states and two halves of the core: a slow one, and a fast one that runs several times in each loop.

    In every loop z_L <- F_L(z_L + z_H) runs `inner_loops` times with the first half of the core's layers, then
    z_H <- F_H(z_H + z_L) once with the second half (HRM-Text, Transformers' `hrm_text`). z_H starts as the state of
    `state_init`, z_L as one vector for all tokens, which is zero and not trained.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        inner_loops: runs of the fast half in one loop.
        """

        inner_loops: int = 1

        def __post_init__(self):
            if self.inner_loops < 1:
                raise ValueError(f"inner_loops={self.inner_loops} must be at least 1.")

    def __init__(self, params, context):
        super().__init__(params, context)
        # a buffer: a parameter that is not trained would be after loading
        self.low_state = nn.Buffer(torch.empty(context.hidden_size))

    def init_weights(self) -> None:
        init.zeros_(self.low_state)

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        return (state, self.low_state.to(state).expand_as(state))

    def read(self, states: tuple[Tensor, ...], own: int) -> Tensor:
        return states[own] + states[1 - own].to(states[own].device)


__all__ = ["SCHEDULES", "Schedule"]
