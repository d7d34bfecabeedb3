"""Mixture-of-Recursions (arXiv 2507.10524): a recursive Llama whose tokens are routed through its loops.

As with the plain recursive models, `config.json` is a Llama's and says nothing of recursion or routing. How many
layers are shared, how often, and which router it is show in the tensors' names; the rest must be said with `--set`:
`mor_capacity` (expert choice), `mor_alpha`, `mor_router_func`, `mor_gating`, `mor_temp`. Only `kv_sharing` is there,
where their code has set it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, final

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import Link, Reshape, Stack, TensorMap, Unread, rename

from .family import IN_PLACE, LLAMA_NORMS, PublishedFamily, Shapes, embedding_names, llama_fields, rotary_tables
from .recursive import Sharing, shared_key_values
from .source_config import SourceConfig

#: Weight of a router's scores: a linear one's, and that of one with a hidden layer (`mlp`, `wide_mlp`), whose first
#: weight is `HIDDEN`.
LINEAR, SCORES, HIDDEN = (f".mor_router.router.{part}weight" for part in ("", "2.", "0."))
#: A layer inside a wrapper: expert choice wraps each loop, token choice all of them in one, which may be all there is.
EXPERT_LAYER = re.compile(r"model\.layers\.(?P<loop>\d+)\.block\.(?P<layer>\d+)\.")
TOKEN_LAYER = re.compile(r"model\.layers\.(\d+\.)?block_list\.(?P<loop>\d+)\.(?P<layer>\d+)\.")


@final
class MixtureOfRecursions(PublishedFamily):
    """Expert-choice and token-choice models, in the two sharings that their code routes: cycle and middle cycle."""

    name = "mor"

    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return any(".mor_router." in name for name in names)

    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        routers = [name for name in shapes if name.endswith((LINEAR, SCORES))]
        if not routers or any(".mor_router.recur_embeds" in name for name in shapes):
            config.problem(
                f"there is no router that is known: no tensor ends with {LINEAR} or {SCORES}, or it is a depth-aware "
                "one (supported: linear, mlp, wide_mlp)"
            )
            return {}
        router = {"router_width": shapes[routers[0]][1]} if routers[0].endswith(SCORES) else {}
        router |= {"temperature": float(config.take("mor_temp", 1.0))}
        router |= {"gating": config.supported("mor_gating", "weighted", "additive", default="weighted")}
        layers, biased = config.take("num_hidden_layers"), config.take("attention_bias", False)
        by_token = any(".block_list." in name for name in shapes)
        loops = shapes[routers[0]][0] if by_token else len(routers)
        pattern = TOKEN_LAYER if by_token else EXPERT_LAYER
        core = 1 + max((int(found["layer"]) for name in shapes if (found := pattern.match(name))), default=-1)
        edge = int(any(re.match(r"model\.layers\.0\.(self_attn|mlp)\.", name) for name in shapes))
        if layers != core * loops + 2 * edge:
            config.refuse(
                "num_hidden_layers", f"the tensors are those of {core} layers, {loops} loops, {2 * edge} others"
            )
        return {
            **llama_fields(config),
            "attention_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": config.take("mlp_bias", False),
            "num_prelude_layers": edge,
            "num_core_layers": core,
            "num_coda_layers": edge,
            "num_loops": loops,
            "halting": router
            | (self._token_choice(config, shapes) if by_token else self._expert_choice(config, loops)),
            "kv_sharing": shared_key_values(config, Sharing("middle_cycle" if edge else "cycle", loops)),
            "final_norm": "end",
            **IN_PLACE,
        }

    def tensor_map(
        self, config: Mapping[str, Any], looped: LoopedConfig, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        by_token = looped.halting["type"] == "token_choice"
        links = []
        for name in ours:
            parts = [LLAMA_NORMS.get(part, part) for part in name.split(".")]
            if ".halting.router." in name:
                links.append(router_link(looped, name, by_token=by_token))
            elif name == "model.halting.balancing_bias":
                links.append(rename(f"{token_wrapper(looped)}.router_bias", name))
            elif ".layers." not in name:
                links.append(rename(embedding_names(name, tied=looped.tie_word_embeddings), name))
            else:
                prefixes = self._prefixes(looped, int(parts[2]), by_token=by_token)
                links.append(rename(tuple(".".join([prefix, *parts[3:]]) for prefix in prefixes), name))
        unread = [
            Unread(name, "an auxiliary router (sampling: aux_router), which their code asks only in training")
            for name in published
            if ".mlp_router." in name
        ]
        return TensorMap(links, [*unread, *rotary_tables(looped, published)])

    def _prefixes(self, looped: LoopedConfig, layer: int, *, by_token: bool) -> list[str]:
        """What stored layer `layer` is called, in each loop."""
        edge, loops = looped.num_prelude_layers, looped.num_loops
        if layer < edge:
            return [f"model.layers.{layer}"]
        if not looped.is_core_layer(layer):
            return [f"model.layers.{edge + (1 if by_token else loops)}"]
        if by_token:
            return [f"{token_wrapper(looped)}.block_list.{loop}.{layer - edge}" for loop in range(loops)]
        return [f"model.layers.{edge + loop}.block.{layer - edge}" for loop in range(loops)]

    def _expert_choice(self, config: SourceConfig, loops: int) -> dict[str, Any]:
        capacity = config.take("mor_capacity", [])
        if len(capacity) != loops:
            config.problem(
                "the shares of tokens that the loops choose are not in the tensors: say them with --set "
                f"mor_capacity=[...], one share for each of {loops} loops"
            )
        return {
            "type": "expert_choice",
            "capacity": capacity or [1.0],
            "alpha": float(config.take("mor_alpha", 0.1)),
            "score": config.supported("mor_router_func", "sigmoid", "tanh", "none", default="sigmoid"),
        }

    def _token_choice(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        balances = any(name.endswith(".router_bias") for name in shapes)
        return {
            "type": "token_choice",
            "alpha": float(config.take("mor_alpha", 1.0)),
            "score": config.supported("mor_router_func", "softmax", "sigmoid", default="softmax"),
            "balancing_bias": "loss_free" if balances else "none",
        }


def router_link(looped: LoopedConfig, name: str, *, by_token: bool) -> Link:
    """The link of a router's weight: one of all loops, or one per loop that scores a token once."""
    ending = HIDDEN if name.endswith("first_weight") else LINEAR if looped.halting["router_width"] is None else SCORES
    if by_token:
        steps = (Stack(),) if ending == HIDDEN else ()
        return Link(((f"{token_wrapper(looped)}{ending}",),), (name,), steps)
    edge, loops = looped.num_prelude_layers, looped.num_loops
    width = looped.halting["router_width"] or looped.hidden_size
    sources = tuple((f"model.layers.{edge + loop}{ending}",) for loop in range(loops))
    steps = (Stack(),) if ending == HIDDEN else (Stack(), Reshape((loops, 1, width), (loops, width)))
    return Link(sources, (name,), steps)


def token_wrapper(looped: LoopedConfig) -> str:
    """What the wrapper of all loops of a token-choice model is called; without other layers it is not in a list."""
    return f"model.layers.{looped.num_prelude_layers}" if looped.num_prelude_layers else "model.layers"


__all__ = ["MixtureOfRecursions"]
