"""State maps: how the weights of one model become those of another, as data.

A map is total. Every source key is moved or dropped for a stated reason, every target key is filled or new for a
stated reason, and shapes are compared before any tensor moves; what is left over raises and is named. The way back is
derived from the same rules.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel


class Rename(NamedTuple):
    """`source` becomes `target`. Names in braces stand for one part of a key: `layers.{layer}.mlp.up_proj.weight`."""

    source: str
    target: str


class Drop(NamedTuple):
    """`source` has no counterpart, `because` of what."""

    source: str
    because: str


class New(NamedTuple):
    """`target` has no counterpart, `because` of what.

    `fill` makes its value from its shape; `None` leaves it to the target model (its tied weights, its initialisation).
    """

    target: str
    because: str
    fill: Callable[[torch.Size], Tensor] | None = None


class StateMap:
    """A total map between two state dicts.

    Args:
        rules: tried in order; the first whose pattern fits a key decides about it. A rule may fit no key at all.

    Example:

    ```python
    >>> norms = StateMap(Rename("layers.{layer}.ln.weight", "blocks.{layer}.norm.weight"))
    >>> norms.apply({"layers.0.ln.weight": torch.ones(4)}, {"blocks.0.norm.weight": torch.Size([4])})
    {'blocks.0.norm.weight': tensor([1., 1., 1., 1.])}
    ```
    """

    def __init__(self, *rules: Rename | Drop | New):
        self.rules = rules

    def inverse(self) -> StateMap:
        """The map back: renames turn round, what was dropped is new, and what was new is dropped."""
        turned: list[Rename | Drop | New] = []
        for rule in self.rules:
            if isinstance(rule, Rename):
                turned.append(Rename(rule.target, rule.source))
            elif isinstance(rule, Drop):
                turned.append(New(rule.source, rule.because))
            else:
                turned.append(Drop(rule.target, rule.because))
        return StateMap(*turned)

    def apply(self, state: Mapping[str, Tensor], target_shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The target's state dict, in memory of its own.

        Args:
            state: the source's tensors by key.
            target_shapes: shape of every tensor that the target holds, by key.

        Returns:
            a tensor for every key of `target_shapes` but those whose rule leaves them to the target model.

        Raises:
            ValueError: for keys without a rule, for targets that nothing fills, for shapes that differ and for tensors
                that are not floating-point numbers (packed, quantised); names them.
        """
        moves = self.plan({key: tensor.shape for key, tensor in state.items()}, target_shapes)
        packed = [key for key in moves.values() if isinstance(key, str) and not state[key].is_floating_point()]
        if packed:
            raise ValueError(f"these weights are not floating-point numbers (quantised?): {listed(packed)}.")
        filled = {}
        for target, origin in moves.items():
            if isinstance(origin, str):
                filled[target] = state[origin].detach().clone()
            elif origin.fill is not None:
                filled[target] = origin.fill(target_shapes[target])
        return filled

    def plan(
        self, source_shapes: Mapping[str, torch.Size], target_shapes: Mapping[str, torch.Size]
    ) -> dict[str, str | New]:
        """Where each target key comes from: a source key, or the rule that makes it new. Raises as `apply` does."""
        problems: dict[str, list[str]] = {
            "no rule says where these go": [],
            "two sources for one target": [],
            "the target has no place for": [],
            "shapes differ": [],
            "nothing fills": [],
        }
        ruleless, doubled, homeless, misshapen, unfilled = problems.values()
        origins: dict[str, str | New] = {}
        for key, shape in source_shapes.items():
            target = self._target_of(key)
            if target is None:
                ruleless.append(key)
            elif target in origins:
                doubled.append(f"{origins[target]} and {key} for {target}")
            elif target and target not in target_shapes:
                homeless.append(key)
            elif target:
                origins[target] = key
                if target_shapes[target] != shape:
                    misshapen.append(f"{key} {tuple(shape)} for {target} {tuple(target_shapes[target])}")
        for target in target_shapes:
            if target in origins:
                continue
            rule = next((r for r in self.rules if isinstance(r, New) and _pattern(r.target).fullmatch(target)), None)
            if rule is None:
                unfilled.append(target)
            else:
                origins[target] = rule
        found = [f"{problem}: {listed(cases)}" for problem, cases in problems.items() if cases]
        if found:
            raise ValueError(f"the weights do not fit: {'; '.join(found)}.")
        return origins

    def _target_of(self, key: str) -> str | None:
        """The key that `key` becomes; `""`: it is dropped; `None`: no rule knows it."""
        for rule in self.rules:
            if isinstance(rule, New):
                continue
            match = _pattern(rule.source).fullmatch(key)
            if match is not None:
                return rule.target.format(**match.groupdict()) if isinstance(rule, Rename) else ""
        return None


Model = TypeVar("Model", bound=PreTrainedModel)


def convert(source: PreTrainedModel, state: Mapping[str, Tensor], state_map: StateMap, skeleton: Model) -> Model:
    """A model like `skeleton` with the source's weights, dtype, device, mode and generation defaults.

    Args:
        source: the model that `state` is taken from.
        state: its tensors by key.
        state_map: from the keys of `state` to those of the skeleton.
        skeleton: the target on the meta device, without weights.
    """
    shapes = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
    return filled(source, state_map.apply(state, shapes), skeleton)


def filled(source: PreTrainedModel, state: Mapping[str, Tensor], skeleton: Model) -> Model:
    """A model like `skeleton` (on the meta device) with the weights `state` and everything else as `source` has it."""
    target = type(skeleton).from_pretrained(
        None,
        config=skeleton.config,
        state_dict=dict(state),
        dtype=source.dtype,
        attn_implementation=source.config._attn_implementation,
    )
    target.generation_config = copy.deepcopy(source.generation_config)
    target.to(source.device)  # pyright: ignore[reportArgumentType] (Transformers' decorator loses the bound `self`)
    return target.train(source.training)


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    """The regular expression of a key with names in braces, each of which fits one part between dots."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^.]+)", re.escape(key)))


def listed(cases: list[str], *, limit: int = 20) -> str:
    """The cases in order, for a message; of more than `limit`, the first and how many there are."""
    shown = ", ".join(sorted(cases)[:limit])
    return shown if len(cases) <= limit else f"{shown} and {len(cases) - limit} more"


__all__ = ["Drop", "New", "Rename", "StateMap", "convert", "filled", "listed"]
