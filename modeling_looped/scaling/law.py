"""What a scaling law is: a sum of positive terms, named coefficients, and the constraint under which it was measured.

Every law here has the form L = sum_k A_k exp(s_k(theta, run)): amplitudes A_k > 0, of which one is the floor (s = 0),
and the logarithms s_k of the terms' shapes, which depend on the exponents theta. A law names its coefficients and
writes its shapes; everything else (positivity, starts, derivatives, intervals) is the fitter's, and the same for all.
"""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

#: Column -> its values [n], one per run.
Runs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """One fitted number of a law.

    Attributes:
        name: symbol in the equation.
        meaning: what it is, in words.
        lower, upper: bounds of the search.
        logarithmic: whether it is searched by its logarithm, which keeps it positive.
        held: value that it keeps unless it is freed; `None`: it is fitted.
    """

    name: str
    meaning: str
    lower: float
    upper: float
    logarithmic: bool = False
    held: float | None = None


@dataclasses.dataclass(frozen=True)
class Amplitude:
    """Factor of a term; positive, since its logarithm is searched.

    Attributes:
        name: symbol in the equation.
        meaning: what its term is, in words.
    """

    name: str
    meaning: str


class Law(ABC):
    """Abstract law.

    Attributes:
        name: what the command line calls it.
        equation: in plain text, with the symbols of `amplitudes` and `exponents`.
        source: paper and equation.
        columns: of the table of runs that it reads, beside `loss`.
        amplitudes: of its terms, in the order of `log_shapes`; the first is the floor.
        exponents: everything else that is fitted.
        sweep: what the runs must hold fixed for the coefficients to mean what the paper says.
        held_columns: columns that then have one value in all runs; checked where the table has them.
        by_construction: what every fit obeys, whatever the table says.
        blocks: columns that name a training run, where several rows of a table belong to one; they are resampled
            together.
        one_curve: whether rows with different `held_columns` cannot be fitted together at all.
        axis: column that pictures are drawn against.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    amplitudes: ClassVar[tuple[Amplitude, ...]]
    exponents: ClassVar[tuple[Coefficient, ...]]
    sweep: ClassVar[str]
    held_columns: ClassVar[tuple[str, ...]] = ()
    by_construction: ClassVar[tuple[str, ...]]
    blocks: ClassVar[tuple[str, ...]] = ()
    one_curve: ClassVar[bool] = False
    axis: ClassVar[str]

    @abstractmethod
    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        """ln of each term without its amplitude, per run [n]; 0.0 for the floor.

        Only analytic functions may be used (no absolute value, no maximum): derivatives are taken by complex step.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """All coefficients, amplitudes first."""
        return tuple(coefficient.name for coefficient in (*self.amplitudes, *self.exponents))

    def loss(self, coefficients: Mapping[str, float], runs: Runs) -> np.ndarray:
        """The law's loss [n] in nats, for numbers of all coefficients."""
        terms = zip(self.amplitudes, self.log_shapes(coefficients, runs), strict=True)
        rows = len(next(iter(runs.values())))
        return sum((coefficients[one.name] * np.exp(shape) for one, shape in terms), np.zeros(rows))

    def warnings(self, runs: Runs, losses: np.ndarray, typical: float) -> list[str]:
        """What these runs show that the law cannot say; `typical` is the fit's median absolute error in nats."""
        return []


#: Name -> law.
LAWS: dict[str, Law] = {}


def register(law: type[Law]) -> type[Law]:
    """Class decorator: make a law known under its name."""
    LAWS[law.name] = law()
    return law


def law_named(name: str) -> Law:
    """The law of that name.

    Raises:
        ValueError: for an unknown one, with the nearest.
    """
    if name not in LAWS:
        raise ValueError(f"law={name!r} is unknown; known: {', '.join(LAWS)}.{did_you_mean(name, LAWS)}")
    return LAWS[name]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, if one is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


__all__ = ["LAWS", "Amplitude", "Coefficient", "Law", "Runs", "did_you_mean", "law_named", "register"]
