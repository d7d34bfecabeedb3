"""What a forward derives from its inputs before the first layer: masks, positions, and whether the cache fits.

B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.utils import is_tracing, logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_looped import LoopedConfig
from .halting import HALTINGS, Halting
from .slots import SlotLayout

logger = logging.get_logger(__name__)

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}

#: How a call packs several sequences into a row, for messages.
PACKED_BY = "cu_seq_lens_q, or position_ids that do not go up by one and no attention_mask"


def attention_masks(
    config: LoopedConfig,
    layer_types: Iterable[str],
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor,
    past_key_values: Cache | None,
    token_type_ids: Tensor | None = None,
) -> dict[str, Any]:
    """One mask per attention type in use; every slot of a type sees the same tokens, so all loops share it."""
    if isinstance(attention_mask, dict):  # generate has made them already, for a compiled forward
        return attention_mask
    prefix: dict[str, Any] = {}
    # In this order: a static cache knows its length as a tensor, which a compiled forward must not branch on.
    if config.prefix_lm and (past_key_values is None or past_key_values.get_seq_length() == 0):
        prefix = prefix_blocks(config, token_type_ids)
    return {
        layer_type: MASK_FUNCTIONS[layer_type](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **prefix,
        )
        for layer_type in dict.fromkeys(layer_types)
    }


def refuse_foreign_cache(cache: Cache, num_slots: int, layout: SlotLayout) -> None:
    """Raise ValueError for a cache that was made for another loop count."""
    if layout.shares_key_values and not torch.compiler.is_compiling():
        # its slots are as many at every loop count, so it has to remember
        loops = getattr(cache, "looped_num_loops", layout.loops)
        if loops != layout.loops and cache.get_seq_length() > 0:
            raise ValueError(
                f"num_loops={layout.loops} with a cache that num_loops={loops} filled: a cache belongs to one loop "
                "count. Start a new cache, or pass the num_loops it was made with."
            )
        cache.looped_num_loops = layout.loops  # pyright: ignore[reportAttributeAccessIssue] (our note on it)
    held = len(cache.layers)
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    if held == num_slots or (grows and held == 0):
        return
    raise ValueError(
        f"num_loops={layout.loops} needs a cache of {num_slots} slots (one per loop and layer) and this one has "
        f"{held}: a cache belongs to one loop count. Start a new cache, or pass the num_loops it was made with."
    )


def refuse_mixed_depths(config: LoopedConfig, cache: Cache | None) -> None:
    """Raise ValueError where rows or tokens cannot have depths of their own."""
    if cache is not None:
        raise ValueError(
            "num_loops holds a depth for each sequence or token, and a cache belongs to one loop count: leave "
            "past_key_values out, or pass one integer."
        )
    if config.num_core_layers and config.halting["type"] != "none":
        raise ValueError(
            f"num_loops holds a depth for each sequence or token, and halting={config.halting['type']!r} chooses "
            "among the loops of a whole batch: pass one integer."
        )
    if config.num_core_layers and config.depth_attention["type"] != "none":
        raise ValueError(
            f"num_loops holds a depth for each sequence or token, and depth_attention="
            f"{config.depth_attention['type']!r} reads all loops of the call: pass one integer."
        )


def refuse_loss_of_loops(config: LoopedConfig, cache: Cache | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where the coda cannot run once for every loop that the loss reads."""
    loss = config.loop_loss["type"]
    if cache is not None:
        raise ValueError(
            f"loop_loss={loss!r} with past_key_values: the coda runs once for every supervised loop, and a cache has "
            "one slot for it; leave past_key_values out, or load the model with loop_loss='output'."
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or getattr(config, name, False):
            raise ValueError(
                f"loop_loss={loss!r} with {name}: the coda runs once for every supervised loop, and what it gives "
                "would be recorded as often; leave it out, or use output_loop_hidden_states."
            )


def warn_of_unread_loss(config: LoopedConfig) -> None:
    """Say once that whoever runs the base model in training computes another loss than `config.loop_loss`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(
            f"loop_loss={config.loop_loss['type']!r} has no effect in this call: only a language-model head that is "
            "given labels computes it. A trainer that makes a loss of its own (label smoothing, distillation, TRL's "
            "fused head) does not train it."
        )


def prefix_blocks(config: LoopedConfig, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    """The argument of Transformers' mask functions that lets tokens of type 1 see each other (`config.prefix_lm`)."""
    if not config.prefix_lm or token_type_ids is None:
        return {}
    if is_flash_attention_requested(config):
        raise ValueError(
            f"prefix_lm=True with attn_implementation={config._attn_implementation!r}: flash attention takes no mask "
            "that shows a prefix to itself; use sdpa, eager or flex_attention."
        )
    return {"block_sequence_ids": torch.where(token_type_ids == 1, 0, -1)}


def places_of_call(inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Places [S] of the call's tokens among all that its rows have had, from 0."""
    seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen


def of_this_call(per_token: Tensor, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """The part [B, S] of what a 2-D mask says, or of what was made of it, that is about the tokens of this call.

    The mask is of the tokens seen and those of the call. Beside a cache of fixed size it may be longer, such as that
    cache is; it must not be shorter, which cannot be told without waiting for the device.
    """
    if cache is None or not cache.is_compileable:
        return per_token[:, -inputs_embeds.shape[1] :]
    # such a cache has its length on the device: a lookup, which does not wait for it
    places = places_of_call(inputs_embeds, cache).to(per_token.device)
    return per_token[:, places.clamp(max=per_token.shape[1] - 1)]


def valid_tokens(inputs_embeds: Tensor, attention_mask: Any, cache: Cache | None = None) -> Tensor:
    """The tokens of this call that are not padding, bool [B, S]; all, unless a 2-D mask says otherwise."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        of_call = of_this_call(attention_mask, inputs_embeds, cache)
        return of_call.to(device=inputs_embeds.device, dtype=torch.bool)
    return torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)


def rows_are_packed(
    position_ids: Tensor | None, attention_mask: Any, cache: Cache | None, cu_seq_lens: Tensor | None
) -> bool:
    """Whether rows hold several sequences each: because `cu_seq_lens` says where they begin, or because, in a call
    without mask and cache, the caller's positions do not go up by one, from which Transformers' masks tell them apart.

    A traced call is taken for one that is not packed by positions, since it must not branch on their values.
    """
    if cu_seq_lens is not None:
        return True
    if position_ids is None or attention_mask is not None or cache is not None:
        return False
    if position_ids.is_meta or is_tracing(position_ids):
        return False
    return find_packed_sequence_indices(position_ids) is not None


def refuse_what_cannot_route(
    config: LoopedConfig,
    halting: Halting,
    cache: Cache | None,
    attention_mask: Any,
    packed: bool,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise ValueError where a router's choices would be lost: in attention that takes no mask of ours, in caches that
    round keys or that only the attention function sees, and, where the choice looks ahead, in any cache.
    """
    rule = f"halting={config.halting['type']!r}"
    # trf-ignore: TRF051 (nothing is dispatched on it: a combination that would be wrong is refused)
    if config._attn_implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"{rule} with attn_implementation={config._attn_implementation!r}: a token that sits out a loop is hidden "
            "by a mask, which eager and sdpa attention take."
        )
    if halting.reads_whole_sequence and cache is not None:
        raise ValueError(
            f"{rule} with selection='top_k' looks at the whole sequence: a step on a cache would choose otherwise. "
            "Pass use_cache=False, or set selection='threshold'."
        )
    if halting.reads_whole_sequence and (packed or is_prepared(attention_mask)):
        raise ValueError(
            f"{PACKED_BY}, or a prepared mask, with {rule} and selection='top_k': it shares its places among the "
            "tokens of a row; pass one sequence per row and a 2-D attention_mask, or set selection='threshold'."
        )
    if kwargs.get("cache") is not None or any(
        isinstance(layer, QuantizedLayer) for layer in getattr(cache, "layers", ())
    ):
        raise ValueError(f"{rule} works with dynamic, static and offloaded caches, not with paged or quantised ones.")


def refuse_paged_cache(config: LoopedConfig) -> None:
    """Raise ValueError for a model that continuous batching would answer wrongly, or not at all."""
    if config.num_core_layers and HALTINGS[config.halting["type"]].routes:
        raise ValueError(
            f"halting={config.halting['type']!r}: a paged cache hides no token from the others, so it cannot route; "
            "use generate."
        )
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True: a paged cache has no place for an encoder's keys; use generate.")
    if config.ngram_embedding["type"] != "none":
        raise ValueError(
            f"ngram_embedding={config.ngram_embedding['type']!r}: continuous batching hands a step no token but its "
            "own, and the hash needs those before; use generate."
        )
    heads = {config.layer_shape(layer).num_key_value_heads for layer in range(config.num_stored_layers)}
    if len(heads) > 1:
        raise ValueError(
            f"core_num_key_value_heads={config.layer_shape(config.num_prelude_layers).num_key_value_heads} is not "
            f"num_key_value_heads={config.num_key_value_heads}, and a paged cache has one size for all; use generate."
        )


def is_prepared(attention_mask: Any) -> bool:
    """Whether a mask no longer says which tokens are padding."""
    return isinstance(attention_mask, dict) or (isinstance(attention_mask, Tensor) and attention_mask.ndim > 2)


def refuse_cache_in_recompute() -> None:
    """Raise ValueError: recomputing a layer would write its keys twice, and dropping the cache, as `generate` would
    not notice, gives other tokens.
    """
    raise ValueError(
        "past_key_values cannot be used while gradient checkpointing recomputes layers. To generate, switch to "
        "model.eval(), or pass use_cache=False; in training, leave the cache out."
    )


def default_position_ids(
    inputs_embeds: Tensor, attention_mask: Any, past_key_values: Cache | None, cu_seq_lens: Tensor | None = None
) -> Tensor:
    """Positions [B or 1, S] where the caller gave none: counted within each of the packed sequences that begin at
    `cu_seq_lens`; over the tokens that a 2-D mask lets through, so that a padded row sees the positions it would see
    alone; otherwise counted on from the cache.
    """
    if cu_seq_lens is not None:
        index = torch.arange(inputs_embeds.shape[1], device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        begin = cu_seq_lens[torch.searchsorted(cu_seq_lens, index, right=True) - 1]
        return (index - begin).unsqueeze(0).to(inputs_embeds.device)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return of_this_call(counted, inputs_embeds, past_key_values)
    return places_of_call(inputs_embeds, past_key_values).unsqueeze(0)
