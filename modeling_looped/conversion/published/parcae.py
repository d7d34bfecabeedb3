"""Parcae (arXiv 2604.12946): Huginn's skeleton with a stable injection, value embeddings and a readout matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import HalfRotary, Link, Split, TensorMap, Transpose, Unread, rename

from .family import PublishedFamily, Shapes, layer_prefixes
from .huginn import ends, gated_mlp, query_key_biases
from .rotary_table import interleaved_table
from .source_config import SourceConfig

#: Classes of torch.nn, and Parcae's own `ReLU2`, by their name in the config.
ACTIVATIONS = {
    "ReLU2": "half_relu2",
    "SiLU": "silu",
    "GELU": "gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "Hardswish": "hardswish",
    "Mish": "mish",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Identity": "linear",
}
NORM_TYPES = {"RMSNorm": "rms", "LayerNorm": "layer"}
GATE_CHANNELS = 32
#: Values of `use_fused_head`; `full-triton` stores a head that is not tied transposed.
FUSED_HEADS = ("pytorch", "cce", "full-triton")
#: Their projections with a plain bias -> ours.
BIASED = {"attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}


class Scales(NamedTuple):
    """What an initialisation scheme decides about a finished model, as functions of its width.

    Attributes:
        std: deviation of the embeddings, and of a state drawn like them.
        embedding: factor on the embeddings.
        logits: factor on the logits.
    """

    std: Callable[[float], float]
    embedding: Callable[[float], float] = lambda width: 1.0
    logits: Callable[[float], float] = lambda width: 1.0


def small(width: float) -> float:
    """sqrt(2 / (5 D))."""
    return math.sqrt(2 / (5 * width))


SCHEMES = {
    "bert": Scales(lambda width: 0.02),
    "kaiming": Scales(lambda width: math.sqrt(2 / width)),
    "llama": Scales(lambda width: 1.0),
    "llama-by-dim": Scales(lambda width: 1.0),
    "megatron": Scales(lambda width: 0.02),
    "mitchell": Scales(lambda width: 1 / math.sqrt(width)),
    "normal": Scales(lambda width: 1 / math.sqrt(width)),
    "scaled": Scales(small),
    "scaled-geiping": Scales(small),
    "scaled-stuck": Scales(small),
    "scaled-zero": Scales(small),
    "small": Scales(small),
    "takase": Scales(small, math.sqrt),
    "takase-scaled": Scales(small, math.sqrt, lambda width: math.sqrt(2 / 5) / math.sqrt(width)),
}


@final
class Parcae(PublishedFamily):
    """Parcae-140m to 1.3b, and all that its config can say of a model."""

    name = "parcae"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("_class_name") == "ParcaeConfig" or config.get("model_class_name") == "Parcae"

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        for name, value in {
            "block_class_name": "TransformerPreNormBlock",
            "model_class_name": "Parcae",
            "_class_name": "ParcaeConfig",
        }.items():
            config.supported(name, value, default=value)
        if config.take("mup_model_scaling_factor", 1) != 1:
            config.refuse("mup_model_scaling_factor", "supported: 1; their code fails with any other")
        if config.take("use_fused_head", "pytorch") not in FUSED_HEADS:
            config.refuse("use_fused_head", f"supported: {', '.join(FUSED_HEADS)}; hhe has no logits without labels")
        # their forward never reads these, or in measurements that are switched on by hand
        config.ignore("use_abacus", "debias_attention", "center_attention")
        config.ignore("activation_checkpoint_impl", "attn_impl", "curriculum_target", "hf_config", "init_orthogonal")
        config.ignore("lockstep_k", "lockstep_n", "padding_multiple", "recurrent_iteration_method", "sampling_scheme")
        config.ignore("skip_initialization", "strategy", "_is_recurrent_block_config", "mean_backprop_depth")
        config.ignore("_recurrent_block_config", "init")

        width, heads = config.take("n_embd"), config.take("num_attention_heads")
        if not width or not heads:
            return {}
        activation = config.supported("nonlin_name", *ACTIVATIONS, default="GELU")
        norm = config.supported("norm_class_name", *NORM_TYPES, default="LayerNorm")
        if config.take("simple_ops", False):
            norm = "RMSNorm"  # whatever norm_class_name says
        mlp = config.supported("mlp_class_name", "BaseMLP", "GatedMLP", default="BaseMLP")
        key_value_heads = config.take("num_key_value_heads", heads)
        biased, query_key = config.take("bias", False), config.take("qk_bias", False)
        if query_key and biased:
            config.refuse(
                "qk_bias", "with bias=True, queries and keys have two biases each; supported: one of the two"
            )
        if query_key and config.take("clip_qkv", None) is not None:
            config.refuse(
                "clip_qkv", "with qk_bias=True, which their code adds behind the clip; supported: without it"
            )
        if query_key and key_value_heads != heads:
            config.refuse(
                "qk_bias", f"with num_key_value_heads={key_value_heads}, their code has none for fewer heads"
            )
        scales = self._scales(config, width)
        positions = config.take("block_size", 4096)
        fields = {
            "vocab_size": config.take("padded_vocab_size", config.take("vocab_size", None)),
            "hidden_size": width,
            "intermediate_size": config.take("intermediate_size", 4 * width),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": width // heads,
            "num_prelude_layers": config.take("n_layers_in_prelude"),
            "num_core_layers": config.take("n_layers_in_recurrent_block"),
            "num_coda_layers": config.take("n_layers_in_coda"),
            "num_loops": config.take("mean_recurrence", 32),
            "hidden_act": ACTIVATIONS.get(activation),
            "mlp_type": "plain" if mlp == "BaseMLP" else "gated",
            "attention_bias": biased or query_key,
            "attention_value_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": biased,
            "qkv_clip": config.take("clip_qkv", None),
            "qk_norm": "per_head_unweighted" if config.take("qk_norm", False) else "none",
            "norm_type": NORM_TYPES.get(norm),
            "prelude_norm": config.take("prelude_norm", False),
            "rms_norm_eps": config.take("norm_eps", 1e-5),
            "max_position_embeddings": config.take("randomize_positions_from", positions),
            **rotary(config),
            "embedding_scale": scales[1],
            "logit_scale": scales[2],
            "final_logit_softcapping": config.take("logit_softcap", None),
            "injection": injection(config, biased=biased),
            "state_init": first_state(config, width, scales[0] * scales[1]),
            "readout": {"type": "linear", "bias": biased},
            "initializer_range": scales[0],
            "tie_word_embeddings": config.take("tie_embeddings", False),
            **config.special_tokens(),
        }
        fields |= core_sizes(config, fields)
        layers = gated_layers(config.values)
        if layers:
            fields["value_embedding"] = {"type": "gated", "layers": layers, "gate_channels": GATE_CHANNELS}
        refuse_what_crashes(config, fields, layers)
        return fields

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        links = ends(looped)
        if config.get("use_fused_head") == "full-triton" and not looped.tie_word_embeddings:
            links[-1] = Link((("lm_head.weight",),), ("lm_head.weight",), (Transpose(),))
        links += [rename(f"transformer.C.{name.split('.')[-1]}", name) for name in ours if ".readout." in name]
        theirs = "transformer.adapter.adapter" if looped.injection["type"] == "concat" else "transformer.adapter"
        links += [rename(f"{theirs}.{name.split('.')[-1]}", name) for name in ours if ".injection." in name]
        links += [
            rename(name.replace("model.prelude_norm", "transformer.ln_prelude"), name)
            for name in ours
            if "prelude_norm" in name
        ]
        if "model.norm.bias" in ours:
            links.append(rename("transformer.ln_f.bias", "model.norm.bias"))
        prefixes = layer_prefixes(looped, "transformer.prelude", "transformer.core_block", "transformer.coda")
        for layer, prefix in enumerate(prefixes):
            links += layer_links(looped, layer, prefix, ours)
        links += [
            rename(name.replace("model.value_embeddings", "value_embeds"), name)
            for name in ours
            if ".value_embeddings." in name
        ]
        return TensorMap(links, [*dead_value_embeddings(config, prefixes), rotary_table(config, looped)])

    def _scales(self, config: SourceConfig, width: int) -> tuple[float, float, float]:
        """Deviation of the embeddings, factor on them, factor on the logits."""
        scheme = config.supported("init_strategy", *SCHEMES, default="scaled")
        std, embedding, logits = (function(width) for function in SCHEMES.get(scheme, SCHEMES["scaled"]))
        return std, config.take("emb_scale", embedding), config.take("logit_scale", logits)


def injection(config: SourceConfig, *, biased: bool) -> dict[str, Any] | str:
    """How the prelude enters each loop; only the linear one can have a bias."""
    kind = config.supported("injection_type", "diagonal", "linear", "add", default="diagonal")
    return {"type": "concat", "bias": biased} if kind == "linear" else kind


def rotary(config: SourceConfig) -> dict[str, Any]:
    """Position embeddings, from `rope_settings`."""
    settings = config.take("rope_settings", {})
    parameters = {"rope_type": "default", "rope_theta": float(settings.get("rope_base", 50000))}
    condense = settings.get("rope_condense_ratio", 1)
    if condense != 1:
        parameters |= {"rope_type": "linear", "factor": float(condense)}
    uses = settings.get("use_rope", True)
    return {"rope_parameters": parameters, "position_embedding": "rope" if uses else "none"}


def rotary_table(config: Mapping[str, Any], looped: LoopedConfig) -> Unread:
    """`freqs_cis`, which follows from the config."""
    settings = config.get("rope_settings") or {}
    table = functools.partial(
        interleaved_table,
        looped.head_dim,
        looped.max_position_embeddings,
        theta=settings.get("rope_base", 50000),
        condense=settings.get("rope_condense_ratio", 1),
    )
    return Unread("freqs_cis", "sines of the rotary embedding", table)


def first_state(config: SourceConfig, width: int, like_embeddings: float) -> dict[str, Any] | str:
    """How the loop starts; `like_embeddings`: deviation of the scaled embeddings at initialisation."""
    match config.supported("state_init", "like-init", "normal", "embed", "zero", "unit", default="like-init"):
        case "zero":
            return "zeros"
        case "unit":
            return "unit_normal"
        case "normal":
            return {"type": "normal", "std": 1.0, "truncation": None}
        case "embed":
            return {"type": "normal", "std": 1 / math.sqrt(width), "truncation": None}
        case _:
            return {"type": "normal", "std": like_embeddings, "truncation": 3.0}


def core_sizes(config: SourceConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the core where they are not those around it. Its key-value heads are as many as its heads, always."""
    width = config.take("recurrent_embedding_dimension", 1024)
    wide = config.take("recurrent_intermediation_embedding_dimension", 3520)
    heads = config.take("recurrent_num_attention_heads", fields["num_attention_heads"])
    if width != heads * fields["head_dim"]:
        config.refuse(
            "recurrent_embedding_dimension",
            f"must be recurrent_num_attention_heads={heads} times their head size {fields['head_dim']}",
        )
    sizes = {
        "hidden_size": width,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return {f"core_{name}": size for name, size in sizes.items() if size != fields[name]}


def value_embedding_layers(config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Stored layers (prelude, core, coda) that own a value table, and those that own a gate.

    Tables go by the number of a layer among the stored ones, gates by its number among those that run, and by the
    parity of another depth (loops with gradient times layers of the core), so that the two can miss each other.
    """
    prelude, core, coda = (config.get(f"n_layers_in_{part}", 0) for part in ("prelude", "recurrent_block", "coda"))
    stored = prelude + core + coda
    running = [*range(prelude + core), *(prelude + core * config.get("mean_recurrence", 32) + i for i in range(coda))]
    tables = [layer for layer in range(stored) if layer % 2 == (stored - 1) % 2]
    parity = (core * config.get("mean_backprop_depth", 8) - 1) % 2
    return tables, [layer for layer, index in enumerate(running) if index % 2 == parity]


def gated_layers(config: Mapping[str, Any]) -> list[int]:
    """Stored layers whose value embedding is alive: those with both a table and a gate."""
    tables, gates = value_embedding_layers(config)
    return [layer for layer in tables if layer in gates]


def dead_value_embeddings(config: Mapping[str, Any], prefixes: list[str]) -> list[Unread]:
    """Tables without a gate and gates without a table."""
    tables, gates = value_embedding_layers(config)
    dead = [f"value_embeds.{layer}.weight" for layer in tables if layer not in gates]
    dead += [f"{prefixes[layer]}.attn.ve_gate.weight" for layer in gates if layer not in tables]
    return [Unread(name, "their code reads a value table only where a gate exists, and the reverse") for name in dead]


def refuse_what_crashes(config: SourceConfig, fields: Mapping[str, Any], gated: list[int]) -> None:
    """Note a core with value embeddings whose tables have the width of the other layers' values, not of its own."""
    first = fields["num_prelude_layers"] or 0
    core = range(first, first + (fields["num_core_layers"] or 0))
    heads = fields.get("core_num_key_value_heads", fields["num_key_value_heads"])
    if set(gated) & set(core) and heads != fields["num_key_value_heads"]:
        config.refuse(
            "num_key_value_heads",
            f"their code fails with it, since the core has {heads} and value embeddings of the others' width",
        )


def layer_links(looped: LoopedConfig, layer: int, prefix: str, names: Collection[str]) -> list[Link]:
    """Links of one block."""
    ours = f"model.layers.{layer}"
    shape = looped.layer_shape(layer)
    rotary = HalfRotary(shape.head_dim, (0,))
    links = [
        Link(((f"{prefix}.attn.c_{name}.weight",),), (f"{ours}.self_attn.{name}_proj.weight",), (rotary,))
        for name in "qk"
    ]
    renamed = {
        "attn.c_v.weight": "self_attn.v_proj.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "attn.ve_gate.weight": "self_attn.value_gate.weight",
        "mlp.proj.weight": "mlp.down_proj.weight",
        "norm_1.weight": "input_layernorm.weight",
        "norm_1.bias": "input_layernorm.bias",
        "norm_2.weight": "pre_feedforward_layernorm.weight",
        "norm_2.bias": "pre_feedforward_layernorm.bias",
    }
    if looped.mlp_type == "plain":
        renamed |= {"mlp.fc.weight": "mlp.up_proj.weight", "mlp.fc.bias": "mlp.up_proj.bias"}
    else:
        links.append(gated_mlp(prefix, ours, shape.intermediate_size))
    if looped.attention_output_bias:
        renamed |= {f"{part}.bias": f"{target}.bias" for part, target in BIASED.items()}
        links += [
            Link(((f"{prefix}.attn.c_{name}.bias",),), (f"{ours}.self_attn.{name}_proj.bias",), (rotary,))
            for name in "qk"
        ]
        if looped.mlp_type == "gated":
            halves = (f"{ours}.mlp.gate_proj.bias", f"{ours}.mlp.up_proj.bias")
            links.append(Link(((f"{prefix}.mlp.fc.bias",),), halves, (Split((shape.intermediate_size,) * 2),)))
    elif looped.attention_bias:
        both = (HalfRotary(shape.head_dim, (0, 1)),)
        links.append(query_key_biases(prefix, ours, shape.num_attention_heads, shape.head_dim, both))
    links += [rename(f"{prefix}.{theirs}", f"{ours}.{n}") for theirs, n in renamed.items() if f"{ours}.{n}" in names]
    return links


__all__ = ["Parcae"]
