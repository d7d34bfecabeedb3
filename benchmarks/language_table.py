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
    """The rate with the lowest loss of each contestant, mean over seeds; the lower one of two that are even."""
    losses: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        losses.setdefault((row["name"], row["learning_rate"]), []).append(row["loss"])
    best: dict[str, float] = {}
    for name, rate in sorted(losses, key=lambda run: (statistics.fmean(losses[run]), run[1])):
        best.setdefault(name, rate)
    return best


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


def share_of_means(rows: Iterable[Row]) -> float | None:
    """Share of the gap between mean losses, over the seeds that all three contestants have.

    Where seeds differ by as much as the gap is wide, this says more than the mean of the shares: a seed whose gap
    happens to be narrow has a large share.
    """
    rows = list(rows)
    seeds = shares(rows)
    if not seeds:
        return None
    means = {
        name: statistics.fmean(row["loss"] for row in rows if row["name"] == name and row["seed"] in seeds)
        for name in (EQUAL, LOOPED, TWICE)
    }
    return share_of_gap(means)


def percent(share: float | None) -> str:
    """A share of the gap for a table."""
    return "-" if share is None else f"{share:.0%}"


def table(groups: dict[str, list[Row]]) -> str:
    """A Markdown table of what each group of runs has in common (`same tokens`, `same FLOPs`), means over seeds.

    The share of the gap is that of the means, with that of each seed behind it.
    """
    lines = []
    for title, rows in groups.items():
        runs = sorted({(NAMES.index(row["name"]), row["learning_rate"]) for row in rows})
        of_means, of_seeds = share_of_means(rows), shares(rows)
        for name, rate in ((NAMES[index], rate) for index, rate in runs):
            own = [row for row in rows if (row["name"], row["learning_rate"]) == (name, rate)]
            losses = [row["loss"] for row in own]
            first = own[0]
            share = ""
            if name == LOOPED and of_seeds:
                share = percent(of_means)
                if len(of_seeds) > 1:
                    share += f" ({', '.join(percent(of_seed) for of_seed in of_seeds.values())})"
            lines.append(
                (
                    title,
                    name,
                    f"{first['parameters'] / 1e6:.2f}",
                    f"{first['tokens'] / 1e6:.2f}",
                    f"{first['flops'] / 1e12:.1f}",
                    f"{rate:g}",
                    len(own),
                    f"{statistics.fmean(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]",
                    share,
                )
            )
    header = ["runs with", "model", "parameters, M", "tokens, M", "TFLOPs", "rate", "seeds", "loss", "share of gap"]
    return markdown_table(header, lines)
