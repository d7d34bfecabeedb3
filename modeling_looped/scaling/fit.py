"""Fitting a law to a table of runs: coefficients with intervals, errors on fitted and held-out runs, predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .diagnosis import Constraint, loose, on_bounds, statements, undetermined
from .law import Law
from .prediction import Prediction, asked_run
from .preparation import prepare
from .search import Objective, Optimum, Problem, best_of
from .table import LOSS, block_of, columns_of


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
        predictions: those that `fit_law` was asked for.
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
    predictions: list[Prediction]

    def predict(self, values: Mapping[str, float], *, max_extrapolation: float = 10.0) -> Prediction:
        """The loss that the law says for a run.

        Args:
            values: columns that the law needs, or that these follow from.
            max_extrapolation: factor beyond the fitted range of any column at which a prediction is refused.

        Raises:
            ValueError: for a missing or unknown column, a value that is not positive, or too far an extrapolation.
        """
        known = self.table.columns
        asked = asked_run(self.law, values, known=known, ranges=self.ranges, max_extrapolation=max_extrapolation)
        losses = [float(self.law.loss(one, asked.runs)[0]) for one in self.resamples]
        interval = percentiles(losses, self.confidence) if losses else None
        return Prediction(
            dict(values), float(self.law.loss(self.coefficients, asked.runs)[0]), interval, asked.outside
        )


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
    predict: Sequence[Mapping[str, float]] = (),
    max_extrapolation: float = 10.0,
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
        predict: runs to predict, checked before the search; more can be asked of the fit.
        max_extrapolation: see `Fit.predict`.

    Raises:
        ValueError: for an unknown law or coefficient, columns or values that it cannot be fitted to, too few runs, a
            hold-out that leaves nothing, a run that cannot be predicted.
    """
    check_settings(delta, restarts, polished, resamples, confidence)
    ready = prepare(
        *(law, table),
        hold_out=hold_out,
        where=where,
        hold=hold or {},
        free=free,
        objective=objective,
        delta=delta,
    )
    problem, table, out, chosen = ready.problem, ready.table, ready.held_out, ready.problem.law
    for values in predict:
        asked_run(chosen, values, known=table.columns, ranges=ready.ranges, max_extrapolation=max_extrapolation)
    blocks = [name for name in chosen.blocks if name in table] if blocks is None else blocks
    members = block_of(ready.fitted_table, blocks)
    generator = np.random.default_rng(seed)
    starts = problem.starts(restarts, polished, generator)
    best, agreement = best_of([problem.refine(start) for start in starts])
    missing = undetermined(problem, best)
    sides = on_bounds(problem, best)
    distinct = len(np.unique(members))
    # one block drawn again and again would give intervals of no width
    drawn = bootstrap(problem, best, members, resamples if distinct > 1 else 0, generator)
    intervals = {
        name: percentiles([one[name] for one in drawn], confidence)
        for name in problem.free_names
        if drawn and name not in missing
    }
    said = statements(problem, best, missing=missing, sides=sides, agreement=agreement, polished=len(starts))
    if resamples and distinct < 2 * len(problem.free_names):
        said.append(
            f"the fitted runs make {distinct} blocks for {len(problem.free_names)} coefficients: "
            + ("intervals rest on few." if distinct > 1 else "there are no intervals.")
        )
    for name in loose(problem, intervals):
        said.append(f"{name} is loosely determined: {confidence:.0%} interval {shown_interval(intervals[name])}.")
    predicted, losses = chosen.loss(best.coefficients, columns_of(table, chosen)), np.asarray(table[LOSS], dtype=float)
    errors = errors_of(predicted[~out], losses[~out], delta)
    typical = float(np.median(np.abs(predicted[~out] - losses[~out])))
    said += chosen.warnings(problem.runs, problem.losses, typical)
    if ready.constraint.violated:
        said.append(f"the sweep's constraint is not held by this table: {'; '.join(ready.constraint.this_table)}.")
    fit = Fit(
        law=chosen,
        coefficients=best.coefficients,
        held=dict(problem.held),
        intervals=intervals,
        resamples=drawn,
        confidence=confidence,
        fitted=errors,
        held_out=errors_of(predicted[out], losses[out], delta) if out.any() else None,
        constraint=ready.constraint,
        warnings=said,
        agreement=agreement,
        ranges=ready.ranges,
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
        predictions=[],
    )
    said_of = [fit.predict(values, max_extrapolation=max_extrapolation) for values in predict]
    return dataclasses.replace(fit, predictions=said_of)


def bootstrap(
    problem: Problem, best: Optimum, blocks: np.ndarray, resamples: int, generator: np.random.Generator
) -> list[dict[str, float]]:
    """Coefficients of fits to blocks drawn with replacement, as many as there are.

    A resample with fewer distinct runs than coefficients does not determine them, and is drawn again.
    """
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    count = len(problem.free_names)
    found: list[dict[str, float]] = []
    for _ in range(resamples):
        while True:
            rows = np.concatenate([members[draw] for draw in generator.integers(len(members), size=len(members))])
            if len(np.unique(rows)) >= count:
                break
        drawn = problem.take(rows)
        found.append(drawn.refine(drawn.vector(best.coefficients)).coefficients)
    return found


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


def percentiles(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The interval that leaves as much out on either side."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def shown_interval(interval: tuple[float, float]) -> str:
    """An interval in four digits."""
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]"


__all__ = ["Errors", "Fit", "Prediction", "fit_law", "shown_interval"]
