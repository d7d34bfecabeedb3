"""Families: the stock Transformers decoders that a looped model is made from and unrolls into.

A family is data: where each field of our architecture stands in the stock config, or which one value the stock code
has built in, and what its norms are called. Retrofit reads the table one way and `unroll` the other, so adding a
family is adding one entry of `FAMILIES`, and its test.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .configuration_looped import LoopedConfig
from .state_map import Drop, New, Rename, StateMap

#: A bias that one side lacks is one of zeros, so these may be `True` in a stock model where ours says `False`.
BIASES = ("attention_bias", "attention_value_bias", "attention_output_bias", "mlp_bias")


class BuiltIn(NamedTuple):
    """Of a field that the stock config does not have: the stock code works as if it were `value`."""

    value: Any


class StockFit(NamedTuple):
    """How a family can say what a looped config says of its layers.

    Attributes:
        family: the family.
        fields: fields of the stock config.
        blocking: our fields that it cannot say -> why.
        zero_biases: our biases that are `False` and will be zeros in the stock model.
    """

    family: Family
    fields: dict[str, Any]
    blocking: dict[str, str]
    zero_biases: list[str]


@dataclasses.dataclass(frozen=True)
class Family:
    """One stock architecture.

    Attributes:
        model_type: its name in Transformers.
        fields: our config field -> the stock config's, or `BuiltIn`. One stock field may stand for several of ours.
        norms: stock name -> our name of each norm around a layer's two branches.
        sliding: which layers can have a sliding window: `none`, `all` (or none of them), or `any`.
        not_carried: field of the stock config -> why nothing is lost without it.
        whole_heads: whether the stock config demands that `num_attention_heads` divides `hidden_size`.
    """

    model_type: str
    fields: Mapping[str, str | BuiltIn]
    norms: Mapping[str, str]
    sliding: str = "none"
    not_carried: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole_heads: bool = False

    def looped_fields(self, stock: PreTrainedConfig) -> dict[str, Any]:
        """The fields of `LoopedConfig` that say what `stock` says of its layers.

        Raises:
            ValueError: naming every field of `stock` that has no counterpart, with what is supported.
        """
        refused = self._refused(stock)
        if refused:
            raise ValueError(f"a {self.model_type} model with {'; '.join(refused)} is not supported.")
        values = {
            ours: copy.deepcopy(place.value if isinstance(place, BuiltIn) else getattr(stock, place, None))
            for ours, place in self.fields.items()
        }
        if self.sliding != "none":
            values["sliding_window"] = stock.sliding_window
        if self.sliding == "any":
            values["stored_layer_types"] = list(stock.layer_types)
        return values

    def stock_fit(
        self, config: LoopedConfig, layer_types: Sequence[str], *, absorbed: Collection[str] = ()
    ) -> StockFit:
        """How this family says a stack of `config`'s layers.

        Args:
            config: of the looped model.
            layer_types: attention type of every layer of the stack.
            absorbed: fields of `config` that the weights of the stack account for.
        """
        fields: dict[str, Any] = {"num_hidden_layers": len(layer_types)}
        blocking: dict[str, str] = {}
        for ours, place in self.fields.items():
            value = getattr(config, ours)
            if isinstance(place, str):
                # `or`: one stock field for several biases of ours
                fields[place] = fields.get(place, False) or value if ours in BIASES else copy.deepcopy(value)
            elif value != place.value and ours not in absorbed and not (ours in BIASES and place.value):
                blocking[ours] = f"{self.model_type} has {place.value!r} built in"
        zero_biases = [
            ours
            for ours in BIASES
            if not getattr(config, ours)
            and (place.value if isinstance(place := self.fields[ours], BuiltIn) else fields[place])
        ]
        if config.hidden_act not in ACT2FN:
            blocking["hidden_act"] = f"Transformers, and so {self.model_type}, has no such activation"
        if turns_part_of_heads(config.rope_parameters):
            blocking["rope_parameters"] = f"{self.model_type} turns whole heads"
        if self.whole_heads and config.hidden_size % config.num_attention_heads:
            blocking["num_attention_heads"] = f"{self.model_type} wants a divisor of hidden_size={config.hidden_size}"
        slides = [layer_type == "sliding_attention" for layer_type in layer_types]
        window = config.sliding_window if any(slides) else None
        if self.sliding == "none" and any(slides):
            blocking["sliding_window"] = f"{self.model_type} has full attention only"
        elif self.sliding == "all":
            fields["sliding_window"] = window
            if any(slides) and not all(slides):
                blocking["stored_layer_types"] = f"{self.model_type} has one type of attention for all layers"
        elif self.sliding == "any":
            fields |= {"layer_types": list(layer_types), "sliding_window": window, "use_sliding_window": any(slides)}
        return StockFit(self, fields, blocking, zero_biases)

    def state_map(self, *, tied: bool) -> StateMap:
        """From the stock model's weights to those of a looped model whose layers are stored in the same order.

        Args:
            tied: whether the head is the embedding matrix.
        """
        same = ["model.embed_tokens.weight", "model.norm.weight"]
        same += [f"model.layers.{{layer}}.{part}.{{name}}.{{tensor}}" for part in ("self_attn", "mlp")]
        rules: list[Rename | Drop | New] = [Rename(key, key) for key in same]
        for stock, ours in self.norms.items():
            rules.append(Rename(f"model.layers.{{layer}}.{stock}.weight", f"model.layers.{{layer}}.{ours}.weight"))
        if tied:
            because = "the head is the embedding matrix (tie_word_embeddings)"
            return StateMap(*rules, Drop("lm_head.weight", because), New("lm_head.weight", because))
        return StateMap(*rules, Rename("lm_head.weight", "lm_head.weight"))

    def _refused(self, stock: PreTrainedConfig) -> list[str]:
        refused = []
        rope = stock.rope_parameters or {}
        if any(isinstance(parameters, dict) for parameters in rope.values()):
            refused.append(f"rope_parameters={rope!r} per type of layer (supported: one set for all layers)")
        elif turns_part_of_heads(rope):
            refused.append(
                f"rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']} (supported: 1; the code of "
                f"{self.model_type} in Transformers turns whole heads)"
            )
        slides = getattr(stock, "sliding_window", None) is not None
        supported = {
            "none": {"full_attention"},
            "all": {"sliding_attention" if slides else "full_attention"},
            "any": {"full_attention", "sliding_attention"},
        }[self.sliding]
        types = set(getattr(stock, "layer_types", None) or ())
        if types - supported:
            refused.append(f"layer_types of {sorted(types)} (supported: {sorted(supported)})")
        if stock.is_heterogeneous:
            refused.append("per_layer_config (supported: the same sizes in every layer)")
        known = {place for place in self.fields.values() if isinstance(place, str)} | self.not_carried.keys()
        known |= {"num_hidden_layers", "layer_types", "sliding_window"}
        known |= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        # a field that a later Transformers may declare; set to anything but its default it may change the function
        refused += [
            f"{field.name}={getattr(stock, field.name)!r} (supported: {field.default!r})"
            for field in dataclasses.fields(stock)
            if field.name not in known and getattr(stock, field.name) != field.default
        ]
        return refused


def turns_part_of_heads(rope_parameters: Mapping[str, Any] | None) -> bool:
    """Whether rotary embeddings leave some channels of a head alone."""
    return ((rope_parameters or {}).get("partial_rotary_factor") or 1.0) != 1.0


SAME_FIELDS = {
    field: field
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rope_parameters",
        "rms_norm_eps",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    )
}

LLAMA = Family(
    model_type="llama",
    fields={
        **SAME_FIELDS,
        "attention_bias": "attention_bias",
        "attention_value_bias": "attention_bias",
        "attention_output_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "mlp_type": BuiltIn("gated"),
        "mlp_output_act": BuiltIn(None),
        "attention_gate": BuiltIn("none"),
        "qkv_clip": BuiltIn(None),
        "qk_norm": BuiltIn("none"),
        "norm_type": BuiltIn("rms"),
        "position_embedding": BuiltIn("rope"),
        "embedding_size": BuiltIn(None),
        "embedding_norm": BuiltIn(False),
        "type_vocab_size": BuiltIn(0),
        "norm_placement": BuiltIn("pre"),
        "is_causal": BuiltIn(True),
        "embedding_scale": BuiltIn(1.0),
        "logit_scale": BuiltIn(1.0),
        "final_logit_softcapping": BuiltIn(None),
    },
    # Our names are Gemma 2's, where a norm behind attention and one before the MLP can both exist.
    norms={"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_feedforward_layernorm"},
    not_carried={"pretraining_tp": "it split matrix products during training; Transformers no longer reads it"},
    whole_heads=True,
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    fields={
        **LLAMA.fields,
        "attention_bias": BuiltIn(False),
        "attention_value_bias": BuiltIn(False),
        "attention_output_bias": BuiltIn(False),
        "mlp_bias": BuiltIn(False),
    },
    sliding="all",
    not_carried={},
    whole_heads=False,
)

QWEN2 = dataclasses.replace(
    MISTRAL,
    model_type="qwen2",
    fields={**MISTRAL.fields, "attention_bias": BuiltIn(True), "attention_value_bias": BuiltIn(True)},
    sliding="any",
    not_carried={
        "use_sliding_window": "layer_types and sliding_window have been derived from it",
        "max_window_layers": "layer_types has been derived from it",
    },
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    fields={
        **QWEN2.fields,
        "attention_bias": "attention_bias",
        "attention_value_bias": "attention_bias",
        "attention_output_bias": "attention_bias",
        "qk_norm": BuiltIn("per_head"),
    },
)

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    fields={
        **LLAMA.fields,
        "mlp_bias": BuiltIn(False),
        "qk_norm": BuiltIn("flat"),
        "norm_placement": BuiltIn("post_branch"),
    },
    norms={
        "post_attention_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_feedforward_layernorm",
    },
    not_carried={},
    whole_heads=False,
)

#: Model type -> family, the plainest first: `unroll` takes the first that fits.
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2)}

#: Field of a stock config that is set where a model has a feature that no looped layer has -> the feature.
FOREIGN_FEATURES = {
    "attn_logit_softcapping": "a soft cap on attention logits",
    "attention_multiplier": "a scale of its own on attention logits",
    "kv_lora_rank": "latent attention",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "residual_multiplier": "a scale on residual branches",
    "vision_config": "images",
    "is_encoder_decoder": "an encoder",
}


def family_of(stock: PreTrainedConfig) -> Family:
    """The family of a stock config.

    Raises:
        ValueError: if it belongs to none; names those there are, and the features that stand in the way.
    """
    family = FAMILIES.get(stock.model_type)
    if family is None:
        features = {word for field, word in FOREIGN_FEATURES.items() if getattr(stock, field, None)}
        found = f" It has {', '.join(sorted(features))}." if features else ""
        raise ValueError(
            f"model_type={stock.model_type!r} is not a supported family: {', '.join(FAMILIES)} are.{found}"
        )
    return family


__all__ = ["FAMILIES", "BuiltIn", "Family", "StockFit", "family_of"]
