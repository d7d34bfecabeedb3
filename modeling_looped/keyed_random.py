"""Random numbers that are a function of a key: no generator, no state, the same on every device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

#: Numbers are mixed as 31-bit integers, so that int64 products cannot overflow on any backend.
MASK = (1 << 31) - 1

Bits = TypeVar("Bits", Tensor, int)


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
    key = mix(mix(seed & MASK) ^ ((seed >> 31) & MASK))
    hashed = mix(mix(position_ids.to(torch.int64).unsqueeze(-1) & MASK) ^ key)
    hashed = mix(hashed ^ mix(channel))
    return ((hashed >> 8).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits and a half: all that fp32 holds below 1


def mix(value: Bits) -> Bits:
    """A 31-bit hash of 31-bit integers."""
    # the constant keeps 0 from staying 0
    value = (value + 0x3C6EF372) & MASK
    for multiplier, shift in ((0x7FEB352D, 15), (0x046CA68B, 16)):
        value = value ^ (value >> shift)
        value = (value * multiplier) & MASK
    return value ^ (value >> 16)
