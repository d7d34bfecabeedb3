"""The Universal Transformer with its decoder (arXiv 1807.03819, section 2), as an `EncoderDecoderModel` of two looped
models.

The port (andreamad8/Universal-Transformer-Pytorch) has an `Encoder` and a `Decoder`, no model around them and no
config. The source is to hold their tensors under `enc.` and `dec.` and one embedding table for both sides and the
head, `embed.weight`, as tensor2tensor shares it; its `config.json` the arguments of both (see universal.py) and
`"model_type": "universal_transformer", "is_encoder_decoder": true`. `final_norm` says whether the model around them
applies the `layer_norm` that either has and does not apply itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderModel

from modeling_looped.conversion.tensor_map import Link, Repeat, TensorMap, Unread, rename

from .family import PublishedFamily, Shapes, looped_config
from .source_config import SourceConfig
from .universal import EMBEDDING, NORM_KINDS, UniversalTransformer, their_name

#: Our part of a name -> theirs, in the decoder's one layer.
DECODER_PARTS = {
    "self_attn.q_proj": "multi_head_attention_dec.query_linear",
    "self_attn.k_proj": "multi_head_attention_dec.key_linear",
    "self_attn.v_proj": "multi_head_attention_dec.value_linear",
    "self_attn.o_proj": "multi_head_attention_dec.output_linear",
    "cross_attn.q_proj": "multi_head_attention_enc_dec.query_linear",
    "cross_attn.k_proj": "multi_head_attention_enc_dec.key_linear",
    "cross_attn.v_proj": "multi_head_attention_enc_dec.value_linear",
    "cross_attn.o_proj": "multi_head_attention_enc_dec.output_linear",
    "input_layernorm": "layer_norm_mha_dec",
    "pre_cross_attn_layernorm": "layer_norm_mha_enc",
}
#: The start of our names -> their module.
SIDES = {"encoder.": "enc", "decoder.model.": "dec"}


@final
class UniversalEncoderDecoder(PublishedFamily):
    """Encoder and decoder with linear feed-forward layers, with or without halting."""

    name = "universal_transformer_encoder_decoder"
    model_class = EncoderDecoderModel

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "universal_transformer" and bool(config.get("is_encoder_decoder"))

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.ignore("is_encoder_decoder", "decoder_start_token_id")
        shared = UniversalTransformer().fields(config, shapes)
        is_causal = bool(config.values.get("use_mask", False))  # their default, of the encoder
        return {
            "encoder": {**shared, "is_causal": is_causal, "logit_scale": 1.0},
            "decoder": {**shared, "is_causal": True, "is_decoder": True, "add_cross_attention": True},
            "pad_token_id": shared["pad_token_id"],
            "decoder_start_token_id": config.values.get("decoder_start_token_id"),
        }

    def config_of(self, fields: Mapping[str, Any]) -> PreTrainedConfig:
        sides = {side: looped_config(self, fields[side]).to_dict() for side in ("encoder", "decoder")}
        return EncoderDecoderConfig(**{**fields, **sides})

    def tensor_map(
        self, config: Mapping[str, Any], looped: PreTrainedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        links = []
        tables = tuple(name for name in ours if name.endswith("embed_tokens.weight"))
        links.append(Link((EMBEDDING,), tables, (Repeat(len(tables)),)))
        for name in ours:
            if name in tables:
                continue
            start, module = next((start, module) for start, module in SIDES.items() if name.startswith(start))
            parts = DECODER_PARTS if module == "dec" else {}
            links.append(rename(their_name(name.removeprefix(start), module, parts), name))
        unread = [
            Unread(f"{module}.layer_norm.{kind}", "a norm that their code never applies")
            for module in SIDES.values()
            for kind in NORM_KINDS.values()
        ]
        return TensorMap(links, () if config.get("final_norm") else unread)


__all__ = ["UniversalEncoderDecoder"]
