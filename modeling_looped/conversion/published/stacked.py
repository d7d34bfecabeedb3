"""Stacked checkpoints: the stock Llama-like decoders, which are looped models without a core."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from transformers import AutoConfig

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap
from modeling_looped.families import FAMILIES

from .family import IN_PLACE, PublishedFamily, Shapes, copied, rotary_tables
from .source_config import SourceConfig


@final
class Stacked(PublishedFamily):
    """Llama, Mistral, Qwen 2 and 3, OLMo 2: all layers become the prelude, and nothing loops."""

    name = "stacked"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") in FAMILIES

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        if not self.recognises(config.values, ()):
            config.refuse("model_type", f"supported: {', '.join(FAMILIES)}")
            return {}
        config.ignore(*config.values)  # the table of stock families refuses what it does not know
        stock = AutoConfig.for_model(**config.values)
        return {
            **FAMILIES[stock.model_type].looped_fields(stock),
            "num_prelude_layers": stock.num_hidden_layers,
            "num_core_layers": 0,
            "num_coda_layers": 0,
            "num_loops": 1,
            **IN_PLACE,
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        norms = {ours: stock for stock, ours in FAMILIES[config["model_type"]].norms.items()}
        links = copied(ours, norms, tied=looped.tie_word_embeddings)
        return TensorMap(links, rotary_tables(looped, published))


__all__ = ["Stacked"]
