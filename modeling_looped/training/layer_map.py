"""Layer maps: which hidden state of the teacher stands at which place of the student.

A teacher of L layers has L + 1 boundaries: boundary b lies before its layer b, and boundary L after its last layer. A
layer map of a student with N invocations (layer, loop), in the order of execution, gives the boundary before each of
them and the one after the last, N + 1 numbers that never fall.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from modeling_looped.conversion.layer_plan import LayerPlan
from modeling_looped.conversion.output_folder import MANIFEST
from modeling_looped.slots import SlotLayout


def layer_map(plan: LayerPlan, num_layers: int) -> list[int]:
    """The layer map of a compressed model.

    Where each invocation stands for a layer of its own and none is missing, it is 0, 1, ..., L. Otherwise prelude and
    coda stand for their own layers, and the invocations of the core share out what lies between them in equal parts:
    layers that were dropped become the work of the loops around the gap.

    Args:
        plan: which layers the model was made of.
        num_layers: L.

    Returns:
        N + 1 boundaries.
    """
    first = plan.prelude[-1] + 1 if plan.prelude else 0
    last = plan.coda[0] if plan.coda else num_layers
    steps = len(plan.executed) - len(plan.prelude) - len(plan.coda)
    core = [first + (2 * step * (last - first) + steps) // (2 * steps) for step in range(steps + 1)]  # rounded
    after_coda = [*plan.coda[1:], num_layers] if plan.coda else []
    return [*plan.prelude, *core, *after_coda]


def map_of_folder(folder: Path, num_layers: int) -> list[int] | None:
    """The layer map that the manifest of a conversion implies; `None` without one that says which layers it took."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    plan = json.loads(path.read_text(encoding="utf-8")).get("plan")
    if plan is None:
        return None
    return layer_map(LayerPlan.from_manifest(plan), num_layers)


def default_map(layout: SlotLayout, num_layers: int) -> list[int]:
    """The layer map of a student about whose origin nothing is known.

    Raises:
        ValueError: unless it executes as many layers as the teacher has, or stores as many (a retrofit).
    """
    if layout.num_invocations == num_layers:
        return list(range(num_layers + 1))
    if layout.stored_layers == num_layers:
        # a retrofit: every loop starts and ends where the first one does
        return [boundary for boundary in range(num_layers + 1) for _ in range(repeats(layout, boundary))]
    raise ValueError(
        f"layer_map is needed: the student executes {layout.num_invocations} layers and the teacher has {num_layers}, "
        f"so that nothing says which belongs to which. Give {layout.num_invocations + 1} boundaries from 0 to "
        f"{num_layers}, or a student folder with the manifest of its conversion."
    )


def repeats(layout: SlotLayout, boundary: int) -> int:
    """How often a boundary of a retrofit's teacher stands in its layer map: once, and after the core in every loop."""
    after_core = layout.prelude + layout.core
    return 1 + (layout.num_invocations - layout.stored_layers if boundary == after_core else 0)


def check_map(boundaries: Sequence[int], layout: SlotLayout, num_layers: int) -> None:
    """Raise ValueError unless `boundaries` is a layer map of a student with `layout`."""
    wanted = layout.num_invocations + 1
    if len(boundaries) != wanted:
        raise ValueError(
            f"layer_map has {len(boundaries)} boundaries and must have {wanted}: one more than layers run."
        )
    falls = any(later < earlier for earlier, later in itertools.pairwise(boundaries))
    if falls or boundaries[0] != 0 or boundaries[-1] != num_layers:
        raise ValueError(f"layer_map={list(boundaries)} must rise from 0 to {num_layers}, the teacher's layers.")


__all__ = ["check_map", "default_map", "layer_map", "map_of_folder"]
