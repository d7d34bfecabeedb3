"""Depth attention: the values of a layer, mixed with those that earlier layers had for the same token.

B batch, S tokens, H query heads, Hkv key-value heads, K head dim.
"""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from torch import Tensor

from .registry import Registry, Strategy

DEPTH_ATTENTIONS: Registry[DepthAttention] = Registry("depth_attention")


class DepthAttention(Strategy):
    """Abstract depth attention."""

    #: Whether layers read what earlier ones had.
    mixes = False

    def is_anchor(self, layer: int) -> bool:
        """Whether later invocations read the keys and values of stored layer `layer`."""
        return False


@DEPTH_ATTENTIONS.register("none")
@final
class NoDepthAttention(DepthAttention):
    """A layer attends to its own values."""


@DEPTH_ATTENTIONS.register("anchors")
@final
class AnchorDepthAttention(DepthAttention):
    r"""v <- \sum_a p_a v_a, p = softmax_a(\bar q \cdot k_a / \sqrt{K}), for each token and key-value head by itself.

    a runs over the anchors that have been invoked so far in this forward, those of earlier loops included, and the
    layer itself; \bar q is the mean of the queries that share the head. What follows (attention over the tokens, the
    cache, and the layer as an anchor) has the mixed values (Nanbeige4.2, arXiv 2607.22083, in its code). Since a token
    reads nothing of other tokens here, a step on a cache needs nothing but the cache.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        stride: every so many stored layers, the first one included, is an anchor.
        """

        stride: int = 2

        def __post_init__(self):
            if self.stride < 1:
                raise ValueError(f"stride={self.stride!r} must be at least 1.")

    mixes = True

    def is_anchor(self, layer: int) -> bool:
        return layer % self.params.stride == 0


def mix_values(query: Tensor, key: Tensor, value: Tensor, anchors: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """The values of a layer, mixed over depth.

    Args:
        query: [B, H, S, K].
        key, value: of the same tokens, [B, Hkv, S, K].
        anchors: keys and values of the anchors, of the same shape.

    Returns:
        [B, Hkv, S, K].
    """
    keys = torch.stack([*(anchor.to(key.device) for anchor, _ in anchors), key])
    values = torch.stack([*(anchor.to(value.device) for _, anchor in anchors), value])
    mean_query = query.unflatten(1, (key.shape[1], -1)).mean(dim=2)
    scores = (mean_query.float() * keys.float()).sum(dim=-1) * query.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=0).to(value.dtype)
    return (weights.unsqueeze(-1) * values).sum(dim=0)


__all__ = ["DEPTH_ATTENTIONS", "DepthAttention", "mix_values"]
