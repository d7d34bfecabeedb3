"""Accounting: what a looped model weighs, computes and keeps, at any loop count.

S context length in tokens, T loops. A layer of the core is stored once and works T times, so parameters say little
about cost: FLOPs and keys and values follow the effective depth.

FLOPs are those of matrix products, two for each multiplication, as `torch.utils.flop_counter` counts them. Attention
is counted without its mask, every query against all S keys (or those in its window): the convention of PaLM (arXiv
2204.02311, appendix B). What attention does follows from the sizes of the layers. Everything else is read off the
model itself, built and run on the meta device, where nothing is computed: so every strategy is counted, whatever it
does.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import PreTrainedModel

from .configuration_looped import LoopedConfig
from .depth import DepthRange, depth_of
from .slots import SlotLayout, checked_num_loops

#: The parts of a model, in the order of execution. `loop` is what acts between the runs of the core: injection, first
#: state, update, conditioning, halting, readout.
PARTS: tuple[str, ...] = ("embedding", "prelude", "core", "adapters", "loop", "coda", "head")

EMBEDDING_MODULES = frozenset(
    (
        "embed_tokens",
        "position_embeddings",
        "token_type_embeddings",
        "embedding_norm",
        "embedding_projection",
        "value_embeddings",
    )
)
HEAD_MODULES = frozenset(("norm", "lm_head", "head_transform", "pooler", "score", "qa_outputs"))


class ParameterCounts(NamedTuple):
    """How many numbers a model holds.

    Attributes:
        stored: what a checkpoint holds: parameters, tied ones once, and persistent buffers.
        unique: parameters, tied ones once (`num_parameters()`).
        effective: parameters of a stack of the same depth without sharing: those of a core layer once per loop. The
            low rank of a loop adapter does not count, since such a stack has it merged into its weights.
        parts: the unique ones by part (see `PARTS`); a tied head belongs to the embedding.
        effective_parts: the effective ones by part.
    """

    stored: int
    unique: int
    effective: int
    parts: dict[str, int]
    effective_parts: dict[str, int]


class TokenFlops(NamedTuple):
    """FLOPs per token.

    Attributes:
        parts: of a forward, by part (see `PARTS`).
        backward: of the backward that belongs to it in training.
    """

    parts: dict[str, int]
    backward: int

    @property
    def forward(self) -> int:
        """Of a forward."""
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        """Of forward and backward."""
        return self.forward + self.backward


def part_of(config: LoopedConfig, name: str) -> str:
    """The part (see `PARTS`) that the parameter or module `name` belongs to."""
    path = name.removeprefix("model.").split(".")
    if path[0] == "layers":
        if "loop_adapters" in path:
            return "adapters"
        layer = int(path[1])
        if config.is_core_layer(layer):
            return "core"
        return "prelude" if layer < config.num_prelude_layers else "coda"
    if path[0] in EMBEDDING_MODULES:
        return "embedding"
    return "head" if path[0] in HEAD_MODULES else "loop"


def parameter_counts(model: PreTrainedModel, num_loops: int | None = None) -> ParameterCounts:
    """Parameters of a looped model, which may be on the meta device.

    Args:
        model: any looped model.
        num_loops: loops of the stack that `effective` counts; `None`: the config's.
    """
    config = looped_config(model)
    layout = layout_of(config, num_loops)
    parts, effective = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    unique = list(model.named_parameters())
    for name, parameter in unique:
        part = part_of(config, name)
        parts[part] += parameter.numel()
        effective[part] += runs_of(layout, model, name) * parameter.numel() // rows_of(model, name)
    held = {id(parameter) for _, parameter in unique}
    buffers = [tensor for tensor in model.state_dict(keep_vars=True).values() if id(tensor) not in held]
    return ParameterCounts(
        stored=sum(parts.values()) + sum({id(tensor): tensor.numel() for tensor in buffers}.values()),
        unique=sum(parts.values()),
        effective=sum(effective.values()),
        parts=parts,
        effective_parts=effective,
    )


def runs_of(layout: SlotLayout, model: PreTrainedModel, name: str) -> int:
    """How many layers of the unrolled stack have a parameter of this name: 0 for an adapter's, which is merged."""
    path = name.removeprefix("model.").split(".")
    if "loop_adapters" in path:
        return 0
    return layout.loops_of(int(path[1])) if path[0] == "layers" else 1


def rows_of(model: PreTrainedModel, name: str) -> int:
    """Weights of a norm that has one per loop, of which each invocation reads one."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "rows", None) or 1


def token_flops(
    model: PreTrainedModel,
    *,
    num_loops: int | None = None,
    sequence_length: int | None = None,
    shallowest: int | None = None,
) -> TokenFlops:
    """FLOPs per token of a looped model, on average over a sequence that is computed at once; or of the token at which
    a cache reaches `sequence_length`.

    The backward is that of torch without recomputation: loops that truncated backpropagation leaves out have none, and
    a product with an input that needs no gradient costs one product there, not two. A head that reads one token of a
    sequence is counted as if the sequence had two. The further runs of coda and head that `config.loop_loss` may ask
    for are not counted.

    Args:
        model: any looped model; only its class and config are read, so the meta device will do.
        num_loops: T; `None`: the config's.
        sequence_length: S; `None`: `max_position_embeddings`.
        shallowest: smallest depth of a sequence or token, where these have depths of their own and T is the largest:
            with `config.backprop_loops` the graph begins with the first loop that counts for any of them. `None`: T.

    Raises:
        ValueError: for a loop count or a length that is not an integer of at least 1, and for a model with
            cross-attention, whose products depend on the length of an encoder's output too.
    """
    config = looped_config(model)
    if config.add_cross_attention:
        raise ValueError(
            "add_cross_attention=True: FLOPs per token depend on the encoder's output, and are not counted."
        )
    layout = layout_of(config, num_loops)
    length = checked_length(config.max_position_embeddings if sequence_length is None else sequence_length)
    values, kept = config.to_dict(), layout.loops
    if config.backprop_loops is not None:
        smallest = layout.loops if shallowest is None else shallowest
        kept = values["backprop_loops"] = min(config.backprop_loops + layout.loops - smallest, layout.loops)
    traced = traced_products(type(model), json.dumps(values, sort_keys=True, default=str), layout.loops)
    parts = dict(traced.parts)
    backward = traced.backward
    for index, keeps_graph in zip(range(layout.num_invocations), graph_flags(layout, kept), strict=True):
        layer = layout.invocation(index).layer
        products = attention_flops(config, layer, length)
        parts[part_of(config, f"layers.{layer}")] += products
        backward += 2 * products * keeps_graph
    return TokenFlops(parts, backward)


def attention_flops(config: LoopedConfig, layer: int, keys: int) -> int:
    """FLOPs of one token's attention in one invocation of stored layer `layer`: scores and weighted sum, over `keys`
    keys or those in the layer's window.
    """
    shape = config.layer_shape(layer)
    window = config.sliding_window_of(layer)
    return 4 * shape.num_attention_heads * shape.head_dim * (keys if window is None else min(keys, window))


def graph_flags(layout: SlotLayout, kept: int) -> Iterator[bool]:
    """For every invocation in order, whether it keeps a graph when the last `kept` loops do."""
    yield from [True] * layout.prelude
    for turn in layout.turns():
        yield from [turn.outer_loop >= layout.loops - kept] * len(turn.layers)
    yield from [True] * layout.coda


@functools.lru_cache(maxsize=256)
def traced_products(model_class: type[PreTrainedModel], config_json: str, num_loops: int) -> TokenFlops:
    """FLOPs per token of everything but attention, at `num_loops` loops, counted in a run on the meta device."""
    model = skeleton(model_class, LoopedConfig.from_dict(json.loads(config_json)))
    config = looped_config(model)
    replace_attention(model, attention_without_products)
    model.train()
    tokens = 2
    with FlopCounterMode(display=False) as counter:
        output = model(**meta_inputs(1, tokens), num_loops=num_loops)
        by_module = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        forward = counter.get_total_flops()
        total = sum(tensor.float().sum() for tensor in output.to_tuple() if tensor.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
        backward = counter.get_total_flops() - forward
    parts = dict.fromkeys(PARTS, 0)
    prefix = f"{model_class.__name__}."
    for name, products in by_module.items():
        path = name.removeprefix(prefix).removeprefix("model.").split(".")
        if len(path) == 2 and path[0] == "layers":  # with what is inside it
            parts[part_of(config, ".".join(path))] += products
        elif len(path) == 5 and path[3] == "loop_adapters":  # layers.<i>.<attention or MLP>.loop_adapters.<projection>
            parts["adapters"] += products
            parts["core"] -= products
        elif len(path) == 1 and path[0] in EMBEDDING_MODULES | HEAD_MODULES:
            parts[part_of(config, path[0])] += products
    parts["loop"] = forward - sum(parts.values())
    return TokenFlops({part: products // tokens for part, products in parts.items()}, backward // tokens)


def skeleton(model_class: type[PreTrainedModel], config: LoopedConfig) -> PreTrainedModel:
    """A model of this class and config on the meta device: shapes without numbers."""
    config.loop_loss = "output"  # what another loss adds is not counted
    config._attn_implementation = "eager"  # the one whose masks do not ask for values, which are not there
    with torch.device("meta"):
        model = model_class(config)
    config.is_causal = True  # the same: products and memory do not depend on which tokens are hidden
    return model


#: What a dispatcher of attention is to its layer: (query, key, value, mask, ...) -> output [B, S, H, K] and weights.
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def replace_attention(model: nn.Module, attend: Attend) -> None:
    """Let every attention of `model` call `attend` in place of its slots'."""
    for module in model.modules():
        if hasattr(module, "slots") and hasattr(module, "slot"):
            object.__setattr__(module, "slot", lambda layer_idx: attend)  # on the instance, in front of the method


def attention_without_products(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    """Something of attention's shape that every input has a gradient from, without a matrix product."""
    groups = query.shape[1] // key.shape[1]
    return (query + (key + value).repeat_interleave(groups, dim=1)).transpose(1, 2), None


def meta_inputs(batch_size: int, sequence_length: int) -> dict[str, Any]:
    """Inputs of a forward on the meta device."""
    tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}


def kv_cache_bytes(
    config: LoopedConfig,
    sequence_length: int,
    *,
    num_loops: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of the keys and values of a context in a dynamic cache.

    Every slot keeps 2 * key-value heads * head_dim numbers per token. A slot with a sliding window keeps at most
    window - 1 tokens, what the next one needs.

    Args:
        config: of the model.
        sequence_length: tokens of the context.
        num_loops: T; `None`: the config's.
        batch_size: sequences.
        dtype: of the cache.

    Raises:
        ValueError: for a count that is not an integer of at least 1, and for an encoder, which has no cache.
    """
    if not config.is_causal:
        raise ValueError("is_causal=False: an encoder keeps no keys and values.")
    length, batch = checked_length(sequence_length), checked_length(batch_size, "batch_size")
    layout = layout_of(config, num_loops)
    numbers = 0
    for slot in range(layout.num_slots):
        layer = layout.layer_and_loop(slot).layer
        shape, window = config.layer_shape(layer), config.sliding_window_of(layer)
        kept = length if window is None else min(length, window - 1)
        numbers += 2 * shape.num_key_value_heads * shape.head_dim * kept
    return batch * numbers * dtype.itemsize


def layout_of(config: LoopedConfig, num_loops: int | None) -> SlotLayout:
    """The slots at `num_loops` loops, after checking it."""
    return config.slot_layout(None if num_loops is None else checked_num_loops(num_loops))


def checked_length(length: Any, name: str = "sequence_length") -> int:
    """A number of tokens, or of sequences, as an `int`; raises ValueError for what is not an integer of at least 1."""
    try:
        checked = 0 if isinstance(length, bool) else operator.index(length)
    except TypeError:
        checked = 0
    if checked < 1:
        raise ValueError(f"{name}={length!r} must be an integer of at least 1.")
    return checked


def looped_config(model: PreTrainedModel) -> LoopedConfig:
    """The config of a looped model; raises TypeError for another one."""
    config = model.config
    if config.model_type != LoopedConfig.model_type:
        raise TypeError(f"model_type={config.model_type!r}: accounting is for looped models.")
    return config  # pyright: ignore[reportReturnType] (a class loaded with `trust_remote_code` is another one)


def count_flops(trainer: Any) -> None:
    """Make a `Trainer` count the FLOPs of a looped model, in `state.total_flos` and what it logs of it.

    A stock one takes 6 FLOPs per token and stored parameter without asking the model, too few by about the loop count.
    Where depth is sampled, the loops that each step ran are counted. What `config.loop_loss` adds is not.
    """
    trainer.floating_point_ops = trainer.model.floating_point_ops


class LoopedAccountingMixin:
    """Costs of a looped model, as its methods."""

    config: LoopedConfig

    def flops_per_token(self, *, num_loops: int | None = None, sequence_length: int | None = None) -> int:
        """FLOPs of a forward, per token. Arguments and errors as in `accounting.token_flops`."""
        return token_flops(self, num_loops=num_loops, sequence_length=sequence_length).forward  # pyright: ignore[reportArgumentType] (mixed into a model)

    def training_flops_per_token(self, *, num_loops: int | None = None, sequence_length: int | None = None) -> int:
        """FLOPs of forward and backward, per token. Arguments and errors as in `accounting.token_flops`."""
        return token_flops(self, num_loops=num_loops, sequence_length=sequence_length).training  # pyright: ignore[reportArgumentType] (mixed into a model)

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """FLOPs of a training step on a batch: what a `Trainer` adds to `total_flos` after `count_flops(trainer)`.

        In training mode, where depth is sampled, the loops are those drawn last: of the step that was just made.

        Args:
            input_dict: the batch, with `input_ids` or `inputs_embeds`, and `num_loops` where a call sets it.
            exclude_embeddings: not read: looking a token up is no product, and a product with a tied head is one.
        """
        names = [name for name in ("input_ids", "inputs_embeds") if input_dict.get(name) is not None]
        if not names:
            return 0
        batch, length = input_dict[names[0]].shape[:2]
        loops = self._depths_of_call(input_dict.get("num_loops"), batch, length)
        flops = token_flops(self, num_loops=loops.largest, sequence_length=length, shallowest=loops.smallest)  # pyright: ignore[reportArgumentType] (mixed into a model)
        return batch * length * flops.training

    def _depths_of_call(self, num_loops: Any, batch: int, length: int) -> DepthRange:
        """Depths of the call that was just made: those that it was told, that were drawn, or the config's."""
        # a stack has nothing to sample
        sampling = getattr(self.base_model, "depth_sampling", None)  # pyright: ignore[reportAttributeAccessIssue] (mixed into a model)
        drawn: DepthRange | None = getattr(sampling, "drawn", None)
        if num_loops is None and drawn is not None and self.training:  # pyright: ignore[reportAttributeAccessIssue] (mixed into a model)
            return drawn
        depth = depth_of(self.config.num_loops if num_loops is None else num_loops, batch, length)
        return DepthRange(depth.smallest, depth.loops)

    def kv_cache_bytes(self, sequence_length: int, *, num_loops: int | None = None, batch_size: int = 1) -> int:
        """Bytes of the keys and values of a context in the model's dtype. Errors as in `accounting.kv_cache_bytes`."""
        dtype: Any = self.dtype  # pyright: ignore[reportAttributeAccessIssue] (mixed into a model)
        return kv_cache_bytes(self.config, sequence_length, num_loops=num_loops, batch_size=batch_size, dtype=dtype)


__all__ = [
    "PARTS",
    "LoopedAccountingMixin",
    "ParameterCounts",
    "TokenFlops",
    "count_flops",
    "kv_cache_bytes",
    "parameter_counts",
    "token_flops",
]
