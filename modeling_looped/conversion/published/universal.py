"""The Universal Transformer (arXiv 1807.03819) as PyTorch ports of tensor2tensor have it.

The port (andreamad8/Universal-Transformer-Pytorch) saves no config, so the source's `config.json` is to hold the
arguments of its `Encoder` under their names: `num_vocab`, `embedding_size`, `hidden_size`, `num_layers`, `num_heads`,
`total_key_depth`, `total_value_depth`, `filter_size`, `max_length`, `use_mask`, `act`, and
`"model_type": "universal_transformer"`. The encoder ends without a head; of the model around it, `final_norm` says
whether it applies the encoder's `layer_norm`, which the encoder itself does not, and `logit_scale` what it multiplies
the products with the embeddings by.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap, Unread, rename
from modeling_looped.modeling_looped import LoopedForCausalLM, LoopedForMaskedLM

from .family import IN_PLACE, PublishedFamily, Shapes
from .source_config import SourceConfig

#: What the embedding matrix may be called, which is the head too.
EMBEDDING = ("embed.weight", "emb.weight", "W.weight")
#: Our part of a name -> theirs, in the one layer.
LAYER_PARTS = {
    "self_attn.q_proj": "multi_head_attention.query_linear",
    "self_attn.k_proj": "multi_head_attention.key_linear",
    "self_attn.v_proj": "multi_head_attention.value_linear",
    "self_attn.o_proj": "multi_head_attention.output_linear",
    "input_layernorm": "layer_norm_mha",
    "pre_feedforward_layernorm": "layer_norm_ffn",
    "mlp.up_proj": "positionwise_feed_forward.layers.0",
    "mlp.down_proj": "positionwise_feed_forward.layers.1",
}
OTHER_PARTS = {
    "embedding_projection": "embedding_proj",
    "halting": "act_fn.p",
    "norm": "layer_norm",
}
#: What their layer norms call `weight` and `bias`.
NORM_KINDS = {"weight": "gamma", "bias": "beta"}


@final
class UniversalTransformer(PublishedFamily):
    """An encoder with linear feed-forward layers, causal or seeing both sides, with or without halting."""

    name = "universal_transformer"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "universal_transformer" and not config.get("is_encoder_decoder")

    def model_class_for(self, config: Mapping[str, Any]) -> type[PreTrainedModel]:
        return LoopedForCausalLM if self.is_causal(config) else LoopedForMaskedLM

    @staticmethod
    def is_causal(config: Mapping[str, Any]) -> bool:
        """Whether a token sees only what is before it (`use_mask`)."""
        return bool(config.get("use_mask", True))

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.ignore("use_mask")
        config.ignore("input_dropout", "layer_dropout", "relu_dropout")
        width, embedding = config.take("hidden_size"), config.take("embedding_size")
        for name in ("total_key_depth", "total_value_depth"):
            if (config.take(name, 0) or width) != width:
                config.refuse(name, f"supported: hidden_size={width}")
        if embedding != width:
            config.refuse("embedding_size", "their code has a projection only where it equals hidden_size")
        if any(".positionwise_feed_forward.layers.0.conv." in name for name in shapes):
            config.problem("convolutions in the feed-forward layers (supported: linear ones, layer_config='ll')")
        halts = config.take("act", False)
        return {
            "vocab_size": config.take("num_vocab"),
            "hidden_size": width,
            "embedding_size": embedding,
            "embedding_projection_bias": False,
            "intermediate_size": config.take("filter_size"),
            "num_attention_heads": config.take("num_heads"),
            "num_prelude_layers": 0,
            "num_core_layers": 1,
            "num_coda_layers": 0,
            "num_loops": config.take("num_layers"),
            "hidden_act": "relu",
            "mlp_type": "plain",
            "mlp_output_act": "relu",
            "mlp_bias": True,
            "attention_dropout": config.take("attention_dropout", 0.0),
            "norm_type": "layer_unbiased",
            "final_norm": "end" if config.take("final_norm", False) else "none",
            "logit_scale": config.take("logit_scale", 1.0),
            "rms_norm_eps": 1e-6,
            "position_embedding": "none",
            "max_position_embeddings": config.take("max_length", 100),
            "loop_conditioning": {"type": "sinusoidal", "scale": 1.0, "positions": "every_loop"},
            "halting": {"type": "act", "threshold": 0.9, "form": "universal"} if halts else "none",
            "is_causal": self.is_causal(config.values),
            "tie_word_embeddings": True,
            **IN_PLACE,
            **config.special_tokens(),
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        links = []
        for name in ours:
            if name == "lm_head.weight":
                continue
            if name == "model.embed_tokens.weight":
                links.append(rename(EMBEDDING, name))
            else:
                links.append(rename(their_name(name.removeprefix("model."), "enc"), name))
        unread = [
            Unread(f"enc.layer_norm.{kind}", "a norm that their code never applies") for kind in NORM_KINDS.values()
        ]
        return TensorMap(links, unread if looped.final_norm == "none" else ())


def their_name(name: str, module: str, parts: Mapping[str, str] | None = None) -> str:
    """What tensor `name` of our base model is called in their `module`, `enc` or `dec`; `parts` go before
    `LAYER_PARTS`.
    """
    stem, _, kind = name.rpartition(".")
    in_layer = stem.startswith("layers.0.")
    part = {**LAYER_PARTS, **(parts or {})}[stem.removeprefix("layers.0.")] if in_layer else OTHER_PARTS[stem]
    kind = NORM_KINDS[kind] if "layer_norm" in part else kind
    return f"{module}.{module}.{part}.{kind}" if in_layer else f"{module}.{part}.{kind}"


__all__ = ["EMBEDDING", "NORM_KINDS", "UniversalTransformer", "their_name"]
