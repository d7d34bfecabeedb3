"""The loss that a fitted law says for a run, and how far outside of what was fitted that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from .law import Law, Runs, did_you_mean
from .table import LOSS, checked, columns_of, completed


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


class AskedRun(NamedTuple):
    """A run to predict.

    Attributes:
        runs: the law's columns [1].
        outside: for columns outside of the fitted range, by which factor.
    """

    runs: Runs
    outside: dict[str, float]


def asked_run(
    law: Law,
    values: Mapping[str, float],
    *,
    known: Iterable[str],
    ranges: Mapping[str, tuple[float, float]],
    max_extrapolation: float,
) -> AskedRun:
    """The run that `values` describe, if it may be predicted.

    Args:
        law: the law.
        values: columns that it needs, or that these follow from.
        known: columns of the table that was fitted.
        ranges: column -> smallest and largest fitted value.
        max_extrapolation: factor beyond a range at which a prediction is refused.

    Raises:
        ValueError: for a missing or unknown column, a value that is not positive, or too far an extrapolation.
    """
    if not max_extrapolation >= 1:
        raise ValueError(f"max_extrapolation={max_extrapolation!r} must be at least 1.")
    known = {*known, *law.columns}
    for name in values:
        if name not in known:
            raise ValueError(f"predict: {name!r} is no column of the fit.{did_you_mean(name, known)}")
    try:
        row = checked(completed(pd.DataFrame([dict(values)])).assign(**{LOSS: 1.0}), law)
    except ValueError as error:
        raise ValueError(f"predict: {error}") from error
    runs = columns_of(row, law)
    outside = {}
    for name in law.columns:
        value = float(runs[name][0])
        low, high = ranges[name]
        factor = max(times(value, high), times(low, value))
        if factor > max_extrapolation:
            raise ValueError(
                f"predict: {name}={value:g} is {factor:.3g} times outside of the fitted range {low:g}..{high:g}, "
                f"and max_extrapolation is {max_extrapolation:g}."
            )
        if factor > 1:
            outside[name] = factor
    return AskedRun(runs, outside)


def times(larger: float, smaller: float) -> float:
    """How many times the one is the other; nothing is any number of times zero, but zero."""
    if smaller == 0:
        return 1.0 if larger == 0 else np.inf
    return larger / smaller


__all__ = ["Prediction", "asked_run"]
