"""Laws of the loss of trained models at other loop counts than they were trained with.

T loops at test time (`loops`), mu loops in training (`trained_loops`, their mean where depth is sampled), D tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from .law import Amplitude, Coefficient, Law, Runs, register
from .training_laws import ALPHA, BETA, DATA, FLOOR, SIZE

DECAY = Amplitude("Z", "what the loops take off the loss in all")


def rises_past_its_minimum(runs: Runs, losses: np.ndarray, typical: float) -> list[str]:
    """A warning where more loops make the loss worse by more than the fit is off, which no decay can follow."""
    best, last = np.argmin(losses), np.argmax(runs["loops"])
    rise = losses[last] - losses[best]
    if runs["loops"][last] > runs["loops"][best] and rise > max(3.0 * typical, 1e-3 * losses[best]):
        return [
            (
                f"the loss rises by {rise:.4f} nats from loops={runs['loops'][best]:g} to "
                f"loops={runs['loops'][last]:g}: the law holds loops beyond the trained count at the plateau and "
                "cannot follow; fit the loops before the rise."
            )
        ]
    return []


@register
@final
class SaturatingExponentialLaw(Law):
    """Parcae's test-time law of one model: the loss approaches a plateau exponentially."""

    name = "test_time_exponential"
    equation = "L(T) = L_inf + Z exp(-z T)"
    source = "Prairie et al. 2026, arXiv 2604.12946, section 5.3 and appendix L, form (a)"
    columns = ("loops",)
    amplitudes = (Amplitude("L_inf", "loss at any number of loops"), DECAY)
    exponents = (Coefficient("z", "rate of the approach, per loop", 1e-3, 1e2, logarithmic=True),)
    sweep = "one trained model: weights, data and trained loops are held, only the loops at test time change"
    held_columns = ("parameters", "tokens", "trained_loops")
    by_construction = (
        "the loss never falls below a plateau L_inf >= 0",
        "the loss never rises with loops: loops beyond the trained count are held at the plateau",
    )
    one_curve = True
    axis = "loops"

    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        return 0.0, -exponents["z"] * runs["loops"]

    def warnings(self, runs: Runs, losses: np.ndarray, typical: float) -> list[str]:
        return rises_past_its_minimum(runs, losses, typical)


@register
@final
class UnifiedLaw(Law):
    """Parcae's unified law: the training law is the plateau that loops at test time approach."""

    name = "unified"
    equation = "L = E + A N_unrolled^-alpha + B D^-beta + Z exp(-z T / mu^gamma)"
    source = (
        "Prairie et al. 2026, arXiv 2604.12946, equation 8 and appendix L (A, alpha, B, beta: their X, x, Y, y); "
        "gamma is held at 1, as they choose, unless it is freed (they found 1.19 and 1.17)"
    )
    columns = ("unrolled_parameters", "tokens", "loops", "trained_loops")
    amplitudes = (FLOOR, SIZE, DATA, DECAY)
    exponents = (
        ALPHA,
        BETA,
        Coefficient("z", "rate of the approach, per trained depth", 1e-2, 1e2, logarithmic=True),
        Coefficient("gamma", "how the approach slows with trained loops", 0.0, 3.0, held=1.0),
    )
    sweep = (
        "stored parameters are held, as in the training law; each trained model is measured at several loop counts, "
        "which are held at its own plateau beyond the trained count"
    )
    held_columns = ("parameters",)
    by_construction = (
        "the loss never falls below a floor E >= 0, nor below the training law at the trained loop count",
        "the loss never rises with unrolled parameters, tokens or test-time loops",
        "loops beyond the trained count are held at the plateau: they take off no more than Z exp(-z) at gamma = 1",
    )
    blocks = ("unrolled_parameters", "tokens", "trained_loops")
    axis = "loops"

    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        share = runs["loops"] * np.exp(-exponents["gamma"] * np.log(runs["trained_loops"]))
        return (
            0.0,
            -exponents["alpha"] * np.log(runs["unrolled_parameters"]),
            -exponents["beta"] * np.log(runs["tokens"]),
            -exponents["z"] * share,
        )


__all__ = ["SaturatingExponentialLaw", "UnifiedLaw"]
