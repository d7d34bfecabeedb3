"""The layers of a looped model: attention and MLP, and the norms around them.

B batch, S tokens, D hidden size. A layer has no idea how often it runs: `loop_idx` (from 0) and `slot` come as
arguments, and nothing is written to a module during a forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .activations import build_activation
from .attention import LoopedAttention
from .configuration_looped import LoopedConfig
from .cross_attention import CrossAttention, EncoderStates
from .loop_adapter import LoopAdapter, add_adapter, build_adapters
from .norms import Norm, build_norm
from .residual_streams import Mapping, join
from .weight_init import mark_output_projections

#: Keys and values that an invocation attended to, each [B, Hkv, S', K].
KeyValue = tuple[Tensor, Tensor]


class Held(NamedTuple):
    """What later loops of a layer read again.

    Attributes:
        attended: keys and values of the self-attention, where loops share them (`config.kv_sharing`).
        encoded: those of the encoder's output, unless they vary from loop to loop.
    """

    attended: KeyValue | None
    encoded: KeyValue | None


class LoopedMLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) for `mlp_type="plain"`, and `mlp_output_act` of that, if given."""

    def __init__(self, config: LoopedConfig, layer: int, adapter: LoopAdapter | None):
        super().__init__()
        shape, bias = config.layer_shape(layer), config.mlp_bias
        wide, narrow = shape.intermediate_size, shape.hidden_size
        self.gated = config.mlp_type == "gated"
        if self.gated:
            self.gate_proj = nn.Linear(narrow, wide, bias=bias)
        self.up_proj = nn.Linear(narrow, wide, bias=bias)
        self.down_proj = nn.Linear(wide, narrow, bias=bias)
        self.act_fn = build_activation(config.hidden_act)
        self.output_act_fn = None if config.mlp_output_act is None else build_activation(config.mlp_output_act)
        self.loop_adapters = build_adapters(self, config.mlp_projections, adapter)
        self.adapted = len(self.loop_adapters) > 0

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.adapted:
            return self._forward_adapted(hidden_states, loop_idx)
        wide = self.up_proj(hidden_states)
        wide = self.act_fn(self.gate_proj(hidden_states)) * wide if self.gated else self.act_fn(wide)
        output = self.down_proj(wide)
        return output if self.output_act_fn is None else self.output_act_fn(output)

    def _forward_adapted(self, hidden_states: Tensor, loop_idx: int) -> Tensor:
        def project(name: str, inputs: Tensor) -> Tensor:
            return add_adapter(self.loop_adapters, name, getattr(self, name)(inputs), inputs, loop_idx)

        wide = project("up_proj", hidden_states)
        wide = self.act_fn(project("gate_proj", hidden_states)) * wide if self.gated else self.act_fn(wide)
        output = project("down_proj", wide)
        return output if self.output_act_fn is None else self.output_act_fn(output)


class LoopedDecoderLayer(GradientCheckpointingLayer):
    """Attention, cross-attention in a decoder that has an encoder, and MLP, with residuals and norms, placed as
    `config.norm_placement` says.

    With f one of them and x the residual stream, the placement decides which of three norms exist in
    x <- sum(x + branch(f(pre(x)))). They carry the names of Gemma 2's four norms: `input_layernorm` and
    `pre_feedforward_layernorm` are `pre`; `post_attention_layernorm` and `post_feedforward_layernorm` are `branch` or
    `sum`; those of the cross-attention are called as in T5Gemma. Where there are several residual streams,
    `residual_streams` says what each f reads of them and how they take up its result; a `sum` norm then acts on each.
    """

    def __init__(
        self,
        config: LoopedConfig,
        layer: int,
        norm_rows: int | None = None,
        adapter: LoopAdapter | None = None,
        value_gate: nn.Linear | None = None,
        residual_streams: nn.ModuleDict | None = None,
        is_anchor: bool = False,
    ):
        super().__init__()
        self.layer = layer
        self.residual_streams = residual_streams
        self.self_attn = LoopedAttention(config, layer, norm_rows, adapter, value_gate, is_anchor)
        self.mlp = LoopedMLP(config, layer, adapter)
        width = config.layer_shape(layer).hidden_size

        def norm(wanted: bool) -> Norm | None:
            return build_norm(config.norm_type, width, config.rms_norm_eps, norm_rows) if wanted else None

        has_pre = config.norm_placement in ("pre", "sandwich", "sandwich_sum")
        has_post = config.norm_placement != "pre"
        self.is_anchor = is_anchor
        self.shares_key_values = config.kv_sharing != "none" and config.is_core_layer(layer)
        self.cross_attn = CrossAttention(config, layer, norm_rows, adapter) if config.add_cross_attention else None
        self.pre_cross_attn_layernorm = norm(has_pre and config.add_cross_attention)
        self.post_cross_attn_layernorm = norm(has_post and config.add_cross_attention)
        shares_encoded = self.cross_attn is not None and not self.cross_attn.varies and config.is_core_layer(layer)
        self.hands_on = self.shares_key_values or shares_encoded
        self.norms_sum = config.norm_placement in ("post", "sandwich_sum")
        self.input_layernorm = norm(has_pre)
        self.post_attention_layernorm = norm(has_post)
        self.pre_feedforward_layernorm = norm(has_pre)
        self.post_feedforward_layernorm = norm(has_post)
        mark_output_projections(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the half that `compile_blocks` has put here; see `LoopedAttention.__getstate__`."""
        return {name: value for name, value in super().__getstate__().items() if name != "feed_forward"}

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        loop_idx: int,
        held: Held | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        encoder: EncoderStates | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Held]:
        """One invocation.

        Args:
            hidden_states: residual stream [B, S, D], or streams [B, S, n, D].
            slot: address of this invocation (what forward hooks record it by).
            loop_idx: loop it belongs to, from 0; 0 in prelude and coda.
            held: where loops share keys and values, those of the first loop, in every loop but the first.
            attention_mask, position_embeddings, past_key_values: as the model prepared them.
            use_cache: not read; named because gradient checkpointing looks for it.
            encoder: what the cross-attention reads, in a model that has one.
            kwargs: for the self-attention.

        Returns:
            the residual stream, or streams; with it, where loops share them, the keys and values attended to, and from
            an anchor of depth attention those of this call's tokens. They travel as arguments and results, never
            through the cache, so that a call without a cache and one that recomputes its layers are the same function.
        """
        branch, mapping = hidden_states, None
        if self.residual_streams is not None:
            branch, mapping = self.residual_streams["attention"](hidden_states, loop_idx)
        if self.input_layernorm is not None:
            branch = self.input_layernorm(branch, loop_idx)
        branch, _, attended = self.self_attn(
            branch,
            slot,
            loop_idx,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            key_value=None if held is None else held.attended,
            **kwargs,
        )
        hidden_states = self._join(hidden_states, branch, self.post_attention_layernorm, loop_idx, mapping)
        encoded = None
        if self.cross_attn is not None and encoder is not None:
            norm = self.pre_cross_attn_layernorm
            branch = hidden_states if norm is None else norm(hidden_states, loop_idx)
            given = None if held is None else held.encoded
            branch, _, encoded = self.cross_attn(branch, slot, loop_idx, encoder, given)
            hidden_states = self._join(hidden_states, branch, self.post_cross_attn_layernorm, loop_idx, None)
        hidden_states = self.feed_forward(hidden_states, loop_idx)
        if not self.hands_on and not self.is_anchor:
            return hidden_states
        varies = self.cross_attn is None or self.cross_attn.varies
        wanted = attended if self.shares_key_values or self.is_anchor else None
        return hidden_states, Held(wanted, None if varies else encoded)

    def feed_forward(self, hidden_states: Tensor, loop_idx: int) -> Tensor:
        """The MLP half of the block."""
        norm, branch, mapping = self.pre_feedforward_layernorm, hidden_states, None
        if self.residual_streams is not None:
            branch, mapping = self.residual_streams["mlp"](hidden_states, loop_idx)
        branch = self.mlp(branch if norm is None else norm(branch, loop_idx), loop_idx)
        return self._join(hidden_states, branch, self.post_feedforward_layernorm, loop_idx, mapping)

    def _join(
        self, residual: Tensor, branch: Tensor, norm: Norm | None, loop_idx: int, mapping: Mapping | None
    ) -> Tensor:
        if norm is None:
            return join(residual, branch, mapping)
        if self.norms_sum:
            return norm(join(residual, branch, mapping), loop_idx)
        return join(residual, norm(branch, loop_idx), mapping)
