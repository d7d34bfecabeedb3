"""Pictures of a report, as PNG files. Needs matplotlib (`pip install modeling-looped[report]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .distances import BoundaryDistance, LayerError
from .run_log import RunLog


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty picture. It belongs to nobody's pyplot, and needs no display."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def loss_picture(path: Path, run: RunLog) -> None:
    """Losses of a run against tokens (or steps)."""
    figure, axes = new_axes("Loss in training", run.axis, "nats per token")
    for name, curve in run.curves.items():
        axes.plot(curve.x, curve.y, label=name, marker="." if name != "training" or len(curve.x) < 2 else None)
    axes.legend()
    figure.savefig(path, dpi=120)


def loops_picture(path: Path, losses: Mapping[str, Mapping[int, float]], teacher: Mapping[str, float]) -> None:
    """Losses against the loop count, one line per text, the teacher's dashed."""
    figure, axes = new_axes("Loss by loop count", "num_loops", "nats per token")
    for name, by_loops in losses.items():
        (line,) = axes.plot(list(by_loops), list(by_loops.values()), marker="o", label=name)
        if name in teacher:
            axes.axhline(teacher[name], color=line.get_color(), linestyle="--", label=f"teacher, {name}")
    axes.set_xticks(sorted({loops for by_loops in losses.values() for loops in by_loops}))
    axes.legend()
    figure.savefig(path, dpi=120)


def distances_picture(path: Path, rows: Sequence[BoundaryDistance]) -> None:
    """Distance to the teacher at each loop boundary: relative L2, and 1 - cosine."""
    figure, axes = new_axes("Distance to the teacher at loop boundaries", "", "distance")
    places = range(len(rows))
    axes.plot(places, [row.relative_l2 for row in rows], marker="o", label="relative L2")
    axes.plot(places, [1.0 - row.cosine for row in rows], marker="s", label="1 - cosine")
    labels = ["start" if row.layer is None else f"loop {row.loop + 1}\nlayer {row.layer}" for row in rows]
    axes.set_xticks(list(places), labels)
    axes.legend()
    figure.savefig(path, dpi=120)


def errors_picture(path: Path, rows: Sequence[LayerError]) -> None:
    """What each run of each layer is off by itself, in the order of execution."""
    figure, axes = new_axes("Error of each layer, given the teacher's input", "run, in order", "share of the update")
    for loop in sorted({row.loop for row in rows}):
        chosen = [(place, row.of_update) for place, row in enumerate(rows) if row.loop == loop]
        axes.bar([place for place, _ in chosen], [error for _, error in chosen], label=f"loop {loop + 1}")
    axes.legend()
    figure.savefig(path, dpi=120)


__all__ = ["distances_picture", "errors_picture", "loops_picture", "loss_picture"]
