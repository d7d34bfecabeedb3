"""Slots: the address of every attention invocation.

A slot is one execution of one layer in one forward pass, and owns one key-value cache layer. Slots count in the order
of
execution: prelude `0 .. P-1`, core `P + t*R + i` for layer i of loop t, coda `P + T*R + j`. This file is the only
place that knows the arithmetic; model, cache, converters and tests ask it.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Where everything runs, for one loop count.

    Stored layers are numbered as they stand in `model.layers`: prelude, core, coda.

    Attributes:
        prelude, core, coda: numbers of stored layers P, R, C.
        loops: T, at least 1.
    """

    prelude: int
    core: int
    coda: int
    loops: int

    @property
    def stored_layers(self) -> int:
        """P + R + C: layers that have weights."""
        return self.prelude + self.core + self.coda

    @property
    def num_slots(self) -> int:
        """N = P + R*T + C: the effective depth."""
        return self.prelude + self.core * self.loops + self.coda

    def stored_ranges(self) -> tuple[range, range, range]:
        """The stored layers of prelude, core and coda."""
        coda = self.prelude + self.core
        return range(self.prelude), range(self.prelude, coda), range(coda, self.stored_layers)

    def loops_within(self, num_slots: int) -> int:
        """Loops that start within the first `num_slots` slots: all, unless early exit cuts the forward short."""
        return min(self.loops, max(0, -((self.prelude - num_slots) // self.core))) if self.core else 0

    def slot(self, layer: int, loop: int = 0) -> int:
        """Slot of stored layer `layer` in loop `loop` (0 for prelude and coda).

        Raises:
            IndexError: if there is no such layer or loop.
        """
        if not 0 <= layer < self.stored_layers:
            raise IndexError(f"layer={layer} must lie in 0..{self.stored_layers - 1}.")
        in_core = self.prelude <= layer < self.prelude + self.core
        if not 0 <= loop < (self.loops if in_core else 1):
            where = f"0..{self.loops - 1}" if in_core else "0: the layer runs once"
            raise IndexError(f"loop={loop} of layer {layer} must lie in {where}.")
        if layer < self.prelude:
            return layer
        if in_core:
            return layer + loop * self.core
        return layer + (self.loops - 1) * self.core

    def layer_and_loop(self, slot: int) -> tuple[int, int]:
        """The stored layer and the loop of a slot: the inverse of `slot`.

        Raises:
            IndexError: if there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot={slot} must lie in 0..{self.num_slots - 1}.")
        if slot < self.prelude:
            return slot, 0
        if slot < self.prelude + self.core * self.loops:
            loop, layer = divmod(slot - self.prelude, self.core)
            return self.prelude + layer, loop
        return slot - (self.loops - 1) * self.core, 0

    def expand(self, per_layer: list[Item]) -> list[Item]:
        """One value per slot from one value per stored layer."""
        return [per_layer[self.layer_and_loop(slot)[0]] for slot in range(self.num_slots)]


def checked_num_loops(num_loops: Any) -> int:
    """A loop count as an `int`; numpy's integers and one-element integer tensors count as integers too.

    Raises:
        ValueError: for anything that is not an integer of at least 1.
    """
    try:
        loops = 0 if isinstance(num_loops, bool) else operator.index(num_loops)
    except TypeError:
        loops = 0
    if loops < 1:
        raise ValueError(f"num_loops={num_loops!r} must be an integer of at least 1.")
    return loops
