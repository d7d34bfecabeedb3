"""Value embeddings: what the attention values of a layer know of the token itself.

B batch, S tokens, Hkv key-value heads, K head dim. A layer may own a second embedding table whose row for the token is
added to the values of its attention, weighed by a gate per head. Every loop reads the same row.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from .registry import Registry, Strategy

VALUE_EMBEDDINGS: Registry[ValueEmbedding] = Registry("value_embedding")


class ValueEmbedding(Strategy):
    """Abstract value embedding."""

    @abstractmethod
    def gate(self, layer: int) -> nn.Linear | None:
        """The gate that the attention of stored layer `layer` owns, if the layer has a table."""

    @abstractmethod
    def forward(self, input_ids: Tensor | None) -> dict[int, Tensor]:
        """Rows [B, S, Hkv * K] of the tokens [B, S], by stored layer."""


@VALUE_EMBEDDINGS.register("none")
@final
class NoValueEmbedding(ValueEmbedding):
    """No layer has a table."""

    def gate(self, layer: int) -> nn.Linear | None:
        return None

    def forward(self, input_ids: Tensor | None) -> dict[int, Tensor]:
        return {}


@VALUE_EMBEDDINGS.register("gated")
@final
class GatedValueEmbedding(ValueEmbedding):
    r"""v <- v + 2 \sigma(W_g h_{1..c}) E[token], one gate per key-value head (the code of Parcae, arXiv 2604.12946).

    h is the input of the attention, of which the gate sees the first c = `gate_channels` channels.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        layers: stored layers (prelude, core, coda, counted from 0) that own a table.
        gate_channels: c.
        """

        layers: tuple[int, ...] = (0,)
        gate_channels: int = 32

        def __post_init__(self):
            if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
                raise ValueError(f"layers={list(self.layers)} must be different stored layers, counted from 0.")
            if self.gate_channels < 1:
                raise ValueError(f"gate_channels={self.gate_channels} must be at least 1.")

    def __init__(self, params, context):
        super().__init__(params, context)
        for layer in params.layers:
            shape = context.layer_shapes[layer]
            self.add_module(str(layer), nn.Embedding(context.vocab_size, shape.num_key_value_heads * shape.head_dim))

    def gate(self, layer: int) -> nn.Linear | None:
        if layer not in self.params.layers:
            return None
        heads = self.context.layer_shapes[layer].num_key_value_heads
        return nn.Linear(self.params.gate_channels, heads, bias=False)

    def forward(self, input_ids: Tensor | None) -> dict[int, Tensor]:
        if input_ids is None:
            raise ValueError(
                "value_embedding='gated' reads the token ids in its layers: pass input_ids (inputs_embeds alone do "
                "not say which tokens they are)."
            )
        return {layer: self.get_submodule(str(layer))(input_ids) for layer in self.params.layers}


def gated_token_value(gate: nn.Linear, hidden_states: Tensor, token_value: Tensor) -> Tensor:
    """What a layer adds to its values.

    Args:
        gate: from the first channels of the attention's input to one number per key-value head.
        hidden_states: input of the attention, [B, S, D].
        token_value: rows of the layer's table, [B, S, Hkv * K].

    Returns:
        [B, S, Hkv, K].
    """
    weight = 2.0 * torch.sigmoid(gate(hidden_states[..., : gate.in_features]))
    return weight.unsqueeze(-1) * token_value.view(*weight.shape, -1)


__all__ = ["VALUE_EMBEDDINGS", "ValueEmbedding", "gated_token_value"]
