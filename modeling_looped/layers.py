"""The layers of a looped model: norms, rotary embeddings, attention, MLP, and the block they make.

B batch, S tokens, D hidden size, H heads, K head dim. A layer has no idea how often it runs: `loop_idx` (from 0) and
`slot` come as arguments, and nothing is written to a module during a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_looped import LoopedConfig
from .loop_adapter import LoopAdapter
from .registry import table_row


class LoopedRMSNorm(nn.Module):
    """Root-mean-square norm with one weight vector, or with one per loop.

    Args:
        hidden_size: normalised channels.
        eps: added to the mean square.
        rows: weight vectors, one per loop (later loops use the last); `None`: one for all loops.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, rows: int | None = None):
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.ones(hidden_size if rows is None else (rows, hidden_size)))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        weight = self.weight if self.rows is None else self.weight[table_row(loop_idx, self.rows)]
        # torch's kernel accumulates in fp32 for every dtype and agrees with Llama's five separate operations
        if hidden_states.dtype == weight.dtype:
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        return F.rms_norm(hidden_states, weight.shape, None, self.variance_epsilon) * weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


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


def eager_attention_forward(
    module: AttentionSlot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations. query [B, H, S, K], key and value [B, Hkv, S', K] -> [B, S, H, K] and weights."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionSlot(nn.Module):
    """One attention invocation: dispatches attention for one (loop, layer) pair, and has no parameters.

    Every engine that keeps its own cache (Transformers' paged cache, vLLM) addresses it by `module.layer_idx` of the
    module that calls the attention function. A shared layer runs several times in one forward, so the address cannot
    sit on the layer; it sits here, and never changes.

    Args:
        config: of the model.
        layer_idx: the slot.
        sliding_window: of the layer it dispatches for, in tokens; `None`: full attention.
    """

    def __init__(self, config: LoopedConfig, layer_idx: int, sliding_window: int | None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.sliding_window = sliding_window
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = config.is_causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, S, K], key and value [B, Hkv, S, K] -> output [B, S, H, K] and, if eager, the weights."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
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


class LoopedAttention(nn.Module):
    """Grouped-query attention whose projections are shared by all loops and whose dispatch is one slot per loop.

    Args:
        config: of the model.
        layer: number of this layer among the stored ones.
        norm_rows: weights per QK norm, one per loop (`None`: one for all).
        adapter: the config's loop adapter, for layers of the core.
    """

    def __init__(self, config: LoopedConfig, layer: int, norm_rows: int | None, adapter: LoopAdapter | None):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        layout = config.slot_layout()
        loops = layout.loops if config.is_core_layer(layer) else 1
        self.sliding_window = config.sliding_window_of(layer)
        slots = [AttentionSlot(config, layout.slot(layer, loop), self.sliding_window) for loop in range(loops)]
        self.slots = nn.ModuleList(slots)
        # Slots by address. Loop counts other than the one the model was built with add theirs here on first use; the
        # registered ones stay exactly the layout's, which is what engines enumerate.
        self._slot_at = {slot.layer_idx: slot for slot in slots}

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.loop_adapters = build_adapters(self, ("q_proj", "k_proj", "v_proj", "o_proj"), adapter)

        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            per_head = config.qk_norm == "per_head"
            eps = config.rms_norm_eps
            self.q_norm = LoopedRMSNorm(config.head_dim if per_head else query_size, eps, norm_rows)
            self.k_norm = LoopedRMSNorm(config.head_dim if per_head else key_value_size, eps, norm_rows)

    def slot(self, layer_idx: int) -> AttentionSlot:
        """The dispatcher of slot `layer_idx`."""
        slot = self._slot_at.get(layer_idx)
        if slot is None:
            slot = AttentionSlot(self.config, layer_idx, self.sliding_window)
            # A compiled forward keeps no memo: it made the module when it was traced, and writing here would be a side
            # effect that it replays, and a reason to compile again.
            if not torch.compiler.is_compiling():
                self._slot_at[layer_idx] = slot
        return slot

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], loop_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> rotated queries [B, H, S, K], rotated keys and values [B, Hkv, S, K]."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.loop_adapters:
            query = add_adapter(self.loop_adapters, "q_proj", query, hidden_states, loop_idx)
            key = add_adapter(self.loop_adapters, "k_proj", key, hidden_states, loop_idx)
            value = add_adapter(self.loop_adapters, "v_proj", value, hidden_states, loop_idx)
        if self.qk_norm == "flat":
            query, key = self.q_norm(query, loop_idx), self.k_norm(key, loop_idx)
        query, key, value = query.view(heads), key.view(heads), value.view(heads)
        if self.qk_norm == "per_head":
            query, key = self.q_norm(query, loop_idx), self.k_norm(key, loop_idx)
        cos, sin = position_embeddings
        query, key = apply_rotary(query.transpose(1, 2), cos, sin), apply_rotary(key.transpose(1, 2), cos, sin)
        return query, key, value.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        loop_idx: int,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D] and, if the implementation returns them, the attention weights [B, H, S, S']."""
        query, key, value = self.project(hidden_states, position_embeddings, loop_idx)
        attended, weights = self.slot(slot)(
            query,
            key,
            value,
            attention_mask,
            past_key_values,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attended = attended.reshape(*hidden_states.shape[:-1], -1).contiguous()
        output = self.o_proj(attended)
        if self.loop_adapters:
            output = add_adapter(self.loop_adapters, "o_proj", output, attended, loop_idx)
        return output, weights


class LoopedMLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) for `mlp_type="plain"`."""

    def __init__(self, config: LoopedConfig, adapter: LoopAdapter | None):
        super().__init__()
        wide, narrow, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.gated = config.mlp_type == "gated"
        if self.gated:
            self.gate_proj = nn.Linear(narrow, wide, bias=bias)
        self.up_proj = nn.Linear(narrow, wide, bias=bias)
        self.down_proj = nn.Linear(wide, narrow, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.loop_adapters = build_adapters(self, config.mlp_projections, adapter)

    def forward(self, hidden_states: Tensor, loop_idx: int = 0) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.loop_adapters:
            return self._forward_adapted(hidden_states, loop_idx)
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))

    def _forward_adapted(self, hidden_states: Tensor, loop_idx: int) -> Tensor:
        wide = add_adapter(self.loop_adapters, "up_proj", self.up_proj(hidden_states), hidden_states, loop_idx)
        if self.gated:
            gate = add_adapter(self.loop_adapters, "gate_proj", self.gate_proj(hidden_states), hidden_states, loop_idx)
            wide = self.act_fn(gate) * wide
        else:
            wide = self.act_fn(wide)
        return add_adapter(self.loop_adapters, "down_proj", self.down_proj(wide), wide, loop_idx)


def build_adapters(module: nn.Module, names: tuple[str, ...], adapter: LoopAdapter | None) -> nn.ModuleDict:
    """The loop adapters beside the projections `names` of `module`; empty where the adapter does not act."""
    adapters = nn.ModuleDict()
    if adapter is not None:
        for name in names:
            out_features, in_features = module.get_parameter(f"{name}.weight").shape
            built = adapter.for_projection(name, in_features, out_features)
            if built is not None:
                adapters[name] = built
    return adapters


def add_adapter(adapters: nn.ModuleDict, name: str, output: Tensor, inputs: Tensor, loop_idx: int) -> Tensor:
    """The projection's `output` plus what its loop adapter, if there is one, makes of the same `inputs`."""
    return output + adapters[name](inputs, loop_idx) if name in adapters else output


class LoopedDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP with residuals and norms, placed as `config.norm_placement` says.

    With f one of the two and x the residual stream, the placement decides which of three norms exist in
    x <- sum(x + branch(f(pre(x)))). They carry the names of Gemma 2's four norms: `input_layernorm` and
    `pre_feedforward_layernorm` are `pre`; `post_attention_layernorm` and `post_feedforward_layernorm` are `branch` or
    `sum`.
    """

    def __init__(
        self,
        config: LoopedConfig,
        layer: int,
        norm_rows: int | None = None,
        adapter: LoopAdapter | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.self_attn = LoopedAttention(config, layer, norm_rows, adapter)
        self.mlp = LoopedMLP(config, adapter)

        def norm(wanted: bool) -> LoopedRMSNorm | None:
            return LoopedRMSNorm(config.hidden_size, config.rms_norm_eps, norm_rows) if wanted else None

        has_pre = config.norm_placement in ("pre", "sandwich", "sandwich_sum")
        has_post = config.norm_placement != "pre"
        self.norms_sum = config.norm_placement in ("post", "sandwich_sum")
        self.input_layernorm = norm(has_pre)
        self.post_attention_layernorm = norm(has_post)
        self.pre_feedforward_layernorm = norm(has_pre)
        self.post_feedforward_layernorm = norm(has_post)

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        loop_idx: int,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """One invocation: [B, S, D] -> [B, S, D].

        Args:
            hidden_states: residual stream.
            slot: address of this invocation (what forward hooks record it by).
            loop_idx: loop it belongs to, from 0; 0 in prelude and coda.
            attention_mask, position_embeddings, past_key_values: as the model prepared them.
            use_cache: not read; named because gradient checkpointing looks for it.
        """
        branch = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states, loop_idx)
        branch, _ = self.self_attn(
            branch,
            slot,
            loop_idx,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self._join(hidden_states, branch, self.post_attention_layernorm, loop_idx)
        return self.feed_forward(hidden_states, loop_idx)

    def feed_forward(self, hidden_states: Tensor, loop_idx: int) -> Tensor:
        """The MLP half of the block."""
        norm = self.pre_feedforward_layernorm
        branch = self.mlp(hidden_states if norm is None else norm(hidden_states, loop_idx), loop_idx)
        return self._join(hidden_states, branch, self.post_feedforward_layernorm, loop_idx)

    def _join(self, residual: Tensor, branch: Tensor, norm: LoopedRMSNorm | None, loop_idx: int) -> Tensor:
        if norm is None:
            return residual + branch
        if self.norms_sum:
            return norm(residual + branch, loop_idx)
        return residual + norm(branch, loop_idx)
