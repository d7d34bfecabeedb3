"""Recursive transformers: Llama stacks whose layers share weights, published with one name per layer that runs.

The plain and relaxed recursive models of Mixture-of-Recursions (arXiv 2507.10524) and Relaxed Recursive Transformers
(arXiv 2410.20672). Their `config.json` is a Llama's with the number of layers that run, and says nothing of sharing. A
checkpoint that holds each shared tensor once shows it by the names that are missing; otherwise it must be said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import Link, Reshape, Stack, TensorMap, rename

from .family import IN_PLACE, LLAMA_NORMS, PublishedFamily, Shapes, embedding_names, llama_fields, rotary_tables
from .source_config import SourceConfig

#: Under which all of a PEFT model's names stand.
PEFT = "base_model.model."

#: A vector per channel that multiplies a layer's output; the layer itself then stands in `block`.
ENCODING = ".recursion_encoding"
PROJECTION = re.compile(r"\.(self_attn|mlp)\..*(weight|bias)$")

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
        layers, stored = config.take("num_hidden_layers"), stored_layers(shapes)
        sharing = self._sharing(config, layers, stored)
        own_norms = any("layernorm" in name and layer_of(name) not in stored for name in shapes)
        fields = {
            **llama_fields(config),
            "attention_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": config.take("mlp_bias", False),
            "kv_sharing": shared_key_values(config, sharing),
            "loop_adapter": self._adapter(config, shapes),
            "loop_conditioning": "none" if config.take("ln_share", not own_norms) else "norms",
            "loop_update": "recursion_encoding" if any(name.endswith(ENCODING) for name in shapes) else "replace",
            "final_norm": "end",
            **IN_PLACE,
        }
        return fields if sharing is None else {**fields, **sharing.fields(layers)}

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        prefix = PEFT if any(name.startswith(PEFT) for name in published) else ""
        runs = layers_that_run(looped)
        adapted = {name.split(".")[-2] for name in ours if ".loop_adapters." in name}
        encoded = {layer_of(name) for name in published if name.endswith(ENCODING)}
        links = []

        def theirs(index: int, rest: str) -> str:
            return f"{prefix}model.layers.{index}.{'block.' if index in encoded else ''}{rest}"

        for name in ours:
            parts = [LLAMA_NORMS.get(part, part) for part in name.split(".")]
            if name == "model.loop_update.encoding":
                links.append(encodings(looped, name))
                continue
            if ".layers." not in name:
                names = embedding_names(name, tied=looped.tie_word_embeddings)
                links.append(rename(tuple(prefix + theirs for theirs in names), name))
                continue
            indices = runs[int(parts[2])]
            if "loop_adapters" in parts:
                projection, factor = parts[5], parts[6]
                rest = f"{parts[3]}.{projection}.lora_{factor}.default.weight"
                links.append(Link(tuple((theirs(index, rest),) for index in indices), (name,), (Stack(),)))
                continue
            if (
                looped.is_core_layer(int(parts[2]))
                and "layernorm" in name
                and looped.loop_conditioning["type"] == "norms"
            ):
                rest = ".".join(parts[3:])
                links.append(Link(tuple((theirs(index, rest),) for index in indices), (name,), (Stack(),)))
                continue
            if looped.is_core_layer(int(parts[2])) and parts[4] in adapted:
                parts.insert(5, "base_layer")
            rest = ".".join(parts[3:])
            links.append(rename(tuple(theirs(index, rest) for index in indices), name))
        return TensorMap(links, rotary_tables(looped, published))

    def _sharing(self, config: SourceConfig, layers: int | None, stored: Collection[int]) -> Sharing | None:
        """From the config's `sharing` and `num_recursion`, or from the layers that are stored."""
        shared_caches = config.values.get("kv_sharing")
        hint = shared_caches if isinstance(shared_caches, Mapping) and shared_caches.get("enable", True) else {}
        kind = config.take("sharing", hint.get("sharing") or "")
        loops = config.take("num_recursion", hint.get("num_recursion") or 0)
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
        alpha, scale = config.take("lora_alpha", 0), config.take("lora_alpha_pattern", 0)
        if any(".lora_magnitude_vector" in name for name in shapes):
            config.problem("its low-rank weights are DoRA's, with magnitudes (supported: LoRA)")
        if any(name.endswith(("adaption_prompt", "adaption_gate")) for name in shapes):
            config.problem("it has adaption prompts in its attention (supported: LoRA, recursion encodings)")
        factors = [name for name in shapes if ".lora_A." in name]
        if not factors:
            return "none"
        ranks: dict[str, set[int]] = {}
        for name in factors:
            ranks.setdefault(name.split(".lora_A.")[0].rpartition(".")[2], set()).add(shapes[name][0])
        if any(len(found) > 1 for found in ranks.values()):
            config.problem(f"low-rank weights of ranks {ranks} (supported: one rank for each projection)")
            return "none"
        targets = sorted(ranks)
        each = [min(ranks[target]) for target in targets]
        if scale:
            alpha = scale * max(each)
        elif len(set(each)) > 1 or not alpha:
            config.problem(
                "the scale of the low-rank weights is not in their tensors: say it with --set lora_alpha=A, or, where "
                "their ranks differ, with --set lora_alpha_pattern=SCALE"
            )
            return "none"
        several = {"ranks": each} if len(set(each)) > 1 else {}
        return {"type": "lora", "rank": max(each), "alpha": alpha, "targets": targets, **several}


def stored_layers(names: Collection[str]) -> set[int]:
    """The layers whose projections are there, beyond what each loop has of its own."""
    found = {layer_of(name) for name in names if PROJECTION.search(name) and ".lora_" not in name}
    return {layer for layer in found if layer is not None}


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, in the order of execution."""
    parts = name.removeprefix(PEFT).split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else None


def shared_key_values(config: SourceConfig, sharing: Sharing | None) -> str:
    """`kv_sharing`: our word for it, or the mapping that their code writes into its config."""
    value = config.take("kv_sharing", "none")
    if not isinstance(value, Mapping):
        return config.supported("kv_sharing", "none", "first_loop", default="none")
    if not value.get("enable", True):
        return "none"
    if value.get("update_cache"):
        config.refuse("kv_sharing", "update_cache, keys that some tokens renew in every loop, is not supported")
    same = sharing is None or (value.get("sharing") == sharing.kind and value.get("num_recursion") == sharing.loops)
    if not same:
        config.refuse("kv_sharing", f"supported: that of the weights, {sharing}")
    return "first_loop"


def encodings(looped: LoopedConfig, name: str) -> Link:
    """The link of the vectors that multiply what the last layer of each group gives, in every loop."""
    layout, size = looped.slot_layout(), looped.core_group_size or looped.num_core_layers
    groups, loops, width = looped.num_core_layers // size, looped.num_loops, looped.hidden_size
    runs, first = layers_that_run(looped), layout.prelude + size - 1
    sources = [
        f"model.layers.{runs[first + group * size][loop]}{ENCODING}"
        for loop in range(loops)
        for group in range(groups)
    ]
    steps = (Stack(), Reshape((loops * groups, width), (loops, groups, width)))
    return Link(tuple((source,) for source in sources), (name,), steps)


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
