"""Finding layer plans from a teacher's activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from .calibration import Calibration
from .layer_drops import cheapest_drops
from .layer_plan import LayerPlan, kept_plan, shared_plan


def droppable_block(calibration: Calibration, size: int) -> range:
    """The `size` layers in a row whose input and output point in the most similar direction (Gromov et al.)."""
    distance = calibration.angular_distance
    layers = len(distance) - 1
    if not 1 <= size < layers:
        raise ValueError(f"size={size} must lie in 1..{layers - 1}: the teacher has {layers} layers.")
    start = min(range(layers - size + 1), key=lambda layer: distance[layer, layer + size].item())
    return range(start, start + size)


def least_influential(calibration: Calibration, count: int) -> list[int]:
    """The `count` layers that turn the state least (block influence), in order."""
    layers = len(calibration.block_influence)
    if not 1 <= count < layers:
        raise ValueError(f"count={count} must lie in 1..{layers - 1}: the teacher has {layers} layers.")
    return sorted(calibration.block_influence.argsort(stable=True)[:count].tolist())


def knee(values: Tensor) -> int:
    """Index where a rising curve bends most: the point farthest above the chord between its ends (Kneedle)."""
    if len(values) < 3:
        raise ValueError(f"values={values.tolist()} must be at least 3 points to have a knee.")
    steps = torch.linspace(0.0, 1.0, len(values), dtype=values.dtype)
    span = values[-1] - values[0]
    if span == 0:
        return 0
    return int(((values - values[0]) / span - steps).argmax())


def middle_by_knee(calibration: Calibration) -> range:
    """The middle layers, between the knee of the first layers' distances and that of the last ones' (ETD, 2510.07358).

    From either end the distance between neighbouring states adds up, quickly at first; where it starts to rise slowly
    the layers begin that loop well.
    """
    steps = calibration.angular_distance.diagonal(offset=1)
    half = len(steps) // 2
    if half < 2:
        raise ValueError(f"a teacher of {len(steps)} layers is too short to have a knee in each half: it needs 4.")
    before, after = (F.pad(half_of.cumsum(0), (1, 0)) for half_of in (steps[:half], steps.flip(0)[:half]))
    return range(knee(before), len(steps) - knee(after))


def shared_middle(calibration: Calibration, loops: int, *, order: str = "cycle") -> LayerPlan:
    """Share the middle that `middle_by_knee` finds, shortened at its end to a multiple of `loops`."""
    middle = middle_by_knee(calibration)
    core = len(middle) // loops
    if core == 0:
        raise ValueError(f"loops={loops} must not exceed the {len(middle)} middle layers, {middle[0]}-{middle[-1]}.")
    layers = len(calibration.block_influence)
    return shared_plan(middle[0], core, layers - middle[0] - core * loops, loops, order=order)


def most_similar_groups(calibration: Calibration, stored: int, *, prelude: int, coda: int) -> list[range]:
    """Cut the layers between prelude and coda into `stored` runs that differ least inside (dynamic programming).

    The cost of a run is the square of the angular distance from its first layer's input to its last layer's output;
    squared, since distances along a path nearly add up, and every cut would then cost the same.
    """
    distance = calibration.angular_distance.double()
    start, end = prelude, len(distance) - 1 - coda
    count = end - start
    if not 1 <= stored <= count:
        raise ValueError(f"stored={stored} must lie in 1..{count}, the layers between prelude and coda.")
    best = {(0, start): (0.0, start)}
    for runs in range(1, stored + 1):
        for stop in range(start + runs, end + 1):
            best[runs, stop] = min(
                (best[runs - 1, cut][0] + distance[cut, stop].item() ** 2, cut)
                for cut in range(start + runs - 1, stop)
                if (runs - 1, cut) in best
            )
    cuts = [end]
    for runs in range(stored, 0, -1):
        cuts.append(best[runs, cuts[-1]][1])
    cuts.reverse()
    return [range(first, last) for first, last in itertools.pairwise(cuts)]


def dropped_and_looped(calibration: Calibration, *, dropped: int, looped: int, loops: int) -> LayerPlan:
    """Leave out the most droppable block of `dropped` layers, and loop the `looped` kept layers around the gap."""
    return looped_around(
        droppable_block(calibration, dropped), len(calibration.block_influence), looped=looped, loops=loops
    )


def cheapest_and_looped(
    calibration: Calibration,
    *,
    dropped: int,
    looped: int,
    loops: int,
    report: Callable[[str], object] = lambda line: None,
) -> LayerPlan:
    """Leave out the `dropped` layers that cost least, and loop the `looped` kept layers around the longest gap."""
    if calibration.loss_without is None:
        raise ValueError("calibration.loss_without is None: dropping by the loss needs it; use `calibrate`.")
    layers = len(calibration.block_influence)
    if dropped < layers:  # more is refused by the search, which then has not begun
        check_looped(looped, layers - dropped)
    return looped_around(
        cheapest_drops(calibration.loss_without, layers, dropped, report=report), layers, looped=looped, loops=loops
    )


def looped_around(dropped: Collection[int], layers: int, *, looped: int, loops: int) -> LayerPlan:
    """The plan of a teacher of `layers` layers without `dropped` that loops `looped` layers around the longest gap."""
    kept = [layer for layer in range(layers) if layer not in dropped]
    check_looped(looped, len(kept))
    ends = itertools.pairwise([-1, *kept, layers])
    gap = max(enumerate(ends), key=lambda item: item[1][1] - item[1][0])[0]  # so many kept layers lie before it
    start = min(max(gap - looped // 2, 0), len(kept) - looped)
    return kept_plan(kept, kept[start : start + looped], loops)


def check_looped(looped: int, kept: int) -> None:
    """Raise ValueError unless `looped` of `kept` layers can loop."""
    if not 1 <= looped <= kept:
        raise ValueError(f"looped={looped} must lie in 1..{kept}, the layers that are kept.")


__all__ = [
    "cheapest_and_looped",
    "droppable_block",
    "dropped_and_looped",
    "knee",
    "least_influential",
    "looped_around",
    "middle_by_knee",
    "most_similar_groups",
    "shared_middle",
]
