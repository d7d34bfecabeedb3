"""The search for the coefficients of a law: many starts, each refined by a robust trust-region least squares.

Following Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3) and the papers of the laws, the objective is the Huber
loss of the difference of log losses, with delta = 1e-3. Three things make it quick and reliable:

- an amplitude is searched by the logarithm of its term's mean over the runs, not of its value at N = D = 1, 20 orders
  of magnitude away, where it is all but a function of its exponent;
- exponents are drawn at random, and the amplitudes that go with each draw are solved for (a non-negative least
  squares, since a law is linear in them); the best of these starts are refined;
- residuals are divided by delta: an objective of 1e-6 would meet any optimiser's tolerance where it starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from .law import Coefficient, Law, Runs

Objective = Literal["huber", "squares"]

#: A term's mean over the runs lies between these shares of the mean loss.
SMALLEST_SHARE, LARGEST_SHARE = 1e-6, 10.0
#: Any step works: a complex step subtracts nothing.
STEP = 1e-30


class Optimum(NamedTuple):
    """Where a search ended.

    Attributes:
        vector: search variables [p].
        cost: sum over runs of the objective, in units of delta^2.
        coefficients: of the law, all of them, held ones too.
    """

    vector: np.ndarray
    cost: float
    coefficients: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law, the runs to fit it to, and what is held.

    Attributes:
        law: the law.
        runs: its columns [n].
        losses: in nats [n].
        held: coefficient -> the value that it keeps.
        objective: `huber`, or `squares` for comparison.
        delta: where Huber's loss turns from squares to absolute values, as a difference of log losses.
    """

    law: Law
    runs: Runs
    losses: np.ndarray
    held: Mapping[str, float]
    objective: Objective = "huber"
    delta: float = 1e-3

    def take(self, rows: np.ndarray) -> Problem:
        """The same problem on these rows, which may repeat."""
        return dataclasses.replace(
            self, runs={name: column[rows] for name, column in self.runs.items()}, losses=self.losses[rows]
        )

    @property
    def free_amplitudes(self) -> list[int]:
        """Places of the amplitudes that are fitted."""
        return [place for place, one in enumerate(self.law.amplitudes) if one.name not in self.held]

    @property
    def free_exponents(self) -> list[Coefficient]:
        """Exponents that are fitted."""
        return [one for one in self.law.exponents if one.name not in self.held]

    @property
    def free_names(self) -> list[str]:
        """Names of the search variables, in the order of the vector."""
        amplitudes = [self.law.amplitudes[place].name for place in self.free_amplitudes]
        return amplitudes + [one.name for one in self.free_exponents]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the search variables [p]."""
        mean = np.log(self.losses.mean())
        lower = [mean + np.log(SMALLEST_SHARE)] * len(self.free_amplitudes)
        upper = [mean + np.log(LARGEST_SHARE)] * len(self.free_amplitudes)
        for one in self.free_exponents:
            lower.append(np.log(one.lower) if one.logarithmic else one.lower)
            upper.append(np.log(one.upper) if one.logarithmic else one.upper)
        return np.array(lower), np.array(upper)

    def exponents(self, searched: np.ndarray) -> dict[str, float | complex]:
        """Values of all exponents for their search variables."""
        values: dict[str, float | complex] = {
            one.name: self.held[one.name] for one in self.law.exponents if one.name in self.held
        }
        for one, variable in zip(self.free_exponents, searched, strict=True):
            values[one.name] = np.exp(variable) if one.logarithmic else variable
        return values

    def shapes(self, searched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln of the terms [k, n] for an amplitude of 1, and ln of their means over the runs [k]."""
        logs = np.stack(
            [shape + np.zeros(len(self.losses)) for shape in self.law.log_shapes(self.exponents(searched), self.runs)]
        )
        largest = np.real(logs).max(axis=1, keepdims=True)
        return logs, np.log(np.exp(logs - largest).mean(axis=1)) + largest[:, 0]

    def log_terms(self, vector: np.ndarray) -> np.ndarray:
        """ln of the terms [k, n]; complex where the vector is."""
        free = self.free_amplitudes
        logs, means = self.shapes(vector[len(free) :])
        factors = np.zeros(len(self.law.amplitudes), dtype=vector.dtype)
        for place, one in enumerate(self.law.amplitudes):
            if one.name in self.held:
                # a term that is held at zero is left out of the law
                factors[place] = np.log(self.held[one.name]) if self.held[one.name] > 0 else -np.inf
        factors[free] = vector[: len(free)] - means[free]
        return factors[:, None] + logs

    def residuals(self, vector: np.ndarray) -> np.ndarray:
        """(ln of the law - ln of the loss) / delta [n]."""
        terms = self.log_terms(vector)
        largest = np.real(terms).max(axis=0)
        logs = largest + np.log(np.exp(terms - largest).sum(axis=0))
        return (logs - np.log(self.losses)) / self.delta

    def jacobian(self, vector: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals [n, p]: of amplitudes the terms' shares, of exponents by complex step."""
        terms = self.log_terms(vector)
        largest = terms.max(axis=0)
        shares = np.exp(terms - largest)
        shares /= shares.sum(axis=0)
        columns = [shares[place] / self.delta for place in self.free_amplitudes]
        for place in range(len(self.free_amplitudes), len(vector)):
            moved = vector.astype(complex)
            moved[place] += 1j * STEP
            columns.append(np.imag(self.residuals(moved)) / STEP)
        return np.stack(columns, axis=1)

    def coefficients(self, vector: np.ndarray) -> dict[str, float]:
        """The law's coefficients for a vector, in the units of the table."""
        free = self.free_amplitudes
        searched = vector[len(free) :]
        _, means = self.shapes(searched)
        values = dict(self.held)
        for place, variable in zip(free, vector, strict=False):
            values[self.law.amplitudes[place].name] = float(np.exp(variable - means[place]))
        values |= {name: float(np.real(value)) for name, value in self.exponents(searched).items()}
        return {name: values[name] for name in self.law.names}

    def vector(self, coefficients: Mapping[str, float]) -> np.ndarray:
        """The search variables for coefficients, inside the bounds."""
        searched = np.array(
            [
                np.log(coefficients[one.name]) if one.logarithmic else coefficients[one.name]
                for one in self.free_exponents
            ]
        )
        _, means = self.shapes(searched)
        tiny = np.finfo(float).tiny
        amplitudes = [
            np.log(max(coefficients[self.law.amplitudes[place].name], tiny)) + means[place]
            for place in self.free_amplitudes
        ]
        return self.inside(np.concatenate([amplitudes, searched]))

    def inside(self, vector: np.ndarray) -> np.ndarray:
        """The vector moved inside of the bounds, a little away from them: the search starts in the interior."""
        lower, upper = self.bounds()
        margin = 1e-3 * (upper - lower)
        return np.clip(vector, lower + margin, upper - margin)

    def start(self, searched: np.ndarray) -> tuple[float, np.ndarray]:
        """For exponents, the amplitudes that suit them best: squared relative error, and the vector."""
        free = self.free_amplitudes
        logs, means = self.shapes(searched)
        relative = np.exp(logs - logs.max(axis=1, keepdims=True)) / self.losses
        target = np.ones(len(self.losses))
        for place, one in enumerate(self.law.amplitudes):
            if one.name in self.held:
                target = target - self.held[one.name] * np.exp(logs[place]) / self.losses
        if not free:
            return float(target @ target), searched
        amplitudes, error = nnls(relative[free].T, target)
        tiny = np.finfo(float).tiny
        scaled = np.log(np.maximum(amplitudes, tiny)) - logs[free].max(axis=1) + means[free]
        return float(error**2), self.inside(np.concatenate([scaled, searched]))

    def starts(self, count: int, keep: int, generator: np.random.Generator) -> list[np.ndarray]:
        """The `keep` best of `count` random starts, best first."""
        lower, upper = self.bounds()
        first = len(self.free_amplitudes)
        drawn = generator.uniform(lower[first:], upper[first:], (count, len(lower) - first))
        ranked = sorted((self.start(row) for row in drawn), key=lambda pair: pair[0])
        return [vector for _, vector in ranked[:keep]]

    def refine(self, vector: np.ndarray, evaluations: int = 500) -> Optimum:
        """The local optimum from a start."""
        found = least_squares(
            self.residuals,
            vector,
            jac=self.jacobian,  # pyright: ignore[reportArgumentType] -- the stub wants one of scipy's names for it
            bounds=self.bounds(),
            loss="huber" if self.objective == "huber" else "linear",
            x_scale="jac",
            ftol=1e-10,
            xtol=1e-10,
            gtol=1e-10,
            max_nfev=evaluations,
        )
        return Optimum(found.x, float(found.cost), self.coefficients(found.x))


def best_of(optima: Sequence[Optimum]) -> tuple[Optimum, float]:
    """The lowest of several optima, and the share of them that agrees with it in cost."""
    best = min(optima, key=lambda optimum: optimum.cost)
    near = [optimum for optimum in optima if optimum.cost <= best.cost * 1.001 + 1e-6]
    return best, len(near) / len(optima)


__all__ = ["Objective", "Optimum", "Problem", "best_of"]
