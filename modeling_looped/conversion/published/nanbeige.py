"""Nanbeige4.2: a Llama stack that loops whole, or in its middle only (LoopSplit)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap

from .family import IN_PLACE, LLAMA_NORMS, PublishedFamily, Shapes, copied, llama_fields, rotary_tables
from .source_config import SourceConfig

#: Switches of what no looped layer has -> what it is.
FOREIGN = {
    "enable_hyper_connection": "several residual streams",
    "enable_mhc": "several residual streams",
    "enable_depth_attention": "attention over earlier layers",
    "emb_neighbor_num": "n-gram embeddings",
    "insert_ngram_layer_idx": "n-gram embeddings",
    "ngram_insert_all_layers": "n-gram embeddings",
    "mhc_double_stream_position_for_loop": "several residual streams",
}

#: What only matters once one of those is on.
OF_FOREIGN = (
    "depth_attention_recent_window",
    "depth_attention_static_anchor_once",
    "depth_attention_stride",
    "emb_split_num",
    "emb_tp_num",
    "enable_h_res_identity",
    "mhc_diff_for_loop",
    "mhc_identity_nohresparam",
    "mhc_init_gating_factor",
    "mhc_sinkhorn_iterations",
    "ngram_compressed_tokenizer",
    "ngram_embedding_hidden_size",
    "ngram_fused_mode",
    "ngram_layer_downproject_size",
    "ngram_mod_force_prime",
    "ngram_vocab_size_ratio",
    "num_residual_streams",
    "skip_ngram_for_input",
)


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
        config.ignore(*OF_FOREIGN)
        biased = config.take("attention_bias", False)
        return {
            **llama_fields(config),
            **schedule(config),
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
        links = copied(ours, parts, tied=looped.tie_word_embeddings)
        return TensorMap(links, rotary_tables(looped, published))


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


__all__ = ["Nanbeige"]
