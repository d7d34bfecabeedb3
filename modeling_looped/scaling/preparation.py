"""What is settled before a search begins: which rows are fitted, which are held out, which coefficients are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from .diagnosis import Constraint, constraint
from .law import Law, did_you_mean, law_named
from .search import Objective, Problem
from .table import LOSS, checked, columns_of, completed, select


class Prepared(NamedTuple):
    """A problem, and the table that it comes from.

    Attributes:
        problem: the law on the rows to fit.
        table: all rows, completed.
        held_out: which of them are not fitted [n].
        constraint: which constraint a fit of this table holds.
    """

    problem: Problem
    table: pd.DataFrame
    held_out: np.ndarray
    constraint: Constraint

    @property
    def fitted_table(self) -> pd.DataFrame:
        """The rows to fit."""
        return rows_of(self.table, ~self.held_out)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Column -> smallest and largest value among the rows to fit."""
        return {name: (float(values.min()), float(values.max())) for name, values in self.problem.runs.items()}


def prepare(
    law: str,
    table: pd.DataFrame,
    *,
    hold_out: str | None,
    where: str | None,
    hold: Mapping[str, float],
    free: Iterable[str],
    objective: Objective,
    delta: float,
) -> Prepared:
    """Check everything that can be checked without a search; arguments and errors are those of `fit_law`."""
    chosen = law_named(law)
    held = held_values(chosen, hold, free)
    table = completed(table)
    if where is not None:
        table = rows_of(table, select(table, where, "where"))
        if table.empty:
            raise ValueError(f"where={where!r} leaves no rows.")
    table = checked(table, chosen)
    out = np.zeros(len(table), dtype=bool) if hold_out is None else select(table, hold_out, "hold_out")
    if hold_out is not None and out.all():
        raise ValueError(f"hold_out={hold_out!r} holds out all {len(table)} runs and leaves nothing to fit.")
    if hold_out is not None and not out.any():
        raise ValueError(f"hold_out={hold_out!r} holds out none of {len(table)} runs.")
    train = rows_of(table, ~out)
    losses = np.asarray(train[LOSS], dtype=float)
    problem = Problem(chosen, columns_of(train, chosen), losses, held, objective, delta)
    count = len(problem.free_names)
    if len(train) <= count:
        raise ValueError(
            f"law={law!r} has {count} coefficients to fit ({', '.join(problem.free_names)}), and {len(train)} runs "
            f"are too few: {count + 1} is the least. Hold some coefficients, or add runs."
        )
    return Prepared(problem, table, out, constraint(chosen, table))


def held_values(law: Law, hold: Mapping[str, float], free: Iterable[str]) -> dict[str, float]:
    """Coefficient -> the value that it keeps.

    Raises:
        ValueError: for a name that the law lacks, a value outside of its bounds, or nothing left to fit.
    """
    free = set(free)
    for name in (*hold, *free):
        if name not in law.names:
            raise ValueError(
                f"law={law.name!r} has no coefficient {name!r}; it has: {', '.join(law.names)}."
                f"{did_you_mean(name, law.names)}"
            )
    for name in hold:
        if name in free:
            raise ValueError(f"{name!r} is both held and freed.")
    held = {one.name: one.held for one in law.exponents if one.held is not None and one.name not in free}
    ranges = {one.name: (one.lower, one.upper) for one in law.exponents}
    for name, value in hold.items():
        low, high = ranges.get(name, (0.0, np.inf))
        if not low <= value <= high or not np.isfinite(value):
            raise ValueError(f"hold: {name}={value!r} must lie in {low:g}..{high:g}.")
        held[name] = float(value)
    if len(held) == len(law.names):
        raise ValueError(f"all coefficients of law={law.name!r} are held: nothing is left to fit.")
    return held


def rows_of(table: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    """The rows where `chosen` [n] is true, numbered anew."""
    return table.iloc[np.flatnonzero(chosen)].reset_index(drop=True)


__all__ = ["Prepared", "prepare"]
