"""Rotary position embeddings.

B batch, S tokens, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_looped import LoopedConfig


class LoopedRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, for every rope type that Transformers knows."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type: str = rope_parameters(config)["rope_type"]
        rope_init: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LoopedConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies of plain RoPE, over the first `partial_rotary_factor` of the head's channels."""
        parameters = rope_parameters(config)
        dim = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn: Callable, recurse: bool = True):
        """As in torch, except that `model.bfloat16()` leaves the frequencies in fp32: rounded to eight bits, they
        would be off by almost a radian at position 2000.
        """
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`position_ids` [B or 1, S] -> cosines and signed sines [B or 1, S, rotated channels], in the dtype of `x`.

        The sines of the first half are negated, which is all that `rotate_half` adds to swapping the halves.
        """
        positions = position_ids[..., None].to(device=x.device, dtype=torch.float)
        angles = positions * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def rope_parameters(config: LoopedConfig) -> dict[str, Any]:
    """The config's rope parameters, which Transformers has completed by the time a model is built."""
    return dict(config.rope_parameters or {})


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of `x` [B, H, S, K] by `cos` and signed `sin` [B, 1, S, R], R <= K."""
    rotated_channels = cos.shape[-1]
    if rotated_channels < x.shape[-1]:
        rotated, rest = x[..., :rotated_channels], x[..., rotated_channels:]
        return torch.cat((apply_rotary(rotated, cos, sin), rest), dim=-1)
    return torch.addcmul(x * cos, x.roll(rotated_channels // 2, dims=-1), sin)
