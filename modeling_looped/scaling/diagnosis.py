"""What a fit cannot be trusted in: coefficients that the runs do not determine, bounds, starts that disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from .law import Law
from .search import Optimum, Problem

#: A variable that changes no log loss by more than this, moved over its whole range, is not determined.
NO_EFFECT = 1e-5
#: Singular values below this share of the largest are directions that the runs say nothing about.
NO_DIRECTION = 1e-6
#: Share of the range of a variable within which it counts as being on its bound.
ON_BOUND = 2e-3


def undetermined(problem: Problem, optimum: Optimum) -> list[str]:
    """Names of the coefficients along which the law may move, at the optimum, without changing any run's loss."""
    names = problem.free_names
    lower, upper = problem.bounds()
    effects = problem.jacobian(optimum.vector) * problem.delta * (upper - lower)
    sizes = np.sqrt((effects**2).mean(axis=0))
    without_effect = sizes < NO_EFFECT
    found = {name for name, without in zip(names, without_effect, strict=True) if without}
    rest = np.flatnonzero(~without_effect)
    if len(rest):
        _, values, directions = np.linalg.svd(effects[:, rest] / sizes[rest], full_matrices=False)
        for direction in directions[values < NO_DIRECTION * values[0]]:
            found |= {names[place] for place, part in zip(rest, direction, strict=True) if abs(part) > 0.1}
    return [name for name in names if name in found]


def on_bounds(problem: Problem, optimum: Optimum) -> dict[str, str]:
    """Coefficients that sit on a bound of their search, with `lower` or `upper`."""
    lower, upper = problem.bounds()
    share = (optimum.vector - lower) / (upper - lower)
    sides = {}
    for name, place in zip(problem.free_names, share, strict=True):
        if place < ON_BOUND or place > 1 - ON_BOUND:
            sides[name] = "lower" if place < 0.5 else "upper"
    return sides


def loose(problem: Problem, intervals: Mapping[str, tuple[float, float]]) -> list[str]:
    """Coefficients whose interval spans half of the search, or two orders of magnitude where it is logarithmic."""
    found = []
    amplitudes = {one.name for one in problem.law.amplitudes}
    ranges = {one.name: one for one in problem.law.exponents}
    for name, (low, high) in intervals.items():
        if name in amplitudes or ranges[name].logarithmic:
            wide = high > 100.0 * low
        else:
            wide = high - low > 0.5 * (ranges[name].upper - ranges[name].lower)
        if wide:
            found.append(name)
    return found


def statements(
    problem: Problem,
    optimum: Optimum,
    *,
    missing: list[str],
    sides: Mapping[str, str],
    agreement: float,
    polished: int,
) -> list[str]:
    """Warnings in sentences."""
    said = [
        f"all fitted runs have {name}={problem.runs[name][0]:g}: what depends on it cannot be told from the rest."
        for name in problem.law.columns
        if np.ptp(problem.runs[name]) == 0
    ]
    if missing:
        said.append(
            f"not determined by these runs: {', '.join(missing)}. Their values are one choice of many that fit as "
            "well; they have no intervals, and predictions are good only where the runs vary."
        )
    for name, side in sides.items():
        value = optimum.coefficients[name]
        if name in {one.name for one in problem.law.amplitudes} and side == "lower":
            said.append(f"{name}={value:.3g} sits on its lower bound: the fit has no use for that term.")
        else:
            said.append(f"{name}={value:.6g} sits on the {side} bound of its search.")
    if agreement < 0.5:
        said.append(
            f"starts disagree: {agreement:.0%} of {polished} refined starts reached the best fit; raise restarts, or "
            "hold a coefficient."
        )
    return said


class Constraint(NamedTuple):
    """Which constraint a fit holds.

    Attributes:
        sweep: what the runs are to hold fixed.
        this_table: whether these do, a line per column.
        violated: whether one of them is known not to be held.
        by_construction: what every fit of the law obeys.
    """

    sweep: str
    this_table: list[str]
    violated: bool
    by_construction: list[str]


def constraint(law: Law, table: pd.DataFrame) -> Constraint:
    """Which constraint a fit holds: what the sweep is to hold fixed, and whether this table does.

    Raises:
        ValueError: where the law is of one curve, and the table has several.
    """
    checks, violated = [], False
    for name in law.held_columns:
        if name not in table:
            checks.append(f"{name}: not in the table, cannot be checked")
            continue
        values = np.unique(table[name].to_numpy())
        if len(values) == 1:
            checks.append(f"{name}: held, {values[0]:g} in all {len(table)} runs")
            continue
        violated = True
        checks.append(f"{name}: NOT held, {len(values)} values from {values[0]:g} to {values[-1]:g}")
        if law.one_curve:
            raise ValueError(
                f"law={law.name!r} is of one trained model, and the table has {len(values)} values of {name}: choose "
                f"one with where='{name} == {values[0]:g}', or fit law='unified'."
            )
    return Constraint(law.sweep, checks, violated, list(law.by_construction))


__all__ = ["Constraint", "constraint", "loose", "on_bounds", "statements", "undetermined"]
