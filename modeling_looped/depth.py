"""Depth: how many loops a call runs, and how many of them count for each of its tokens.

B batch, S tokens, D hidden size, T loops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .slots import checked_num_loops


class DepthRange(NamedTuple):
    """The smallest and the largest depth of a call's tokens, of which it runs the largest for all."""

    smallest: int
    largest: int


class Depth(NamedTuple):
    """The loops of one call.

    A token whose depth is reached keeps its state while others go on. The layers still compute it, as they do in every
    loop under halting rules: other tokens attend to keys and values made from the state that it keeps (as in Parcae's
    code), so no slot ever has a hole. Rows do not see each other, so a row is what it would be alone with its depth.

    Attributes:
        loops: T, loops that the call runs, at least the largest depth.
        each: depth of every row [B, 1, 1] or token [B, S, 1], int64; `None`: all loops count for all.
        shallowest: a depth that none falls short of; `None`: the smallest of `each`.
    """

    loops: int
    each: Tensor | None = None
    shallowest: int | None = None

    @property
    def smallest(self) -> int:
        """A depth that none falls short of."""
        if self.each is None:
            return self.loops
        return int(self.each.min()) if self.shallowest is None else self.shallowest

    def freeze(self, loop: int, previous: Tensor, state: Tensor) -> Tensor:
        """The state after loop `loop` (from 0), which took `previous` to `state`, both [B, S, D]."""
        return torch.where(self.own(state) > loop, state, previous.to(state))

    def first_loop_with_graph(self, backprop_loops: int | None) -> int:
        """The loop from which on something belongs to the last `backprop_loops` loops of a token."""
        if backprop_loops is None:
            return 0
        return self.smallest - backprop_loops

    def truncate(self, loop: int, backprop_loops: int | None, state: Tensor) -> Tensor:
        """`state` after loop `loop`, cut off from it where the loop is not among a token's last `backprop_loops`.

        The truncation is each token's own, and the forward is the same as without it. (Parcae's code lets all tokens
        end at the same time instead: that needs a graph of no more than `backprop_loops` loops, but a token then runs
        its loops at other times than its neighbours, and the core must not know which loop it is in.)
        """
        if backprop_loops is None:
            return state
        return torch.where(self.own(state) - backprop_loops > loop, state.detach(), state)

    def own(self, state: Tensor) -> Tensor:
        """`each`, on the device of `state` and with its number of axes."""
        if self.each is None:
            return torch.as_tensor(self.loops, device=state.device)
        streams = (1,) * (state.ndim - self.each.ndim)
        return self.each.to(state.device).reshape(*self.each.shape[:2], *streams, 1)

    def counts(self, embeds: Tensor) -> Tensor:
        """Loops that each row of `embeds` [B, S, D] ran, int64 [B], or each token, [B, S]."""
        if self.each is None:
            return torch.full(embeds.shape[:1], self.loops, device=embeds.device)
        return self.each.squeeze(-1).squeeze(-1) if self.each.shape[1] == 1 else self.each.squeeze(-1)


def depth_of(num_loops: int | Tensor | Depth, batch: int, length: int) -> Depth:
    """The depth that the argument `num_loops` of a call on [B, S] tokens names.

    Raises:
        ValueError: for anything but an integer of at least 1, or such integers of shape [B] or [B, S].
    """
    if isinstance(num_loops, Depth):
        return num_loops
    if not isinstance(num_loops, Tensor) or num_loops.numel() == 1:
        return Depth(checked_num_loops(num_loops))
    shape = tuple(num_loops.shape)
    if shape not in ((batch,), (batch, length)) or num_loops.is_floating_point() or num_loops.dtype == torch.bool:
        raise ValueError(
            f"num_loops of shape {shape} and {num_loops.dtype} must be an integer, or integers of shape ({batch},) or "
            f"({batch}, {length}): one for each sequence, or for each token."
        )
    smallest, largest = int(num_loops.min()), int(num_loops.max())
    if smallest < 1:
        raise ValueError(f"num_loops contains {smallest}; it must be at least 1 everywhere.")
    return Depth(largest, num_loops.reshape(batch, -1, 1))


def loops_of(num_loops: int | Tensor | Depth) -> int:
    """The number of loops that a call runs, from its argument `num_loops`."""
    if isinstance(num_loops, Depth):
        return num_loops.loops
    if isinstance(num_loops, Tensor) and num_loops.numel() > 1:
        return int(num_loops.max())
    return checked_num_loops(num_loops)


__all__ = ["Depth", "DepthRange", "depth_of", "loops_of"]
