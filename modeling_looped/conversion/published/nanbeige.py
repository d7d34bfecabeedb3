"""Nanbeige4.2: a Llama stack that loops whole, or in its middle only (LoopSplit)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, final

import torch

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import Link, Reshape, Stack, TensorMap, Unread, rename

from .family import (
    IN_PLACE,
    LLAMA_NORMS,
    PublishedFamily,
    Shapes,
    copied,
    embedding_names,
    llama_fields,
    rotary_tables,
)
from .source_config import SourceConfig

#: Switches of what no looped layer has -> what it is.
FOREIGN = {
    "insert_ngram_layer_idx": "n-gram embeddings inside of layers",
    "ngram_insert_all_layers": "n-gram embeddings inside of layers",
    "ngram_compressed_tokenizer": "n-grams of token ids that a stored table maps",
    "skip_ngram_for_input": "n-gram embeddings inside of layers",
}


@final
class Nanbeige(PublishedFamily):
    """Nanbeige4.2-3B and the options of its code that are no other architecture."""

    name = "nanbeige"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return config.get("model_type") == "nanbeige"

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        for switch, what in FOREIGN.items():
            if config.take(switch, None):
                config.refuse(switch, f"{what}; supported: off")
        biased = config.take("attention_bias", False)
        order = schedule(config)
        return {
            **llama_fields(config),
            **order,
            "residual_streams": residual_streams(config, order),
            "depth_attention": depth_attention(config),
            "ngram_embedding": ngram_embedding(config),
            "attention_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": config.take("mlp_bias", False),
            "qk_norm": "per_head" if config.take("qk_layernorm", False) else "none",
            **IN_PLACE,
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        parts = {**LLAMA_NORMS, "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
        plain = [name for name in ours if ".residual_streams." not in name]
        tied = looped.tie_word_embeddings
        if looped.ngram_embedding["type"] == "none":
            links = copied(plain, parts, tied=tied)
        else:
            own = [name for name in plain if name != EMBEDDINGS and ".ngram_embedding." not in name]
            links = copied(own, parts, tied=tied) + ngram_links(looped)
        links += connections(looped)
        return TensorMap(links, [*rotary_tables(looped, published), *static_mappings(looped)])


def schedule(config: SourceConfig) -> dict[str, Any]:
    """Which layers loop, how often, and where the final norm acts."""
    layers = config.take("num_hidden_layers") or 0
    loops, loss_weights = config.take("num_loops", 1), config.take("loop_loss_weights", [])
    middle = config.take("loop_middle_layers", layers // 2)
    skips_norm = config.take("skip_loop_final_norm", False)
    shares = config.take("loop_share_kv", False)
    if not config.take("enable_double_loop_split", False):
        if shares:
            config.refuse("loop_share_kv", "their code wants enable_double_loop_split for it")
        return {
            "num_prelude_layers": 0,
            "num_core_layers": layers,
            "num_coda_layers": 0,
            # in training each loop but the last has a loss of its own, whose weights count the loops
            "num_loops": len(loss_weights) + 1 if loss_weights else loops,
            "final_norm": "end" if skips_norm else "every_loop",
        }
    if middle < 1 or layers % middle:
        config.refuse("loop_middle_layers", f"must divide num_hidden_layers={layers}")
        return {}
    before = (layers - middle) // 2
    return {
        "num_prelude_layers": before,
        "num_core_layers": middle,
        "num_coda_layers": layers - before - middle,
        "num_loops": (layers + middle) // middle,  # twice as many layers run as there are
        "final_norm": "end",
        "kv_sharing": "first_loop" if shares else "none",
    }


def residual_streams(config: SourceConfig, order: Mapping[str, Any]) -> dict[str, Any] | str:
    """Hyper-connections, if there are any; `order` is what `schedule` said."""
    mhc, splits = config.take("enable_mhc", False), config.values.get("enable_double_loop_split")
    streams = config.take("num_residual_streams", 4)
    gate, iterations = config.take("mhc_init_gating_factor", 0.01), config.take("mhc_sinkhorn_iterations", 20)
    identity, bare = config.take("enable_h_res_identity", False), config.take("mhc_identity_nohresparam", False)
    own = config.take("mhc_diff_for_loop", False)
    doubled = config.take("mhc_double_stream_position_for_loop", None)
    if not config.take("enable_hyper_connection", False):
        for name in ("enable_mhc", "enable_h_res_identity", "mhc_identity_nohresparam"):
            if config.values.get(name):
                config.refuse(name, "their code wants enable_hyper_connection for it")
        return "none"
    for name in ("mhc_diff_for_loop", "mhc_double_stream_position_for_loop"):
        if config.values.get(name) and not splits:
            config.refuse(name, "their code wants enable_double_loop_split for it")
    if doubled not in (None, "mid", "edge"):
        config.refuse("mhc_double_stream_position_for_loop", "supported: mid, edge")
    if identity and not bare:
        config.refuse(
            "enable_h_res_identity", "its projections have rows that nothing reads; with mhc_identity_nohresparam only"
        )
    spec = {
        "type": "mhc" if mhc else "hyper_connections",
        "num_streams": streams * 2 if doubled == "edge" else streams,
        "core_num_streams": None if doubled is None else streams * 2 if doubled == "mid" else streams,
        # in the split the streams run through the whole model, else each loop starts from one and ends in the mean
        "span": "model" if splits else "part",
        "own_loops": order.get("num_loops", 1) if own else 1,
        "initial_gate": gate,
    }
    if mhc:
        mixing = "identity" if identity else "sinkhorn"
        spec |= {"mixing": mixing, "sinkhorn_iterations": iterations, "initial_logit": 20.0}
    return spec


def depth_attention(config: SourceConfig) -> dict[str, Any] | str:
    """Depth attention, if there is any. Their code never reads `depth_attention_static_anchor_once`."""
    config.ignore("depth_attention_static_anchor_once")
    stride = config.take("depth_attention_stride", None) or (config.values.get("num_hidden_layers") or 2) // 2
    window = config.take("depth_attention_recent_window", 0)
    if not config.take("enable_depth_attention", False):
        return "none"
    if window:
        config.refuse("depth_attention_recent_window", "supported: 0")
    if config.values.get("loop_share_kv"):
        config.refuse("loop_share_kv", "with enable_depth_attention their code cannot generate; supported: off")
    return {"type": "anchors", "stride": stride}


def ngram_embedding(config: SourceConfig) -> dict[str, Any] | str:
    """N-gram embeddings, if there are any."""
    switches = {
        name: config.take(name, None) for name in ("emb_neighbor_num", "emb_split_num", "ngram_vocab_size_ratio")
    }
    prime, width = config.take("ngram_mod_force_prime", False), config.take("ngram_embedding_hidden_size", None)
    fusion, multiple = config.take("ngram_fused_mode", "average"), config.take("emb_tp_num", None)
    boundary, vocabulary = config.values.get("eos_token_id"), config.values.get("vocab_size") or 1
    config.ignore("ngram_layer_downproject_size")
    if all(value is None for value in switches.values()):
        return "none"
    for name, value in {**switches, "emb_tp_num": multiple}.items():
        if value is None:
            config.refuse(name, f"n-gram embeddings need {', '.join(switches)} and emb_tp_num")
            return "none"
    if isinstance(boundary, list):
        config.refuse("eos_token_id", "with n-gram embeddings it must be one token, or none")
    longest, splits, base = switches["emb_neighbor_num"], switches["emb_split_num"], vocabulary
    size = switches["ngram_vocab_size_ratio"] * vocabulary
    tables = (longest - 1) * splits
    sizes = [int(size + 2 * index + 1) for index in range(tables)]
    if prime:
        base, sizes = next_prime(vocabulary), []
        for _ in range(tables):
            size = next_prime(int(size))
            sizes.append(size)
    return {
        "type": "hashed",
        "max_n": longest,
        "table_sizes": sizes,
        "row_multiple": multiple,
        "width": width,
        "hash_base": base,
        "boundary_token_id": boundary if isinstance(boundary, int) else None,
        "fusion": fusion,
    }


def next_prime(number: int) -> int:
    """The least prime above `number`."""
    number += 1
    while number < 2 or any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


EMBEDDINGS = "model.embed_tokens.weight"


def ngram_links(looped: LoopedConfig) -> list[Link]:
    """Links of the n-gram embeddings, and of the token embeddings, which their module holds once more."""
    spec, there, here = looped.ngram_embedding, "model.ngram_embeddings", "model.ngram_embedding"
    names = embedding_names(EMBEDDINGS, tied=looped.tie_word_embeddings)
    links = [rename((*names, f"{there}.word_embeddings.weight"), EMBEDDINGS)]
    for table in range(len(spec["table_sizes"])):
        links.append(rename(f"{there}.embedders.{table}.weight", f"{here}.tables.{table}.weight"))
        if spec["fusion"] == "average":
            links.append(rename(f"{there}.post_projs.{table}.weight", f"{here}.projections.{table}.weight"))
    if spec["fusion"] == "concat":
        links.append(rename(f"{there}.concat_proj.weight", f"{here}.projections.0.weight"))
    return links


#: Branch of a layer -> what its connections are called there.
HYPER_CONNECTIONS = {"attention": "self_attn", "mlp": "mlp"}


def connection_names(looped: LoopedConfig, layer: int, branch: str) -> list[str]:
    """The modules of the connections of one branch, one for each loop that has its own."""
    rows = looped.residual_streams["own_loops"] if looped.is_core_layer(layer) else 1
    prefix = f"model.layers.{layer}.{HYPER_CONNECTIONS[branch]}"
    return [f"{prefix}_hc", *(f"{prefix}_mhc_loop_hcs.{row}" for row in range(rows - 1))]


def connections(looped: LoopedConfig) -> list[Link]:
    """Links of the hyper-connections: ours have a row per loop, and the factors of one connection in one tensor."""
    spec = looped.residual_streams
    if spec["type"] == "none":
        return []
    bias = "bias" if spec["type"] == "mhc" else "mapping_proj.bias"
    factors = ["pre", "post"] if spec.get("mixing") == "identity" else ["pre", "post", "res"]
    links = []
    for layer in range(looped.num_stored_layers):
        for branch in HYPER_CONNECTIONS:
            there = connection_names(looped, layer, branch)
            here = f"model.layers.{layer}.residual_streams.{branch}"
            for ours, theirs in (("weight", "mapping_proj.weight"), ("bias", bias)):
                links.append(Link(tuple((f"{name}.{theirs}",) for name in there), (f"{here}.{ours}",), (Stack(),)))
            alphas = tuple((f"{name}.alpha_{factor}",) for name in there for factor in factors)
            rows = Reshape((len(alphas), 1), (len(there), len(factors)))
            links.append(Link(alphas, (f"{here}.gate",), (Stack(), rows)))
    return links


def static_mappings(looped: LoopedConfig) -> list[Unread]:
    """Constants that their connections store: which stream a layer reads, ones, and the identity; and the factor of
    a mix that is not there.
    """
    spec = looped.residual_streams
    if spec["type"] == "none":
        return []
    unread = []
    for layer in range(looped.num_stored_layers):
        count = (looped.is_core_layer(layer) and spec["core_num_streams"]) or spec["num_streams"]
        tables = {
            "h_pre_static": torch.eye(count)[layer % count],
            "h_post_static": torch.ones(count),
            "h_res_static": torch.eye(count),
        }
        for branch in HYPER_CONNECTIONS:
            for name in connection_names(looped, layer, branch):
                unread += [
                    Unread(f"{name}.{table}", "a constant of the connections", partial(torch.clone, value))
                    for table, value in tables.items()
                ]
                if spec.get("mixing") == "identity":
                    unread.append(Unread(f"{name}.alpha_res", "the streams are not mixed"))
    return unread


__all__ = ["Nanbeige"]
