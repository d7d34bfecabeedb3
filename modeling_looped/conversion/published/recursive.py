"""Recursive transformers: Llama stacks whose layers share weights, published with one name per layer that runs.

The plain and relaxed recursive models of Mixture-of-Recursions (arXiv 2507.10524) and Relaxed Recursive Transformers
(arXiv 2410.20672). Their `config.json` is a Llama's with the number of layers that run, and says nothing of sharing. A
checkpoint that holds each shared tensor once shows it by the names that are missing; otherwise it must be said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import Link, Stack, TensorMap, rename

from .family import IN_PLACE, LLAMA_NORMS, PublishedFamily, Shapes, embedding_names, llama_fields, rotary_tables
from .source_config import SourceConfig

#: Under which all of a PEFT model's names stand.
PEFT = "base_model.model."

SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")


class Sharing(NamedTuple):
    """Which of the layers that run are one.

    Attributes:
        kind: `cycle` (abc abc), `sequence` (aa bb cc), or one of them in the middle, with a first and a last layer of
            their own.
        loops: how often each shared layer runs.
    """

    kind: str
    loops: int

    def owners(self, layers: int) -> list[int]:
        """For each of `layers` layers that run, the first one with the same weights."""
        edge = int(self.kind.startswith("middle"))
        shared, owners = (layers - 2 * edge) // self.loops, list(range(layers))
        for index in range(layers - 2 * edge):
            first = index % shared if self.kind.endswith("cycle") else index - index % self.loops
            owners[edge + index] = edge + first
        return owners

    def fields(self, layers: int) -> dict[str, Any]:
        """The fields of our config that say so."""
        edge = int(self.kind.startswith("middle"))
        return {
            "num_prelude_layers": edge,
            "num_core_layers": (layers - 2 * edge) // self.loops,
            "num_coda_layers": edge,
            "num_loops": self.loops,
            "core_group_size": None if self.kind.endswith("cycle") else 1,
        }


@final
class Recursive(PublishedFamily):
    """Cycle, sequence and middle sharing, with or without low-rank weights per loop."""

    name = "recursive"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        if config.get("model_type") != "llama" or any(".mor_router." in name for name in names):
            return False
        layers = config.get("num_hidden_layers", 0)
        return "sharing" in config or 0 < len(stored_layers(names)) < layers

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        biased = config.take("attention_bias", False)
        fields = {
            **llama_fields(config),
            "attention_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": config.take("mlp_bias", False),
            "kv_sharing": config.supported("kv_sharing", "none", "first_loop", default="none"),
            "loop_adapter": self._adapter(config, shapes),
            "final_norm": "end",
            **IN_PLACE,
        }
        layers = config.take("num_hidden_layers")
        sharing = self._sharing(config, layers, stored_layers(shapes))
        return fields if sharing is None else {**fields, **sharing.fields(layers)}

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        prefix = PEFT if any(name.startswith(PEFT) for name in published) else ""
        runs = layers_that_run(looped)
        adapted = {name.split(".")[-2] for name in ours if ".loop_adapters." in name}
        links = []
        for name in ours:
            parts = [LLAMA_NORMS.get(part, part) for part in name.split(".")]
            if ".layers." not in name:
                names = embedding_names(name, tied=looped.tie_word_embeddings)
                links.append(rename(tuple(prefix + theirs for theirs in names), name))
                continue
            indices = runs[int(parts[2])]
            if "loop_adapters" in parts:
                projection, factor = parts[5], parts[6]
                rest = f"{parts[3]}.{projection}.lora_{factor}.default.weight"
                names_by_loop = tuple((f"{prefix}model.layers.{index}.{rest}",) for index in indices)
                links.append(Link(names_by_loop, (name,), (Stack(),)))
                continue
            if looped.is_core_layer(int(parts[2])) and parts[4] in adapted:
                parts.insert(5, "base_layer")
            rest = ".".join(parts[3:])
            links.append(rename(tuple(f"{prefix}model.layers.{index}.{rest}" for index in indices), name))
        return TensorMap(links, rotary_tables(looped, published))

    def _sharing(self, config: SourceConfig, layers: int | None, stored: Collection[int]) -> Sharing | None:
        """From the config's `sharing` and `num_recursion`, or from the layers that are stored."""
        kind = config.take("sharing", "")
        loops = config.take("num_recursion", 0)
        if not layers:
            return None
        if not kind and not loops:
            found = sharing_of(layers, stored)
            if found is None:
                config.problem(
                    "which layers share their weights cannot be told from the tensors: say it with --set "
                    f"sharing=KIND (one of {', '.join(SHARINGS)}) and --set num_recursion=LOOPS"
                )
            return found
        if kind not in SHARINGS:
            config.refuse("sharing", f"supported: {', '.join(SHARINGS)}")
            return None
        shared = layers - 2 * int(kind.startswith("middle"))
        if not isinstance(loops, int) or loops < 1 or shared % loops:
            config.refuse("num_recursion", f"must divide the {shared} layers that {kind} shares")
            return None
        return Sharing(kind, loops)

    def _adapter(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any] | str:
        """Low-rank weights per loop, from the tensors and `lora_alpha`."""
        alpha = config.take("lora_alpha", 0)
        factors = [name for name in shapes if ".lora_A." in name]
        if not factors:
            return "none"
        ranks = {shapes[name][0] for name in factors}
        if len(ranks) > 1:
            config.problem(f"low-rank weights of ranks {sorted(ranks)} (supported: one rank for all)")
        if not alpha:
            config.problem("the scale of the low-rank weights is not in their tensors: say it with --set lora_alpha=A")
            return "none"
        targets = {name.split(".lora_A.")[0].rpartition(".")[2] for name in factors}
        return {"type": "lora", "rank": min(ranks), "alpha": alpha, "targets": sorted(targets)}


def stored_layers(names: Collection[str]) -> set[int]:
    """The layers of which there are more tensors than the low-rank weights."""
    found = set()
    for name in names:
        parts = name.removeprefix(PEFT).split(".")
        if parts[:2] == ["model", "layers"] and ".lora_" not in name and not name.endswith("inv_freq"):
            found.add(int(parts[2]))
    return found


def sharing_of(layers: int, stored: Collection[int]) -> Sharing | None:
    """The sharing of which exactly the layers `stored` are the first to run; `None`: there is none, or several."""
    found = []
    for kind in SHARINGS:
        edge = int(kind.startswith("middle"))
        shared, rest = len(stored) - 2 * edge, layers - 2 * edge
        if shared >= 1 and rest % shared == 0 and rest > shared:
            sharing = Sharing(kind, rest // shared)
            if set(sharing.owners(layers)) == set(stored):
                found.append(sharing)
    distinct = {tuple(sharing.owners(layers)): sharing for sharing in reversed(found)}
    return next(iter(distinct.values())) if len(distinct) == 1 else None


def layers_that_run(looped: LoopedConfig) -> list[list[int]]:
    """For each stored layer, its numbers in the order of execution."""
    layout = looped.slot_layout()
    runs: list[list[int]] = [[] for _ in range(layout.stored_layers)]
    for index in range(layout.num_invocations):
        runs[layout.invocation(index).layer].append(index)
    return runs


__all__ = ["Recursive"]
