"""Cross-attention: how the layers of a decoder read the output of an encoder.

B batch, S tokens of the decoder, E tokens of the encoder, D hidden size, H heads, K head dim. `loop_idx` counts from
0; nothing is written to a module during a forward.

The encoder's output is the same in every loop, and so, as a rule, are its keys and values: a layer makes them in its
first loop and hands them on. In a cache they lie in the slot of that loop, and the slots of later loops stay empty.
Only where a loop adapter or norms per loop change keys or values does every slot hold its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention_forward, normed_heads, query_and_key_norms
from .configuration_looped import LoopedConfig
from .inputs import PACKED_BY
from .loop_adapter import LoopAdapter, add_adapter, build_adapters


class EncoderStates(NamedTuple):
    """What all cross-attentions of one forward read.

    Attributes:
        hidden: output of the encoder [B, E, D of the encoder].
        mask: which of its tokens are seen, as the attention implementation wants it; `None`: all.
        cache: where keys and values are kept; `None`: nowhere.
    """

    hidden: Tensor
    mask: Any
    cache: EncoderDecoderCache | None


class CrossAttention(nn.Module):
    """Grouped-query attention to an encoder's output, with one set of projections for all loops.

    With x the decoder's stream and e the encoder's output, o(softmax(q(x) k(e)^T / sqrt(K)) v(e)) (Attention Is All
    You Need, arXiv 1706.03762, section 3.2.3; every loop of the Universal Transformer's decoder has it, arXiv
    1807.03819, section 2.2).
    Heads, biases, clipping and QK norm are those of the layer's self-attention. Nothing is rotated, since the two
    sequences have no common positions, and `attention_gate` and `value_embedding` act on self-attention alone.

    Args:
        config: of the model.
        layer: number of the layer among the stored ones.
        norm_rows: weights per QK norm, one per loop (`None`: one for all).
        adapter: the config's loop adapter, for layers of the core; its targets are the projections of these names too.

    Attributes:
        varies: whether keys and values differ from loop to loop.
    """

    is_causal = False

    def __init__(self, config: LoopedConfig, layer: int, norm_rows: int | None, adapter: LoopAdapter | None):
        super().__init__()
        self.config = config
        self.layer = layer
        shape = config.layer_shape(layer)
        self.head_dim = config.head_dim
        self.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.qkv_clip = config.qkv_clip
        self.qk_norm = config.qk_norm

        width, source = shape.hidden_size, config.cross_attention_hidden_size or config.hidden_size
        query_size = shape.num_attention_heads * config.head_dim
        key_value_size = shape.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(source, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(source, key_value_size, bias=config.attention_value_bias)
        self.o_proj = nn.Linear(query_size, width, bias=config.attention_output_bias)
        self.loop_adapters = build_adapters(self, ("q_proj", "k_proj", "v_proj", "o_proj"), adapter)
        self.q_norm, self.k_norm = query_and_key_norms(config, query_size, key_value_size, norm_rows)
        norm_varies = norm_rows is not None and self.qk_norm in ("per_head", "flat")
        adapted = "k_proj" in self.loop_adapters or "v_proj" in self.loop_adapters
        self.varies = config.kv_sharing == "none" and (norm_varies or adapted)

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        loop_idx: int,
        encoder: EncoderStates,
        key_value: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """One invocation.

        Args:
            hidden_states: [B, S, D].
            slot: address of this invocation.
            loop_idx: loop it belongs to.
            encoder: what is attended to.
            key_value: keys and values that an earlier loop made, unless they vary.

        Returns:
            [B, S, D]; the attention weights [B, H, S, E] if the implementation gives them; the keys and values
            attended to, each [B, Hkv, E, K].
        """
        query = self._project("q_proj", hidden_states, loop_idx)
        query = normed_heads(query, self.q_norm, self.qk_norm, self.head_dim, self.qkv_clip, loop_idx)
        key, value = self.key_value(slot, loop_idx, encoder) if key_value is None else key_value
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            encoder.mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        attended = attended.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self._project("o_proj", attended, loop_idx), weights, (key, value)

    def key_value(self, slot: int, loop_idx: int, encoder: EncoderStates) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, each [B, Hkv, E, K]: from the cache, or made and put there."""
        cache, hidden = encoder.cache, encoder.hidden
        length = hidden.shape[1]
        if cache is not None and cache.is_updated.get(slot):
            kept: Any = cache.cross_attention_cache.layers[slot]
            # an offloaded cache keeps them elsewhere, and a static one may be longer than this encoder's output
            return kept.keys[:, :, :length].to(hidden.device), kept.values[:, :, :length].to(hidden.device)
        key = self._project("k_proj", hidden, loop_idx)
        key = normed_heads(key, self.k_norm, self.qk_norm, self.head_dim, self.qkv_clip, loop_idx)
        value = self._project("v_proj", hidden, loop_idx)
        value = normed_heads(value, None, "none", self.head_dim, self.qkv_clip, loop_idx)
        if cache is not None:
            cache.cross_attention_cache.update(key, value, slot)
            cache.is_updated[slot] = True
        return key, value

    def _project(self, name: str, inputs: Tensor, loop_idx: int) -> Tensor:
        output = self.get_submodule(name)(inputs)
        return add_adapter(self.loop_adapters, name, output, inputs, loop_idx)


def split_cache(
    config: LoopedConfig, cache: Cache | None, encoded: Tensor | None
) -> tuple[Cache | None, EncoderDecoderCache | None]:
    """The cache of the self-attention, and the one that holds both (`None` without cross-attention or a cache).

    A plain cache is completed with one for the encoder's keys and values, as GPT-2 does it.

    Args:
        config: of the decoder.
        cache: what the caller passed, or a new cache for the self-attention.
        encoded: the encoder's output [B, E, D of the encoder].

    Raises:
        ValueError: for a cache that a decoder without cross-attention has no use for, or a quantised one, which gives
            what it holds to `update` alone.
    """
    if not config.add_cross_attention:
        if isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                "past_key_values is an EncoderDecoderCache, and add_cross_attention=False: pass the cache of the "
                "self-attention alone, or make the model with add_cross_attention=True."
            )
        return cache, None
    if cache is None or encoded is None:  # without an encoder's output there will be no forward
        return cache, None
    both = cache if isinstance(cache, EncoderDecoderCache) else EncoderDecoderCache(cache, DynamicCache())
    layers: list[Any] = both.cross_attention_cache.layers
    if any(isinstance(layer, BaseQuantizedLayer) for layer in layers):
        raise ValueError("a quantised cross_attention_cache cannot be read back; use a DynamicCache for it.")
    for slot, layer in enumerate(layers):
        # Transformers sizes it by the decoder's window, of which the encoder's tokens know nothing
        if layer.is_sliding and not layer.is_initialized:
            layers[slot] = StaticLayer(encoded.shape[1]) if isinstance(layer, StaticLayer) else DynamicLayer()
    return both.self_attention_cache, both


def encoder_states(
    config: LoopedConfig,
    hidden: Tensor | None,
    attention_mask: Tensor | None,
    cache: EncoderDecoderCache | None,
    inputs_embeds: Tensor,
    packed: bool,
) -> EncoderStates | None:
    """The encoder's output as the layers read it; `None` for a model without cross-attention.

    Args:
        config: of the decoder.
        hidden: output of the encoder [B, E, D of the encoder].
        attention_mask: 1 for its tokens and 0 for padding [B, E], or a prepared 4-D mask; `None`: no padding.
        cache: of both attentions.
        inputs_embeds: embeddings of the decoder's tokens [B, S, D].
        packed: whether rows hold several sequences.

    Raises:
        ValueError: if there is an encoder and no cross-attention, or the reverse, or the shapes do not fit.
    """
    if not config.add_cross_attention:
        if hidden is not None or attention_mask is not None:
            raise ValueError(
                "encoder_hidden_states or encoder_attention_mask was given, and add_cross_attention=False: nothing "
                "would read it. Make the model with add_cross_attention=True, is_decoder=True."
            )
        return None
    if hidden is None:
        raise ValueError(
            "add_cross_attention=True: encoder_hidden_states must be given, the encoder's output (an "
            "EncoderDecoderModel does it)."
        )
    batch, width = inputs_embeds.shape[0], config.cross_attention_hidden_size or config.hidden_size
    if hidden.ndim != 3 or hidden.shape[0] != batch or hidden.shape[2] != width:
        raise ValueError(
            f"encoder_hidden_states has the shape {tuple(hidden.shape)} and must have ({batch}, tokens, {width}): "
            "batch of the decoder's input, the encoder's tokens, cross_attention_hidden_size (without it hidden_size)."
        )
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask has the shape {tuple(attention_mask.shape)} and must have "
            f"{tuple(hidden.shape[:2])}, as encoder_hidden_states."
        )
    if packed:
        raise ValueError(
            f"{PACKED_BY}, with add_cross_attention=True: packed sequences would all read the encoder's output of one "
            "row; pass one sequence per row."
        )
    mask = create_bidirectional_mask(
        config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, encoder_hidden_states=hidden
    )
    return EncoderStates(hidden, mask, cache)


__all__ = ["CrossAttention", "EncoderStates", "encoder_states", "split_cache"]
