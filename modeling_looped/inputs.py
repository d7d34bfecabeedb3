"""What a forward derives from its inputs before the first layer: masks, positions, and whether the cache fits.

B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .configuration_looped import LoopedConfig
from .halting import Halting
from .slots import SlotLayout

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


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
    starts = past_key_values is None or past_key_values.get_seq_length() == 0
    prefix: dict[str, Any] = prefix_blocks(config, token_type_ids) if starts else {}
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
    held = len(cache.layers)
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    if held == num_slots or (grows and held == 0):
        return
    raise ValueError(
        f"num_loops={layout.loops} needs a cache of {num_slots} slots (one per loop and layer) and this one has "
        f"{held}: a cache belongs to one loop count. Start a new cache, or pass the num_loops it was made with."
    )


def prefix_blocks(config: LoopedConfig, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    """The argument of Transformers' mask functions that lets tokens of type 1 see each other (`config.prefix_lm`)."""
    if not config.prefix_lm or token_type_ids is None:
        return {}
    return {"block_sequence_ids": torch.where(token_type_ids == 1, 0, -1)}


def valid_tokens(inputs_embeds: Tensor, attention_mask: Any) -> Tensor:
    """The tokens of this call that are not padding, bool [B, S]; all, unless a 2-D mask says otherwise."""
    batch, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -length:].to(device=inputs_embeds.device, dtype=torch.bool)
    return torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)


def refuse_what_cannot_route(
    config: LoopedConfig, halting: Halting, cache: Cache | None, kwargs: Mapping[str, Any]
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
    if kwargs.get("cache") is not None or any(
        isinstance(layer, QuantizedLayer) for layer in getattr(cache, "layers", ())
    ):
        raise ValueError(f"{rule} works with dynamic, static and offloaded caches, not with paged or quantised ones.")


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
    length = inputs_embeds.shape[1]
    if cu_seq_lens is not None:
        index = torch.arange(length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
        begin = cu_seq_lens[torch.searchsorted(cu_seq_lens, index, right=True) - 1]
        return (index - begin).unsqueeze(0).to(inputs_embeds.device)
    fixed_size = past_key_values is not None and past_key_values.is_compileable
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and not fixed_size:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
