"""State initialisation: what the state is before the first loop.

B batch, S tokens, D hidden size. Evaluation is deterministic: a random start is keyed by (seed, position, channel), so
it does not depend on the batch, on padding, on how the tokens are cut into chunks, or on any generator's state.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import TypeVar, final

import torch
from torch import Tensor

from .registry import Registry, Strategy

STATE_INITS: Registry[StateInit] = Registry("state_init")


class StateInit(Strategy):
    """Abstract state initialisation."""

    #: Whether the first state is the prelude output, so that a gradient reaches the prelude through it.
    carries_prelude = False

    @abstractmethod
    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        """First state [B, S, D] for the prelude output [B, S, D] of tokens at `position_ids` [B or 1, S]."""


@STATE_INITS.register("input")
@final
class InputState(StateInit):
    """s_0 = e: the state is the residual stream itself (stacked checkpoints looped in place, Ouro, Nanbeige)."""

    carries_prelude = True

    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        return prelude


@STATE_INITS.register("zeros")
@final
class ZeroState(StateInit):
    """s_0 = 0."""

    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        return torch.zeros_like(prelude)


@STATE_INITS.register("normal")
@final
class NormalState(StateInit):
    """s_0 ~ truncated normal, cut at three standard deviations (Huginn, Parcae's `like-init`).

    In training every forward draws afresh from torch's generator, as those papers do. In evaluation the draw is a
    function of (seed, position, channel) alone.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        std: standard deviation before truncation.
        seed: key of the draw in evaluation.
        """

        std: float = 0.02
        seed: int = 0

        def __post_init__(self):
            if not self.std >= 0.0:
                raise ValueError(f"std={self.std!r} must not be negative.")
            if not isinstance(self.seed, int):
                raise ValueError(f"seed={self.seed!r} must be an integer.")

    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        if self.training:
            uniform = torch.rand(prelude.shape, dtype=torch.float32, device=prelude.device)
        else:
            position_ids = position_ids.to(prelude.device).expand(prelude.shape[:2])
            uniform = keyed_uniform(self.params.seed, position_ids, prelude.shape[-1])
        return (self.params.std * truncated_normal(uniform)).to(prelude.dtype)


def truncated_normal(uniform: Tensor, *, cut: float = 3.0) -> Tensor:
    """Map uniform numbers in (0, 1) to a standard normal truncated to [-cut, cut], by the inverse distribution."""
    tail = math.erf(cut / math.sqrt(2.0))
    return math.sqrt(2.0) * torch.erfinv((2.0 * uniform - 1.0) * tail)


def keyed_uniform(seed: int, position_ids: Tensor, channels: int) -> Tensor:
    """Uniform numbers in (0, 1) that depend on (seed, position, channel) only.

    A counter-based generator: the key goes through rounds of a 31-bit multiply-xorshift mixer (the constants are those
    of Wellons' `lowbias32`, held to 31 bits so that int64 products cannot overflow on any backend). Position, seed and
    channel are mixed before they meet, so that no seed's numbers are another's, shifted.

    Args:
        position_ids: integers of shape [B, S].
        channels: D.

    Returns:
        fp32 of shape [B, S, D].
    """
    channel = torch.arange(channels, device=position_ids.device, dtype=torch.int64)
    key = _mix(_mix(seed & _MASK) ^ ((seed >> 31) & _MASK))
    hashed = _mix(_mix(position_ids.to(torch.int64).unsqueeze(-1) & _MASK) ^ key)
    hashed = _mix(hashed ^ _mix(channel))
    return ((hashed >> 8).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits and a half: all that fp32 holds below 1


_MASK = (1 << 31) - 1

Bits = TypeVar("Bits", Tensor, int)


def _mix(value: Bits) -> Bits:
    # the constant keeps 0 from staying 0
    value = (value + 0x3C6EF372) & _MASK
    for multiplier, shift in ((0x7FEB352D, 15), (0x046CA68B, 16)):
        value = value ^ (value >> shift)
        value = (value * multiplier) & _MASK
    return value ^ (value >> 16)
