"""Huginn (arXiv 2502.05171) and the models retrofitted to its skeleton (arXiv 2511.07384).

Prelude, core and coda, a linear adapter that brings the prelude into every loop, a random first state. The released
Huginn-0125 has blocks of its own; retrofitted models keep those of their donor, a Llama or an OLMo 2. All carry the
same `model_type`, so what the blocks are is read from the tensors' names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import HalfRotary, Link, Reshape, Split, TensorMap, Unread, rename

from .family import PublishedFamily, Shapes, layer_prefixes
from .rotary_table import interleaved_table
from .source_config import SourceConfig

#: Their name of each norm -> ours, by how the norms are placed.
NORMS = {
    "sandwich_sum": {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "norm_3": "pre_feedforward_layernorm",
        "norm_4": "post_feedforward_layernorm",
    },
    "pre": {"norm_1": "input_layernorm", "norm_2": "pre_feedforward_layernorm"},
    "post_branch": {"norm_1": "post_attention_layernorm", "norm_2": "post_feedforward_layernorm"},
}


@final
class Huginn(PublishedFamily):
    """Huginn-0125, and retrofitted Llama and OLMo 2 models."""

    name = "huginn"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "huginn_raven"

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        placement = norm_placement(shapes)
        is_huginn = placement == "sandwich_sum"
        for name, value in {
            "architecture_class_name": "RecurrentGPT",
            "block_class_name": "SandwichBlock",
            "norm_class_name": "RMSNorm_llama",
            "mlp_class_name": "GatedMLP",
            "nonlin_name": "SiLU",
            "injection_type": "linear",
            "state_init": "like-init",
            "bias": False,
            "test_time_noise": 0,
        }.items():
            config.supported(name, value, default=value)
        config.ignore("activation_checkpoint_impl", "effective_expected_depth", "hf_config", "init_orthogonal")
        config.ignore("init_strategy", "mean_backprop_depth", "padding_multiple", "sampling_scheme")
        config.ignore("n_layers", "test_time_noise_type", "tie_word_embeddings", "num_attention_heads")

        width, heads = config.take("n_embd"), config.take("n_heads", config.values.get("num_attention_heads"))
        if not width or not heads:
            return {}
        key_value_heads = config.take("num_key_value_heads", heads)
        biased = config.take("qk_bias", True)
        if biased and key_value_heads != heads:
            config.refuse(
                "qk_bias", f"with num_key_value_heads={key_value_heads}, their code has none for fewer heads"
            )
        block_size, base = config.take("block_size", 4096), config.take("rope_base", 50000)
        positions = config.take("max_position_embeddings", block_size)
        if not is_huginn and not (config.values.get("rope_theta") or config.values.get("rope_parameters")):
            config.problem("rope_theta is missing")
        donor_rope = config.rope(10000.0)
        own_rope = {"rope_type": "default", "rope_theta": float(base)}

        values = config.take("init_values", {})
        std, scale = values.get("std", math.sqrt(2 / (5 * width))), values.get("embed_scale", math.sqrt(width))
        return {
            "vocab_size": config.take("padded_vocab_size", config.take("vocab_size", 65536)),
            "hidden_size": width,
            "intermediate_size": config.take("intermediate_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": config.take("head_dim", width // heads),
            "num_prelude_layers": config.take("n_layers_in_prelude"),
            "num_core_layers": config.take("n_layers_in_recurrent_block"),
            "num_coda_layers": config.take("n_layers_in_coda"),
            "num_loops": config.take("mean_recurrence", 32),
            "attention_bias": biased,
            "attention_value_bias": False,
            "qk_norm": "flat" if placement == "post_branch" else "none",
            "norm_placement": placement,
            "final_norm": "after_loops" if is_huginn else "end",
            "prelude_norm": False,
            "rms_norm_eps": config.take("norm_eps", 1e-6),
            "max_position_embeddings": block_size if is_huginn else positions,
            "rope_parameters": own_rope if is_huginn else donor_rope,
            "embedding_scale": scale,
            "initializer_range": std,
            "tie_word_embeddings": config.take("tie_embeddings", True),
            **first_state(config, std * scale),
            **config.special_tokens(),
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        interleaved = looped.norm_placement == "sandwich_sum"
        prefixes = layer_prefixes(looped, "transformer.prelude", "transformer.core_block", "transformer.coda")
        links = [rename("transformer.adapter.weight", "model.injection.weight")]
        links += ends(looped)
        for layer, prefix in enumerate(prefixes):
            links += layer_links(looped, layer, prefix, interleaved=interleaved)
        table = functools.partial(
            interleaved_table,
            looped.head_dim,
            looped.max_position_embeddings,
            theta=config.get("rope_base", 50000),
        )
        return TensorMap(links, [Unread("freqs_cis", "sines of the rotary embedding", table if interleaved else None)])


def norm_placement(names: Collection[str]) -> str:
    """How the norms of the blocks are placed, told by the tensors that there are."""
    if any(".norm_3." in name for name in names):
        return "sandwich_sum"
    return "post_branch" if any(".attn.q_norm." in name for name in names) else "pre"


def first_state(config: SourceConfig, std: float) -> dict[str, Any]:
    """How the loop starts, `std` being the deviation of a state that is drawn."""
    match config.supported("initial_state_mode", "random", "embed-init", "skip-adapter", default="random"):
        case "embed-init":
            return {"injection": "concat", "state_init": "input"}
        case "skip-adapter":
            return {"injection": {"type": "concat", "first_loop": "skip"}, "state_init": "input"}
        case _:
            # `init_scale` is an argument of their forward, which no config holds; as a setting it fixes the start
            std *= config.take("init_scale", 1.0)
            drawn = {"type": "normal", "std": std, "truncation": 3.0}
            return {"injection": "concat", "state_init": drawn if std else "zeros"}


def ends(looped: LoopedConfig) -> list[Link]:
    """Links of embeddings, final norm and head, which Huginn and Parcae name alike."""
    embedding, head = "transformer.wte.weight", "lm_head.weight"
    tied = looped.tie_word_embeddings
    links = [
        rename((embedding, head) if tied else embedding, "model.embed_tokens.weight"),
        rename("transformer.ln_f.weight", "model.norm.weight"),
    ]
    return links if tied else [*links, rename(head, head)]


def layer_links(looped: LoopedConfig, layer: int, prefix: str, *, interleaved: bool) -> list[Link]:
    """Links of one block."""
    ours = f"model.layers.{layer}"
    shape = looped.layer_shape(layer)
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    rotary = (HalfRotary(shape.head_dim, (0, 1)),) if interleaved else ()
    links = [
        Link(
            ((f"{prefix}.attn.Wqkv.weight",),),
            tuple(f"{ours}.self_attn.{name}_proj.weight" for name in "qkv"),
            (Split((queries, keys, keys)), *rotary),
        ),
        rename(f"{prefix}.attn.proj.weight", f"{ours}.self_attn.o_proj.weight"),
        gated_mlp(prefix, ours, shape.intermediate_size),
        rename(f"{prefix}.mlp.proj.weight", f"{ours}.mlp.down_proj.weight"),
    ]
    if looped.attention_bias:
        links.append(query_key_biases(prefix, ours, shape.num_attention_heads, shape.head_dim, rotary))
    if looped.qk_norm == "flat":
        links += [rename(f"{prefix}.attn.{n}_norm.weight", f"{ours}.self_attn.{n}_norm.weight") for n in "qk"]
    norms = NORMS[looped.norm_placement]
    return [*links, *(rename(f"{prefix}.{theirs}.weight", f"{ours}.{name}.weight") for theirs, name in norms.items())]


def gated_mlp(prefix: str, ours: str, intermediate_size: int) -> Link:
    """`fc` holds the rows of the gate, then those of the up projection."""
    targets = (f"{ours}.mlp.gate_proj.weight", f"{ours}.mlp.up_proj.weight")
    return Link(((f"{prefix}.mlp.fc.weight",),), targets, (Split((intermediate_size,) * 2),))


def query_key_biases(prefix: str, ours: str, heads: int, head_dim: int, rotary: tuple[HalfRotary, ...]) -> Link:
    """`qk_bias` [2, 1, heads, K] holds the biases of queries and of keys, added before they are rotated."""
    size = heads * head_dim
    steps = (Reshape((2, 1, heads, head_dim), (2 * size,)), Split((size, size)), *rotary)
    targets = (f"{ours}.self_attn.q_proj.bias", f"{ours}.self_attn.k_proj.bias")
    return Link(((f"{prefix}.attn.qk_bias",),), targets, steps)


__all__ = ["Huginn", "ends", "gated_mlp", "query_key_biases"]
