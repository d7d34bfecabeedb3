"""State initialisation: what the state is before the first loop.

B batch, S tokens, D hidden size. Evaluation is deterministic: a random start is keyed by (seed, position, channel), so
it does not depend on the batch, on padding, on how the tokens are cut into chunks, or on any generator's state.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from .keyed_random import keyed_uniform
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
        return prelude.new_zeros(*prelude.shape[:-1], self.context.hidden_size)


class RandomState(StateInit):
    """Abstract random start.

    In training every forward draws afresh from torch's generator, as the papers do. In evaluation the draw is a
    function of (seed, position, channel) alone.
    """

    def uniform(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        """Numbers in (0, 1), fp32 [B, S, D], the same for all residual streams."""
        width = self.context.hidden_size
        if self.training:
            drawn = torch.rand(*prelude.shape[:2], width, dtype=torch.float32, device=prelude.device)
            return drawn.clamp_min(2.0**-25)  # torch may draw 0, of which a normal without a cut makes -infinity
        position_ids = position_ids.to(prelude.device).expand(prelude.shape[:2])
        return keyed_uniform(self.params.seed, position_ids, width)


@STATE_INITS.register("normal")
@final
class NormalState(RandomState):
    """s_0 ~ normal, truncated at three standard deviations (Huginn, Parcae's `like-init`) or elsewhere, or not."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        std: standard deviation before truncation.
        seed: key of the draw in evaluation.
        truncation: where the distribution is cut, in standard deviations; `None`: nowhere.
        """

        std: float = 0.02
        seed: int = 0
        truncation: float | None = 3.0

        def __post_init__(self):
            if not self.std >= 0.0:
                raise ValueError(f"std={self.std!r} must not be negative.")
            if not isinstance(self.seed, int):
                raise ValueError(f"seed={self.seed!r} must be an integer.")
            if self.truncation is not None and not 0.0 < self.truncation < math.inf:
                raise ValueError(f"truncation={self.truncation!r} must be None or a positive number.")

    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        uniform = self.uniform(prelude, position_ids)
        cut = math.inf if self.params.truncation is None else self.params.truncation
        return (self.params.std * truncated_normal(uniform, cut=cut)).to(prelude.dtype)


@STATE_INITS.register("unit_normal")
@final
class UnitNormalState(RandomState):
    """s_0 ~ normal, brought to mean 0 and (unbiased) standard deviation 1 in every token (Parcae's `unit`)."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        seed: key of the draw in evaluation.
        """

        seed: int = 0

    def forward(self, prelude: Tensor, position_ids: Tensor) -> Tensor:
        drawn = truncated_normal(self.uniform(prelude, position_ids), cut=math.inf)
        std, mean = torch.std_mean(drawn, dim=-1, keepdim=True)
        return ((drawn - mean) / (std + 1e-8)).to(prelude.dtype)


def truncated_normal(uniform: Tensor, *, cut: float = 3.0) -> Tensor:
    """Map uniform numbers in (0, 1) to a standard normal truncated to [-cut, cut], by the inverse distribution."""
    tail = math.erf(cut / math.sqrt(2.0))
    return math.sqrt(2.0) * torch.erfinv((2.0 * uniform - 1.0) * tail)
