"""HRM-Text: two stacks in nested loops, a fast one inside a slow one (Transformers' `hrm_text`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap, rename

from .family import IN_PLACE, PublishedFamily, Shapes, embedding_names, llama_fields, rotary_tables
from .source_config import SourceConfig


@final
class HrmText(PublishedFamily):
    """HRM-Text-1B."""

    name = "hrm_text"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "hrm_text"

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.ignore("L_bp_cycles")  # which runs carry a gradient in training
        config.supported("attention_bias", False, default=False)  # their gate would have one too
        layers = config.take("num_layers_per_stack", config.take("num_hidden_layers", 0))
        fields = {
            **llama_fields(config),
            "num_prelude_layers": 0,
            "num_core_layers": 2 * layers,
            "num_coda_layers": 0,
            "num_loops": config.take("H_cycles", 2),
            "schedule": {"type": "nested", "inner_loops": config.take("L_cycles", 3)},
            "norm_type": "rms_unweighted",
            "final_norm": "every_loop",
            "attention_gate": "per_channel",
            "mlp_bias": config.take("mlp_bias", False),
            "prefix_lm": config.take("prefix_lm", True),
            **IN_PLACE,
        }
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields["head_dim"] = config.take("head_dim", 128)
        fields["embedding_scale"] = config.take("embedding_scale", 1.0 / fields["initializer_range"])
        return fields

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        per_stack = looped.num_core_layers // 2
        links = []
        for name in ours:
            parts = name.split(".")
            if parts[1] == "layers":
                stack, layer = divmod(int(parts[2]), per_stack)
                theirs = (".".join(["model", ("L_module", "H_module")[stack], "layers", str(layer), *parts[3:]]),)
            elif name == "model.schedule.low_state":
                theirs = ("model.z_L_init",)
            else:
                theirs = embedding_names(name, tied=looped.tie_word_embeddings)
            links.append(rename(theirs, name))
        return TensorMap(links, rotary_tables(looped, published))


__all__ = ["HrmText"]
