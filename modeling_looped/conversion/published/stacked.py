"""Stacked checkpoints: the stock Llama-like decoders, which are looped models without a core."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, final

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
        return {
            **stock_fields(config),
            "num_prelude_layers": config.take("num_hidden_layers"),
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


def stock_fields(
    config: SourceConfig, loops: Collection[str] = (), architectures: Collection[str] | None = None
) -> dict[str, Any]:
    """The fields of `LoopedConfig` that a stock config says. Those that its class does not have are left to `finish`:
    Transformers would keep them as attributes that nothing reads.

    Args:
        config: of the checkpoint.
        loops: fields beyond the stock config's, read by the caller.
        architectures: names of classes that the checkpoint may have been saved from; `None`: the stock one.
    """
    model_type = config.values.get("model_type")
    if model_type not in FAMILIES:
        config.refuse("model_type", f"supported: {', '.join(FAMILIES)}")
        return {}
    known = {name.lower() for name in architectures or ()} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type].lower()}
    unknown = [name for name in config.values.get("architectures") or () if name.lower() not in known]
    if unknown:
        config.refuse("architectures", f"known to compute what {model_type} does: {', '.join(sorted(known))}")
        return {}
    stock = AutoConfig.for_model(**{name: value for name, value in config.values.items() if name not in loops})
    declared = {field.name for field in dataclasses.fields(stock)} - {"is_encoder_decoder"}
    config.ignore(*declared, "rope_scaling", "rope_theta")
    try:
        return FAMILIES[model_type].looped_fields(stock)
    except ValueError as error:
        config.problem(str(error).removesuffix("."))
        return {}


__all__ = ["Stacked", "stock_fields"]
