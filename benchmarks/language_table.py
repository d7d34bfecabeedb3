"""The table of benchmarks/language.py: which rate is best for whom, and what share of the gap looping closes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from modeling_looped.reporting.costs import markdown_table

#: Contestants, in the order of the table; the gap is between the equal one and the one of twice the parameters.
NAMES = EQUAL, LOOPED, TWICE, ONCE, DRAWN = "equal", "looped", "twice", "once", "looped_drawn"

Row = dict[str, Any]


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    """The rate with the lowest loss of each contestant; the lower one of two that are even."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["loss"], row["learning_rate"])):
        best.setdefault(row["name"], row)
    return {name: row["learning_rate"] for name, row in best.items()}


def share_of_gap(losses: dict[str, float]) -> float | None:
    """(L_equal - L_looped) / (L_equal - L_twice); `None` where twice the parameters bring nothing."""
    gap = losses[EQUAL] - losses[TWICE]
    return (losses[EQUAL] - losses[LOOPED]) / gap if gap > 0 else None


def shares(rows: Iterable[Row]) -> dict[int, float | None]:
    """Share of the gap by seed, for seeds that all three contestants have."""
    losses: dict[int, dict[str, float]] = {}
    for row in rows:
        losses.setdefault(row["seed"], {})[row["name"]] = row["loss"]
    return {seed: share_of_gap(found) for seed, found in losses.items() if {EQUAL, LOOPED, TWICE} <= set(found)}


def table(groups: dict[str, list[Row]]) -> str:
    """A Markdown table of what each group of runs has in common (`same tokens`, `same FLOPs`), means over seeds."""
    lines = []
    for title, rows in groups.items():
        names = [name for name in NAMES if any(row["name"] == name for row in rows)]
        of_seeds = [share for share in shares(rows).values() if share is not None]
        for name in names:
            own = [row for row in rows if row["name"] == name]
            losses = [row["loss"] for row in own]
            first = own[0]
            share = ""
            if name == LOOPED and of_seeds:
                share = f"{statistics.fmean(of_seeds):.0%}"
                if len(of_seeds) > 1:
                    share += f" [{min(of_seeds):.0%}, {max(of_seeds):.0%}]"
            lines.append(
                (
                    title,
                    name,
                    f"{first['parameters'] / 1e6:.2f}",
                    f"{first['tokens'] / 1e6:.2f}",
                    f"{first['flops'] / 1e12:.1f}",
                    f"{first['learning_rate']:g}",
                    len(own),
                    f"{statistics.fmean(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]",
                    share,
                )
            )
    header = ["runs with", "model", "parameters, M", "tokens, M", "TFLOPs", "rate", "seeds", "loss", "share of gap"]
    return markdown_table(header, lines)
