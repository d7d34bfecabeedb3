"""Layer plans: which teacher layers a compressed model stores, and what each loop of a shared layer stands for.

P, R, C stored layers of prelude, core and coda; T loops.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Order in which R shared layers stand for R * T teacher layers in a row -> the groups of layers that loop together.
ORDERS = ("cycle", "sequence")

RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Where every stored layer comes from; teacher layers count from 0.

    Attributes:
        prelude, coda: the teacher layer that each of their layers is.
        core: for each layer of the core, the teacher layer that it stands for in each loop.
        order: `cycle`: the core loops as a whole (abc abc); `sequence`: each layer by itself (aa bb cc).
    """

    prelude: tuple[int, ...]
    core: tuple[tuple[int, ...], ...]
    coda: tuple[int, ...]
    order: str = "cycle"

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} must be one of: {', '.join(ORDERS)}.")
        if not self.core:
            raise ValueError("core=() must hold at least one layer: without a core nothing loops.")
        lengths = {len(group) for group in self.core}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"core={self.core} must name one teacher layer per loop, equally many for every layer.")

    @classmethod
    def from_manifest(cls, values: Mapping[str, Any]) -> LayerPlan:
        """The plan that a manifest holds under `plan`."""
        core = tuple(tuple(group) for group in values["core"])
        return cls(tuple(values["prelude"]), core, tuple(values["coda"]), values["order"])

    @property
    def num_loops(self) -> int:
        """T."""
        return len(self.core[0])

    @property
    def num_stored_layers(self) -> int:
        """P + R + C."""
        return len(self.prelude) + len(self.core) + len(self.coda)

    @property
    def executed(self) -> tuple[int, ...]:
        """The teacher layer of every slot, in the order of execution."""
        if self.order == "sequence":
            core = [layer for group in self.core for layer in group]
        else:
            core = [group[loop] for loop in range(self.num_loops) for group in self.core]
        return (*self.prelude, *core, *self.coda)

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the plan names a layer that a teacher of `num_layers` layers does not have."""
        outside = sorted({layer for layer in self.executed if not 0 <= layer < num_layers})
        if outside:
            raise ValueError(f"layers {outside} are not in the teacher, which has 0-{num_layers - 1}.")

    def dropped(self, num_layers: int) -> list[int]:
        """Teacher layers that nothing stands for."""
        return sorted(set(range(num_layers)) - set(self.executed))

    def rows(self) -> list[str]:
        """The plan as lines of text."""
        lines = [f"prelude: {written(self.prelude)}"]
        lines += [f"core {index}: {' | '.join(map(str, group))}" for index, group in enumerate(self.core)]
        return [*lines, f"coda: {written(self.coda)}"]


def shared_plan(prelude: int, core: int, coda: int, loops: int, *, order: str = "cycle") -> LayerPlan:
    """`core` shared layers stand for `core * loops` teacher layers in a row, between a prelude and a coda.

    Args:
        prelude, coda: first and last teacher layers, kept as they are.
        core: R, layers that are stored.
        loops: T.
        order: `cycle` (layer i stands for i, i + R, i + 2R, ...) or `sequence` (for iT, iT + 1, ...).
    """
    if min(prelude, coda) < 0 or min(core, loops) < 1:
        raise ValueError(
            f"prelude={prelude} and coda={coda} must not be negative, core={core} and loops={loops} at least 1."
        )
    if order == "sequence":
        groups = [range(prelude + i * loops, prelude + (i + 1) * loops) for i in range(core)]
    else:
        groups = [range(prelude + i, prelude + core * loops, core) for i in range(core)]
    end = prelude + core * loops
    return LayerPlan(tuple(range(prelude)), tuple(map(tuple, groups)), tuple(range(end, end + coda)), order)


def fitting_plan(num_layers: int, prelude: int, core: int, coda: int, loops: int, *, order: str) -> LayerPlan:
    """`shared_plan` over all of a teacher's layers.

    Raises:
        ValueError: unless prelude + core * loops + coda are the teacher's layers; names the nearest choices that are.
    """
    plan = shared_plan(prelude, core, coda, loops, order=order)
    if prelude + core * loops + coda == num_layers:
        return plan
    wanted = (prelude, core, coda)
    choices = [
        (p, r, num_layers - p - r * loops) for p in range(num_layers) for r in range(1, (num_layers - p) // loops + 1)
    ]
    choices.sort(key=lambda choice: sum(abs(ours - theirs) for ours, theirs in zip(choice, wanted, strict=True)))
    nearest = ", ".join("/".join(map(str, choice)) for choice in choices[:3]) or "none"
    raise ValueError(
        f"prelude={prelude} + core={core} * loops={loops} + coda={coda} = {prelude + core * loops + coda} must be the "
        f"teacher's {num_layers} layers; nearest with {loops} loops: {nearest}. To leave layers out, name those kept."
    )


def kept_plan(kept: Sequence[int], looped: Sequence[int], loops: int) -> LayerPlan:
    """A model of the layers `kept`, of which those in `looped`, consecutive among them, run `loops` times.

    Every loop of a layer stands for the same teacher layer: a start for layers that were dropped elsewhere.
    """
    kept, looped = list(kept), list(looped)
    if not looped or not set(looped) <= set(kept):
        raise ValueError(f"looped={looped} must be some of the layers kept, {written(kept)}.")
    start = kept.index(looped[0])
    if kept[start : start + len(looped)] != looped:
        raise ValueError(f"looped={looped} must follow one another among the layers kept, {written(kept)}.")
    core = tuple((layer,) * loops for layer in looped)
    return LayerPlan(tuple(kept[:start]), core, tuple(kept[start + len(looped) :]))


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers from text: `0-4,25-29` or `0,2,4`; empty text is no layer."""
    layers: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers={text!r}: {part!r} must be a number or an ascending range such as 3-7.")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(layers)


def written(layers: Sequence[int]) -> str:
    """Layers as text, runs of them as ranges: the inverse of `parse_layers`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


__all__ = ["LayerPlan", "fitting_plan", "kept_plan", "parse_layers", "shared_plan", "written"]
