"""Slots: the address of every attention invocation.

A slot owns one key-value cache layer. As a rule it is one execution of one layer in one forward pass, and slots count
in the order of execution: prelude `0 .. P-1`, core `P + t*R + i` for layer i of loop t, coda `P + T*R + j`. Where the
core loops in groups of G layers, each group runs all its loops before the next one starts; where loops are nested, the
first half of the core runs several times in each loop before the second half runs once. Where loops share the keys and
values of the first one, a slot belongs to a stored layer, whichever loop it runs in. This file is the only place that
knows the arithmetic; model, cache, converters and tests ask it.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


class Turn(NamedTuple):
    """Consecutive layers of the core that run once.

    Attributes:
        layers: stored layers.
        loop: how often they have run before.
        state: number of the state that they write (see schedule.py).
        outer_loop: loop of the core that this belongs to.
        ends_loop: whether it is the last turn of that loop.
    """

    layers: range
    loop: int
    state: int
    outer_loop: int
    ends_loop: bool


class Invocation(NamedTuple):
    """One execution of a layer: stored layer `layer` in loop `loop` (0 in prelude and coda)."""

    layer: int
    loop: int


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Where everything runs, for one loop count.

    Stored layers are numbered as they stand in `model.layers`: prelude, core, coda.

    Attributes:
        prelude, core, coda: numbers of stored layers P, R, C.
        loops: T, at least 1.
        group_size: G, layers of the core that loop together, a divisor of R; `None`: all R.
        shares_key_values: whether all loops read the keys and values of the first.
        inner_loops: runs of the first half of the core in each loop; `None`: loops are not nested.
    """

    prelude: int
    core: int
    coda: int
    loops: int
    group_size: int | None = None
    shares_key_values: bool = False
    inner_loops: int | None = None

    @property
    def stored_layers(self) -> int:
        """P + R + C: layers that have weights."""
        return self.prelude + self.core + self.coda

    @property
    def num_invocations(self) -> int:
        """N: layers that run in one forward, the effective depth; P + R*T + C, unless loops are nested."""
        return self.prelude + self._per_loop * self.loops + self.coda

    @property
    def num_slots(self) -> int:
        """Key-value slots: one per invocation, or one per stored layer where loops share."""
        return self.stored_layers if self.shares_key_values else self.num_invocations

    def stored_ranges(self) -> tuple[range, range, range]:
        """The stored layers of prelude, core and coda."""
        coda = self.prelude + self.core
        return range(self.prelude), range(self.prelude, coda), range(coda, self.stored_layers)

    def turns(self, num_slots: int | None = None) -> list[Turn]:
        """The turns of the core in order: all, or those that start within the first `num_slots` slots (early exit)."""
        _, core, _ = self.stored_ranges()
        if self.inner_loops is not None:
            fast, slow = core[: self.core // 2], core[self.core // 2 :]
            turns = []
            for loop in range(self.loops):
                first = loop * self.inner_loops
                turns += [Turn(fast, first + inner, 1, loop, False) for inner in range(self.inner_loops)]
                turns.append(Turn(slow, loop, 0, loop, True))
        else:
            groups = (core[start : start + self._group] for start in range(0, self.core, self._group or 1))
            turns = [Turn(group, loop, 0, loop, True) for group in groups for loop in range(self.loops)]
        if num_slots is None or num_slots >= self.num_slots:
            return turns
        return [turn for turn in turns if self.slot(turn.layers[0], turn.loop) < num_slots]

    def loops_of(self, layer: int) -> int:
        """How often stored layer `layer` runs."""
        within = layer - self.prelude
        if not 0 <= within < self.core:
            return 1
        if self.inner_loops is not None and within < self.core // 2:
            return self.loops * self.inner_loops
        return self.loops

    def group_of(self, layer: int) -> int:
        """Which of the core's groups, from 0, stored layer `layer` of the core belongs to."""
        return (layer - self.prelude) // self._group

    def slot(self, layer: int, loop: int = 0) -> int:
        """Slot of stored layer `layer` in loop `loop` (0 for prelude and coda).

        Raises:
            IndexError: if there is no such layer or loop.
        """
        if not 0 <= layer < self.stored_layers:
            raise IndexError(f"layer={layer} must lie in 0..{self.stored_layers - 1}.")
        within = layer - self.prelude
        in_core = 0 <= within < self.core
        loops = self.loops_of(layer) if in_core else 1
        if not 0 <= loop < loops:
            raise IndexError(
                f"loop={loop} of layer {layer} must lie in "
                + (f"0..{loops - 1}." if in_core else "0: the layer runs once.")
            )
        if self.shares_key_values or within < 0:
            return layer
        if not in_core:
            return layer + self.num_invocations - self.stored_layers
        if self.inner_loops is not None:
            half = self.core // 2
            if within < half:
                outer, inner = divmod(loop, self.inner_loops)
                return self.prelude + outer * self._per_loop + inner * half + within
            return self.prelude + loop * self._per_loop + (self.inner_loops - 1) * half + within
        group, within = divmod(within, self._group)
        return self.prelude + (group * self.loops + loop) * self._group + within

    def layer_and_loop(self, slot: int) -> Invocation:
        """The stored layer and the loop that fill a slot: the inverse of `slot` (of its first loop, if loops share).

        Raises:
            IndexError: if there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot={slot} must lie in 0..{self.num_slots - 1}.")
        return Invocation(slot, 0) if self.shares_key_values else self.invocation(slot)

    def invocation(self, index: int) -> Invocation:
        """The layer and the loop of the invocation that is number `index` in the order of execution."""
        if index < self.prelude:
            return Invocation(index, 0)
        within = index - self.prelude
        if within >= self._per_loop * self.loops:
            return Invocation(index - self.num_invocations + self.stored_layers, 0)
        if self.inner_loops is not None:
            half = self.core // 2
            outer, within = divmod(within, self._per_loop)
            turn, layer = divmod(within, half)
            if turn < self.inner_loops:
                return Invocation(self.prelude + layer, outer * self.inner_loops + turn)
            return Invocation(self.prelude + half + layer, outer)
        turn, within = divmod(within, self._group)
        group, loop = divmod(turn, self.loops)
        return Invocation(self.prelude + group * self._group + within, loop)

    def expand(self, per_layer: list[Item]) -> list[Item]:
        """One value per slot from one value per stored layer."""
        return [per_layer[self.layer_and_loop(slot).layer] for slot in range(self.num_slots)]

    @property
    def _per_loop(self) -> int:
        """Layers that run in one loop of the core."""
        return self.core if self.inner_loops is None else self.core // 2 * (self.inner_loops + 1)

    @property
    def _group(self) -> int:
        return self.core if self.group_size is None else self.group_size


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
