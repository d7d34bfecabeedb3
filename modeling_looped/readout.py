"""Readout: the map from the last state to the coda's input (Parcae's matrix C, arXiv 2604.12946)."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, Strategy

READOUTS: Registry[Readout] = Registry("readout")


class Readout(Strategy):
    """Abstract readout."""

    @abstractmethod
    def forward(self, state: Tensor) -> Tensor:
        """The coda's input from the last state; both [B, S, D]."""


@READOUTS.register("none")
@final
class NoReadout(Readout):
    """The state itself."""

    def forward(self, state: Tensor) -> Tensor:
        return state


@READOUTS.register("linear")
@final
class LinearReadout(Readout):
    """C s with a [D, D] matrix ([D_coda, D_state] where the widths differ) that starts as the identity."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        bias: whether a vector, which starts at zero, is added.
        """

        bias: bool = False

    def __init__(self, params, context):
        super().__init__(params, context)
        self.weight = nn.Parameter(torch.empty(context.prelude_size, context.hidden_size))
        self.bias = nn.Parameter(torch.empty(context.prelude_size)) if params.bias else None

    def init_weights(self) -> None:
        init.copy_(self.weight, torch.eye(*self.weight.shape))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, state: Tensor) -> Tensor:
        return F.linear(state, self.weight, self.bias)
