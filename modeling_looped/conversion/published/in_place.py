"""Llama and OLMo 2 looped in place, the baseline of retrofitted recurrence (arXiv 2511.07384).

A stock decoder of which `block_size` layers from `start_index` on run `num_rec` times: no injection, no adapter, the
final norm once. Their `config.json` is the donor's; the loop is an argument of their code (`rec_post_init`). A
checkpoint of theirs may hold every tensor twice, as a layer of the donor and as one of `prelude`, `rec_block`, `coda`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import TensorMap, Unread, rename
from modeling_looped.families import FAMILIES

from .family import IN_PLACE, PublishedFamily, Shapes, embedding_names, layer_prefixes, rotary_tables
from .source_config import SourceConfig
from .stacked import stock_fields

ARCHITECTURES = {"LoopedLlamaForCausalLM": "llama", "LoopedOlmo2ForCausalLM": "olmo2"}
LOOP = ("num_rec", "start_index", "block_size", "prelude_size", "coda_size", "remove_layers")
PARTS = ("prelude", "rec_block", "coda")


@final
class LoopedInPlace(PublishedFamily):
    """A Llama or an OLMo 2 that runs a block of its layers several times."""

    name = "looped_in_place"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        named = any(architecture in ARCHITECTURES for architecture in config.get("architectures") or ())
        return named or "num_rec" in config or any(name.startswith("model.rec_block.") for name in names)

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        config.supported("model_type", *ARCHITECTURES.values())
        config.ignore(*LOOP)  # read below; `remove_layers` is one that their code takes and never reads
        fields = stock_fields(config, LOOP, architectures=ARCHITECTURES)
        stored = self._stored(config, shapes)
        if not fields or stored is None:
            return {}
        counts = [len(part) for part in stored]
        return {
            **fields,
            "num_prelude_layers": counts[0],
            "num_core_layers": counts[1],
            "num_coda_layers": counts[2],
            "num_loops": config.values["num_rec"],
            "final_norm": "end",
            **IN_PLACE,
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        """The donor's names, and those of the parts; layers that neither part takes are never run."""
        start = placed(config, published)[0] or 0
        size = looped.num_core_layers
        prelude, coda = looped.num_prelude_layers, looped.num_coda_layers
        donors = [*range(prelude), *range(start, start + size), *range(start + size, start + size + coda)]
        aliases = layer_prefixes(looped, *(f"model.{part}" for part in PARTS))
        norms = {ours: stock for stock, ours in FAMILIES[config["model_type"]].norms.items()}
        links = []
        for name in ours:
            parts = [norms.get(part, part) for part in name.split(".")]
            if ".layers." not in name:
                links.append(rename(embedding_names(name, tied=looped.tie_word_embeddings), name))
                continue
            layer, rest = int(parts[2]), ".".join(parts[3:])
            links.append(rename((f"model.layers.{donors[layer]}.{rest}", f"{aliases[layer]}.{rest}"), name))
        dropped = [
            Unread(name, "prelude_size and coda_size leave this layer out, so their code never runs it")
            for name in published
            if (found := re.match(r"model\.layers\.(\d+)\.", name)) and int(found[1]) not in donors
        ]
        return TensorMap(links, [*dropped, *rotary_tables(looped, published)])

    def _stored(self, config: SourceConfig, shapes: Shapes) -> tuple[range, range, range] | None:
        """The donor's layers that are prelude, core and coda; notes what is missing or does not fit."""
        layers, values = config.values.get("num_hidden_layers"), config.values
        start, size = placed(values, shapes)
        for name, value, least in (
            ("num_rec", values.get("num_rec"), 1),
            ("start_index", start, 0),
            ("block_size", size, 1),
        ):
            if value is None:
                config.problem(
                    f"{name} is missing: their code takes num_rec, start_index and block_size as arguments; say them "
                    "with --set"
                )
            elif type(value) is not int or value < least:
                config.problem(f"{name}={value!r} (must be an integer of at least {least})")
                return None
        if not layers or start is None or size is None or values.get("num_rec") is None:
            return None
        if start + size > layers:
            config.problem(f"start_index={start} and block_size={size} go beyond num_hidden_layers={layers}")
            return None
        edges = []
        for name, available in (("prelude_size", start), ("coda_size", layers - start - size)):
            kept = values.get(name)
            if kept is not None and (type(kept) is not int or not 0 <= kept <= available):
                config.refuse(name, f"must be an integer in 0..{available}, the layers there are")
                return None
            edges.append(available if kept is None else kept)
        return range(edges[0]), range(start, start + size), range(start + size, start + size + edges[1])


def placed(config: Mapping[str, Any], names: Collection[str]) -> tuple[int | None, int | None]:
    """`start_index` and `block_size`: as the config has them, or as the names of the parts show them."""
    counts = {}
    for part in PARTS:
        pattern = re.compile(rf"model\.{part}\.(\d+)\.")
        counts[part] = 1 + max((int(found[1]) for name in names if (found := pattern.match(name))), default=-1)
    shown = counts["rec_block"] > 0 and config.get("prelude_size") is None
    start, size = config.get("start_index"), config.get("block_size")
    return (
        counts["prelude"] if start is None and shown else start,
        (counts["rec_block"] or None) if size is None else size,
    )


__all__ = ["LoopedInPlace"]
