"""Ouro (arXiv 2510.25741): the whole stack loops, with a norm after every loop and an exit gate on its output."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap

from .family import IN_PLACE, PublishedFamily, Shapes, copied, llama_fields, rotary_tables
from .source_config import SourceConfig


@final
class Ouro(PublishedFamily):
    """ByteDance's Ouro-1.4B and Ouro-2.6B, and what is trained from them."""

    name = "ouro"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "ouro"

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.ignore("chunk_size")  # of the loss, which their code computes in pieces
        config.supported("early_exit_step", None)  # reads every token from one loop: that is a smaller num_loops
        layers = config.take("num_hidden_layers")
        return {
            **llama_fields(config, theta=10000.0),
            **windows(config, layers),
            "num_prelude_layers": 0,
            "num_core_layers": layers,
            "num_coda_layers": 0,
            "num_loops": config.take("total_ut_steps", 4),
            "norm_placement": "sandwich",
            "final_norm": "every_loop",
            "halting": {"type": "gate", "threshold": config.take("early_exit_threshold", 1.0)},
            **IN_PLACE,
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        norms = {
            "post_attention_layernorm": "input_layernorm_2",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "post_attention_layernorm_2",
        }
        links = copied(ours, {**norms, "halting": "early_exit_gate"}, tied=looped.tie_word_embeddings)
        return TensorMap(links, rotary_tables(looped, published))


def windows(config: SourceConfig, layers: int | None) -> dict[str, Any]:
    """Which layers see a sliding window, in the notation of Qwen 2 and its relatives."""
    window = config.take("sliding_window", None)
    uses = config.take("use_sliding_window", False)
    first = config.take("max_window_layers", 0)
    types = config.take("layer_types", None)
    if types is None:
        slides = bool(uses and window)
        types = [
            "sliding_attention" if slides and layer >= first else "full_attention" for layer in range(layers or 0)
        ]
    if set(types) - {"full_attention", "sliding_attention"}:
        config.refuse("layer_types", "supported: full_attention, sliding_attention")
    if "sliding_attention" not in types:
        return {}
    return {"sliding_window": window, "stored_layer_types": list(types)}


__all__ = ["Ouro"]
