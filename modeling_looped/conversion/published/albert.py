"""ALBERT (arXiv 1909.11942): an encoder whose groups of layers loop, with narrow embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap, Unread, rename
from modeling_looped.modeling_looped import (
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
)

from .family import IN_PLACE, PublishedFamily, Shapes
from .source_config import SourceConfig

#: Our part of a name -> theirs, in a layer.
LAYER_PARTS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.dense",
    "post_attention_layernorm": "attention.LayerNorm",
    "mlp.up_proj": "ffn",
    "mlp.down_proj": "ffn_output",
    "post_feedforward_layernorm": "full_layer_layer_norm",
}

#: Our name -> theirs, outside of the layers.
OTHER_PARTS = {
    "model.embed_tokens": "albert.embeddings.word_embeddings",
    "model.position_embeddings": "albert.embeddings.position_embeddings",
    "model.token_type_embeddings": "albert.embeddings.token_type_embeddings",
    "model.embedding_norm": "albert.embeddings.LayerNorm",
    "model.embedding_projection": "albert.encoder.embedding_hidden_mapping_in",
    "head_transform.dense": "predictions.dense",
    "head_transform.norm": "predictions.LayerNorm",
    "pooler.dense": "albert.pooler",
    "score": "classifier",
    "qa_outputs": "qa_outputs",
}

#: Their class -> ours; a checkpoint that names no class is the masked language model that it was trained as.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "AlbertForMaskedLM": LoopedForMaskedLM,
    "AlbertForPreTraining": LoopedForMaskedLM,
    "AlbertForSequenceClassification": LoopedForSequenceClassification,
    "AlbertForTokenClassification": LoopedForTokenClassification,
    "AlbertForQuestionAnswering": LoopedForQuestionAnswering,
}

#: What a checkpoint for pretraining holds beyond the masked language model.
OTHER_HEADS = (
    "albert.pooler.weight",
    "albert.pooler.bias",
    "sop_classifier.classifier.weight",
    "sop_classifier.classifier.bias",
)


@final
class Albert(PublishedFamily):
    """ALBERT's masked language models and classifiers, base to xxlarge."""

    name = "albert"
    model_class = LoopedForMaskedLM

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "albert"

    def model_class_for(self, config: Mapping[str, Any]) -> type[PreTrainedModel]:
        architecture = next(iter(config.get("architectures") or ()), "AlbertForMaskedLM")
        if architecture not in MODEL_CLASSES:
            raise ValueError(f"architectures=[{architecture!r}] must be one of: {', '.join(MODEL_CLASSES)}.")
        return MODEL_CLASSES[architecture]

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.supported("position_embedding_type", "absolute", default="absolute")
        config.supported("tie_word_embeddings", True, default=True)
        config.ignore("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks")  # read by nothing
        config.ignore("hidden_dropout_prob")  # it acts in training only, and our hidden states have none
        layers, groups = config.take("num_hidden_layers", 12), config.take("num_hidden_groups", 1)
        inner = config.take("inner_group_num", 1)
        if layers % groups:
            config.refuse(
                "num_hidden_groups", f"must divide num_hidden_layers={layers}, else the groups loop unevenly"
            )
        return {
            "vocab_size": config.take("vocab_size", 30000),
            "embedding_size": config.take("embedding_size", 128),
            "hidden_size": config.take("hidden_size", 4096),
            "intermediate_size": config.take("intermediate_size", 16384),
            "num_attention_heads": config.take("num_attention_heads", 64),
            "num_prelude_layers": 0,
            "num_core_layers": groups * inner,
            "num_coda_layers": 0,
            "core_group_size": inner if groups > 1 else None,
            "num_loops": layers // groups,
            "hidden_act": config.take("hidden_act", "gelu_new"),
            "mlp_type": "plain",
            "mlp_bias": True,
            "attention_bias": True,
            "attention_output_bias": True,
            "attention_dropout": config.take("attention_probs_dropout_prob", 0.0),
            "norm_type": "layer",
            "norm_placement": "post",
            "final_norm": "none",
            "rms_norm_eps": config.take("layer_norm_eps", 1e-12),
            "position_embedding": "learned",
            "max_position_embeddings": config.take("max_position_embeddings", 512),
            "type_vocab_size": config.take("type_vocab_size", 2),
            "embedding_norm": True,
            "classifier_dropout": config.take("classifier_dropout_prob", 0.1),
            "initializer_range": config.take("initializer_range", 0.02),
            "is_causal": False,
            "mlm_head": "transform",
            "sequence_pooling": "first_token",
            **config.labels(),
            "tie_word_embeddings": True,
            **IN_PLACE,
            **config.special_tokens(),
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        inner = looped.core_group_size or looped.num_core_layers
        links = []
        for name in ours:
            stem, _, kind = name.rpartition(".")
            if name.startswith("model.layers."):
                _, _, layer, part = stem.split(".", 3)
                group, within = divmod(int(layer), inner)
                theirs = (
                    f"albert.encoder.albert_layer_groups.{group}.albert_layers.{within}.{LAYER_PARTS[part]}.{kind}",
                )
            elif name == "lm_head.bias":
                theirs = ("predictions.bias", "predictions.decoder.bias")
            else:
                theirs = (f"{OTHER_PARTS[stem]}.{kind}",)
                if stem == "model.embed_tokens":
                    theirs = (*theirs, "predictions.decoder.weight")
            links.append(rename(theirs, name))
        read = {name for link in links for names in link.sources for name in names}
        heads = [name for name in OTHER_HEADS if name not in read]
        unread = [Unread(name, "a head that this model does not have") for name in heads]
        return TensorMap(links, [*unread, Unread("albert.embeddings.position_ids", "the positions 0, 1, 2, ...")])


__all__ = ["Albert"]
