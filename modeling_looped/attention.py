"""Attention: projections that all loops share, and one dispatcher per invocation.

B batch, S tokens, D hidden size, H heads, K head dim. `loop_idx` counts from 0; nothing is written to a module during
a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_looped import LoopedConfig
from .depth_attention import mix_values
from .loop_adapter import LoopAdapter, add_adapter, build_adapters
from .norms import LoopedRMSNorm, LoopedUnweightedRMSNorm
from .rotary import apply_rotary
from .value_embedding import gated_token_value


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations. query [B, H, S, K], key and value [B, Hkv, S', K] -> [B, S, H, K] and weights.

    `module` is what dispatches: an `AttentionSlot`, or a cross-attention.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def query_and_key_norms(
    config: LoopedConfig, query_size: int, key_value_size: int, norm_rows: int | None
) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and keys that `config.qk_norm` names, over all heads' channels or over those of one."""
    eps = config.rms_norm_eps
    match config.qk_norm:
        case "per_head":
            return LoopedRMSNorm(config.head_dim, eps, norm_rows), LoopedRMSNorm(config.head_dim, eps, norm_rows)
        case "per_head_unweighted":
            norm = LoopedUnweightedRMSNorm(config.head_dim)
            return norm, norm
        case "flat":
            return LoopedRMSNorm(query_size, eps, norm_rows), LoopedRMSNorm(key_value_size, eps, norm_rows)
        case _:
            return None, None


def normed_heads(
    projected: Tensor, norm: nn.Module | None, qk_norm: str, head_dim: int, clip: float | None, loop_idx: int
) -> Tensor:
    """Queries, keys or values [B, S, heads * K] -> clipped, normalised [B, heads, S, K]."""
    if clip is not None:
        projected = projected.clamp(-clip, clip)
    if norm is not None and qk_norm == "flat":
        projected = norm(projected, loop_idx)
    heads = projected.view(*projected.shape[:-1], -1, head_dim)
    if norm is not None and qk_norm != "flat":
        heads = norm(heads, loop_idx)
    return heads.transpose(1, 2)


def hide_inactive(attention_mask: Tensor | None, key: Tensor, active: Tensor, *, is_causal: bool) -> Tensor:
    """The mask under which tokens that sit out a loop are hidden from those that take part.

    Args:
        attention_mask: bool or additive [B or 1, 1, S, S']; `None`: as Transformers leaves it out, where causality is
            all there is.
        key: [B, Hkv, S', K]; keys of zeros are those of tokens that sat out.
        active: queries that take part, bool [B, S]; the others, whose result nobody reads, see what they always do.
        is_causal: whether a mask that was left out is causal.

    Returns:
        an additive mask [B, 1, S, S'].
    """
    lowest = torch.finfo(key.dtype).min
    shape = (1, 1, active.shape[1], key.shape[2])
    if attention_mask is None:
        # Transformers leaves it out for one query that sees all, and where token i sees the first i of the keys
        visible = torch.ones(shape, dtype=torch.bool, device=key.device)
        attention_mask = visible.tril() if is_causal and active.shape[1] > 1 else visible
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=key.dtype).masked_fill(~attention_mask, lowest)
    sat_out = (key == 0).all(dim=-1).all(dim=1)
    return attention_mask.masked_fill(sat_out[:, None, None, :] & active[:, None, :, None], lowest)


class AttentionSlot(nn.Module):
    """One attention invocation: dispatches attention for one (loop, layer) pair, and has no parameters.

    Every engine that keeps its own cache (Transformers' paged cache, vLLM) addresses it by `module.layer_idx` of the
    module that calls the attention function. A shared layer runs several times in one forward, so the address cannot
    sit on the layer; it sits here, and never changes.

    Args:
        config: of the model.
        layer_idx: the slot.
        layer: number of the layer it dispatches for, among the stored ones.
    """

    def __init__(self, config: LoopedConfig, layer_idx: int, layer: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.sliding_window = config.sliding_window_of(layer)
        shape = config.layer_shape(layer)
        self.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = config.is_causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, S, K], key and value [B, Hkv, S', K] -> output [B, S, H, K] and, if eager, the weights."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


#: Methods that `compile_blocks` covers with compiled ones, on the instance.
COMPILED = ("project", "project_query")


class LoopedAttention(nn.Module):
    """Grouped-query attention whose projections are shared by all loops and whose dispatch is one slot per loop.

    Args:
        config: of the model.
        layer: number of this layer among the stored ones.
        norm_rows: weights per QK norm, one per loop (`None`: one for all).
        adapter: the config's loop adapter, for layers of the core.
        value_gate: for a layer with a value embedding.
        is_anchor: whether later invocations mix their values with this one's (`config.depth_attention`).
    """

    def __init__(
        self,
        config: LoopedConfig,
        layer: int,
        norm_rows: int | None,
        adapter: LoopAdapter | None,
        value_gate: nn.Linear | None,
        is_anchor: bool,
    ):
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        layout = config.slot_layout()
        addresses = dict.fromkeys(layout.slot(layer, loop) for loop in range(layout.loops_of(layer)))
        slots = [AttentionSlot(config, address, layer) for address in addresses]
        self.slots = nn.ModuleList(slots)
        # Slots by address. Loop counts other than the one the model was built with add theirs here on first use; the
        # registered ones stay exactly the layout's, which is what engines enumerate.
        self._slot_at = {slot.layer_idx: slot for slot in slots}

        shape = config.layer_shape(layer)
        width = shape.hidden_size
        query_size = shape.num_attention_heads * config.head_dim
        key_value_size = shape.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, key_value_size, bias=config.attention_value_bias)
        self.o_proj = nn.Linear(query_size, width, bias=config.attention_output_bias)
        self.loop_adapters = build_adapters(self, ("q_proj", "k_proj", "v_proj", "o_proj"), adapter)
        self.adapted = len(self.loop_adapters) > 0
        self.gate_proj = nn.Linear(width, query_size, bias=False) if config.attention_gate == "per_channel" else None
        self.value_gate = value_gate
        self.is_anchor = is_anchor

        self.qkv_clip = config.qkv_clip
        self.qk_norm = config.qk_norm
        self.q_norm, self.k_norm = query_and_key_norms(config, query_size, key_value_size, norm_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without what `compile_blocks` has put here, which in a copy would still read this module's weights."""
        return {name: value for name, value in super().__getstate__().items() if name not in COMPILED}

    def slot(self, layer_idx: int) -> AttentionSlot:
        """The dispatcher of slot `layer_idx`."""
        slot = self._slot_at.get(layer_idx)
        if slot is None:
            slot = AttentionSlot(self.config, layer_idx, self.layer)
            # A compiled forward keeps no memo: it made the module when it was traced, and writing here would be a side
            # effect that it replays, and a reason to compile again.
            if not torch.compiler.is_compiling():
                self._slot_at[layer_idx] = slot
        return slot

    def project_query(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, loop_idx: int
    ) -> Tensor:
        """[B, S, D] -> rotated queries [B, H, S, K]."""
        query = self.q_proj(hidden_states)
        if self.adapted:
            query = add_adapter(self.loop_adapters, "q_proj", query, hidden_states, loop_idx)
        return self._heads(query, self.q_norm, position_embeddings, loop_idx)

    def project(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        loop_idx: int,
        token_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> rotated queries [B, H, S, K], rotated keys and values [B, Hkv, S, K].

        `token_value` [B, S, Hkv * K] is what the layer's value embedding holds for the tokens.
        """
        query = self.project_query(hidden_states, position_embeddings, loop_idx)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.adapted:
            key = add_adapter(self.loop_adapters, "k_proj", key, hidden_states, loop_idx)
            value = add_adapter(self.loop_adapters, "v_proj", value, hidden_states, loop_idx)
        key = self._heads(key, self.k_norm, position_embeddings, loop_idx)
        value = value.view(*hidden_states.shape[:-1], -1, self.head_dim)
        if token_value is not None and self.value_gate is not None:
            value = value + gated_token_value(self.value_gate, hidden_states, token_value)
        if self.qkv_clip is not None:
            value = value.clamp(-self.qkv_clip, self.qkv_clip)
        return query, key, value.transpose(1, 2)

    def _heads(
        self,
        projected: Tensor,
        norm: nn.Module | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        loop_idx: int,
    ) -> Tensor:
        """Queries or keys [B, S, heads * K] -> clipped, normalised, rotated [B, heads, S, K]."""
        heads = normed_heads(projected, norm, self.qk_norm, self.head_dim, self.qkv_clip, loop_idx)
        return heads if position_embeddings is None else apply_rotary(heads, *position_embeddings)

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        loop_idx: int,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        key_value: tuple[Tensor, Tensor] | None = None,
        token_value: Tensor | None = None,
        active: Tensor | None = None,
        anchors: tuple[tuple[Tensor, Tensor], ...] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """One invocation.

        Args:
            hidden_states: [B, S, D].
            slot: address of this invocation.
            loop_idx: loop it belongs to.
            position_embeddings: cosines and sines of the rotary embedding; `None`: queries and keys are not rotated.
            attention_mask, past_key_values: as the model prepared them.
            key_value: keys and values that an earlier loop attended to, to be read again (`config.kv_sharing`).
            token_value: what the layer's value embedding holds for the tokens.
            active: tokens that take part in this loop, bool [B, S]; the others are hidden. `None`: all take part.
            anchors: keys and values that earlier invocations had for these tokens, to mix the values with.
            kwargs: for the attention interface.

        Returns:
            [B, S, D]; the attention weights [B, H, S, S'] if the implementation gives them; the keys and values
            attended to, each [B, Hkv, S', K], or, from an anchor, those of the tokens of this call.
        """
        if key_value is not None:
            query = self.project_query(hidden_states, position_embeddings, loop_idx)
            key, value = key_value
        else:
            query, key, value = self.project(hidden_states, position_embeddings, loop_idx, token_value)
            if anchors:
                value = mix_values(query, key, value, anchors)
            if active is not None:
                key = key * active[:, None, :, None].to(device=key.device, dtype=key.dtype)
            key_value = key, value
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, slot)
        if active is not None:
            attention_mask = hide_inactive(attention_mask, key, active.to(key.device), is_causal=self.config.is_causal)
        attended, weights = self.slot(slot)(
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attended = attended.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if self.gate_proj is not None:
            attended = attended * torch.sigmoid(self.gate_proj(hidden_states))
        output = self.o_proj(attended)
        if self.adapted:
            output = add_adapter(self.loop_adapters, "o_proj", output, attended, loop_idx)
        return output, weights, key_value if self.is_anchor else (key, value)
