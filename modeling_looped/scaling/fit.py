"""Fitting a law to a table of runs: coefficients with intervals, errors on fitted and held-out runs, predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .diagnosis import Constraint, constraint, loose, on_bounds, statements, undetermined
from .law import Law, did_you_mean, law_named
from .search import Objective, Optimum, Problem, best_of
from .table import LOSS, block_of, checked, completed, select


class Errors(NamedTuple):
    """How far a law is off, on some runs.

    Attributes:
        runs: how many.
        rmse: root of the mean squared error, in nats.
        mean_percent, worst_percent: absolute errors in percent of the loss.
        huber: mean Huber loss of the difference of log losses.
        r2: share of the losses' variance that is explained; `None` for one run.
    """

    runs: int
    rmse: float
    mean_percent: float
    worst_percent: float
    huber: float
    r2: float | None


class Prediction(NamedTuple):
    """A predicted loss.

    Attributes:
        values: the columns that it is for.
        loss: in nats.
        interval: of the law's loss, from the bootstrap; not of a new run, which has its own noise.
        outside: for columns outside of the fitted range, by which factor.
    """

    values: dict[str, float]
    loss: float
    interval: tuple[float, float] | None
    outside: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: the law.
        coefficients: name -> value, in the units of the table.
        held: coefficients that were not fitted.
        intervals: name -> percentile interval of the bootstrap, of those that are fitted and determined.
        resamples: coefficients of each resample.
        confidence: of the intervals.
        fitted, held_out: errors.
        constraint: what the fit holds: see `diagnosis.Constraint`.
        warnings: what not to trust.
        agreement: share of the refined starts that reached the best fit.
        ranges: column -> smallest and largest value among the fitted runs.
        table: the runs, with columns `predicted` and `is_held_out`.
        settings: everything else that the fit depends on.
    """

    law: Law
    coefficients: dict[str, float]
    held: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    resamples: list[dict[str, float]]
    confidence: float
    fitted: Errors
    held_out: Errors | None
    constraint: Constraint
    warnings: list[str]
    agreement: float
    ranges: dict[str, tuple[float, float]]
    table: pd.DataFrame
    settings: dict[str, Any]

    def predict(self, values: Mapping[str, float], *, max_extrapolation: float = 10.0) -> Prediction:
        """The loss that the law says for a run.

        Args:
            values: columns that the law needs, or that these follow from.
            max_extrapolation: factor beyond the fitted range of any column at which a prediction is refused.

        Raises:
            ValueError: for a missing column, one that the law does not know, a value that is not positive, or too far
                an extrapolation.
        """
        row = completed(pd.DataFrame([dict(values)]))
        known = set(self.law.columns) | set(completed(self.table).columns)
        for name in values:
            if name not in known:
                raise ValueError(f"predict: {name!r} is no column of the fit.{did_you_mean(name, known)}")
        given = checked(row.assign(**{LOSS: 1.0}), self.law)
        outside = {}
        for name in self.law.columns:
            value = float(given[name].iloc[0])
            low, high = self.ranges[name]
            factor = max(times(value, high), times(low, value))
            if factor > max_extrapolation:
                raise ValueError(
                    f"predict: {name}={value:g} is {factor:.3g} times outside of the fitted range {low:g}..{high:g}, "
                    f"and max_extrapolation is {max_extrapolation:g}."
                )
            if factor > 1:
                outside[name] = factor
        runs = columns_of(given, self.law)
        losses = [float(self.law.loss(one, runs)[0]) for one in self.resamples]
        interval = percentiles(losses, self.confidence) if losses else None
        return Prediction(dict(values), float(self.law.loss(self.coefficients, runs)[0]), interval, outside)


def fit_law(
    law: str,
    table: pd.DataFrame,
    *,
    hold_out: str | None = None,
    where: str | None = None,
    hold: Mapping[str, float] | None = None,
    free: Iterable[str] = (),
    blocks: Sequence[str] | None = None,
    objective: Objective = "huber",
    delta: float = 1e-3,
    restarts: int = 512,
    polished: int = 16,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Fit a law.

    Args:
        law: its name.
        table: one row per run, or per run and loop count; columns as in `table`.
        hold_out: expression over the columns; its rows are not fitted, and their error is reported.
        where: expression over the columns; other rows are left out altogether.
        hold: coefficients to keep at a value instead of fitting them; 0 takes a term out.
        free: coefficients to fit that the law holds by itself.
        blocks: columns whose equal values make a block of the bootstrap; `None`: the law's own, () each row.
        objective: `huber`, or `squares` for comparison.
        delta: of Huber's loss, as a difference of log losses.
        restarts: random starts.
        polished: how many of the best starts are refined.
        resamples: of the bootstrap; 0 for no intervals. Each is refined from the full fit.
        confidence: of the intervals.
        seed: of starts and resamples; the same seed gives the same fit.

    Raises:
        ValueError: for an unknown law or coefficient, columns or values that it cannot be fitted to, too few runs, a
            hold-out that leaves nothing.
    """
    chosen = law_named(law)
    check_settings(delta, restarts, polished, resamples, confidence)
    held = held_values(chosen, hold or {}, free)
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
    stated = constraint(chosen, table)
    train, losses = rows_of(table, ~out), np.asarray(table[LOSS], dtype=float)
    problem = Problem(chosen, columns_of(train, chosen), losses[~out], held, objective, delta)
    count = len(problem.free_names)
    if len(train) <= count:
        raise ValueError(
            f"law={law!r} has {count} coefficients to fit ({', '.join(problem.free_names)}), and {len(train)} runs "
            f"are too few: {count + 1} is the least. Hold some coefficients, or add runs."
        )
    generator = np.random.default_rng(seed)
    starts = problem.starts(restarts, polished, generator)
    best, agreement = best_of([problem.refine(start) for start in starts])
    missing = undetermined(problem, best)
    sides = on_bounds(problem, best)
    blocks = [name for name in chosen.blocks if name in train] if blocks is None else blocks
    drawn = bootstrap(problem, best, block_of(train, blocks), resamples, generator)
    intervals = {
        name: percentiles([one[name] for one in drawn], confidence)
        for name in problem.free_names
        if drawn and name not in missing
    }
    said = statements(problem, best, missing=missing, sides=sides, agreement=agreement, polished=len(starts))
    for name in loose(problem, intervals):
        said.append(f"{name} is loosely determined: {confidence:.0%} interval {shown_interval(intervals[name])}.")
    predicted = chosen.loss(best.coefficients, columns_of(table, chosen))
    errors = errors_of(predicted[~out], losses[~out], delta)
    typical = float(np.median(np.abs(predicted[~out] - losses[~out])))
    said += chosen.warnings(problem.runs, problem.losses, typical)
    if stated.violated:
        said.append(f"the sweep's constraint is not held by this table: {'; '.join(stated.this_table)}.")
    return Fit(
        law=chosen,
        coefficients=best.coefficients,
        held=held,
        intervals=intervals,
        resamples=drawn,
        confidence=confidence,
        fitted=errors,
        held_out=errors_of(predicted[out], losses[out], delta) if out.any() else None,
        constraint=stated,
        warnings=said,
        agreement=agreement,
        ranges={name: (float(column.min()), float(column.max())) for name, column in problem.runs.items()},
        table=table.assign(predicted=predicted, is_held_out=out),
        settings={
            "hold_out": hold_out,
            "where": where,
            "blocks": list(blocks),
            "objective": objective,
            "delta": delta,
            "restarts": restarts,
            "polished": len(starts),
            "resamples": resamples,
            "seed": seed,
        },
    )


def bootstrap(
    problem: Problem, best: Optimum, blocks: np.ndarray, resamples: int, generator: np.random.Generator
) -> list[dict[str, float]]:
    """Coefficients of fits to blocks drawn with replacement, as many as there are.

    A resample with fewer distinct runs than coefficients determines none, and is drawn again.
    """
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    count = len(problem.free_names)
    found: list[dict[str, float]] = []
    for _ in range(resamples):
        while True:
            rows = np.concatenate([members[draw] for draw in generator.integers(len(members), size=len(members))])
            if len(np.unique(rows)) > count or len(members) == 1:
                break
        drawn = problem.take(rows)
        found.append(drawn.refine(drawn.vector(best.coefficients)).coefficients)
    return found


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


def check_settings(delta: float, restarts: int, polished: int, resamples: int, confidence: float) -> None:
    """Raise ValueError for settings that make no sense."""
    if not 0 < delta < np.inf:
        raise ValueError(f"delta={delta!r} must be above 0.")
    if restarts < 1 or polished < 1 or resamples < 0:
        raise ValueError(
            f"restarts={restarts}, polished={polished} must be at least 1, and resamples={resamples} at least 0."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1.")


def errors_of(predicted: np.ndarray, losses: np.ndarray, delta: float) -> Errors:
    """Errors of predictions [n] of losses [n]."""
    difference = predicted - losses
    percent = 100.0 * np.abs(difference) / losses
    logs = np.abs(np.log(predicted) - np.log(losses))
    huber = np.where(logs <= delta, 0.5 * logs**2, delta * (logs - 0.5 * delta))
    variance = ((losses - losses.mean()) ** 2).sum()
    return Errors(
        runs=len(losses),
        rmse=float(np.sqrt((difference**2).mean())),
        mean_percent=float(percent.mean()),
        worst_percent=float(percent.max()),
        huber=float(huber.mean()),
        r2=float(1.0 - (difference**2).sum() / variance) if variance > 0 else None,
    )


def columns_of(table: pd.DataFrame, law: Law) -> dict[str, np.ndarray]:
    """The columns that a law reads, as arrays."""
    return {name: np.asarray(table[name], dtype=float) for name in law.columns}


def rows_of(table: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    """The rows where `chosen` [n] is true, numbered anew."""
    return table.iloc[np.flatnonzero(chosen)].reset_index(drop=True)


def times(larger: float, smaller: float) -> float:
    """How many times the one is the other; nothing is any number of times zero, but zero."""
    if smaller == 0:
        return 1.0 if larger == 0 else np.inf
    return larger / smaller


def percentiles(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The interval that leaves as much out on either side."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def shown_interval(interval: tuple[float, float]) -> str:
    """An interval in four digits."""
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]"


__all__ = ["Errors", "Fit", "Prediction", "fit_law", "shown_interval"]
