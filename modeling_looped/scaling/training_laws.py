"""Laws of the loss that training reaches: by parameters, tokens and the loop count that was trained.

N parameters, D tokens, r loops, L loss in nats. They differ in what one loop more is worth, and in what is held fixed
while the loops change: two laws that disagree about looping may both be right, each under its own constraint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from .law import Amplitude, Coefficient, Law, Runs, register

FLOOR = Amplitude("E", "loss that no amount of parameters and tokens goes below")
SIZE = Amplitude("A", "factor of the term of the parameters")
DATA = Amplitude("B", "factor of the term of the tokens")
#: The box of Schwethelm et al., appendix F.
ALPHA = Coefficient("alpha", "exponent of the parameters", 0.0, 2.5)
BETA = Coefficient("beta", "exponent of the tokens", 0.0, 2.5)


@register
@final
class TrainingLaw(Law):
    """Parcae's training law: a loop is worth as much as layers of its own."""

    name = "training"
    equation = "L = E + A N_unrolled^-alpha + B D^-beta"
    source = "Prairie et al. 2026, arXiv 2604.12946, equation 7 (alpha, beta: their a, b)"
    columns = ("unrolled_parameters", "tokens")
    amplitudes = (FLOOR, SIZE, DATA)
    exponents = (ALPHA, BETA)
    sweep = (
        "stored parameters are held: loops multiply depth, FLOPs per token and cache, and share a budget of FLOPs "
        "with the tokens"
    )
    held_columns = ("parameters",)
    by_construction = (
        "the loss never falls below a floor E >= 0",
        "the loss never rises with unrolled parameters, nor with tokens",
        "losses are those at the loop count that was trained (N_unrolled counts trained_loops)",
    )
    axis = "tokens"

    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        return (
            0.0,
            -exponents["alpha"] * np.log(runs["unrolled_parameters"]),
            -exponents["beta"] * np.log(runs["tokens"]),
        )


@register
@final
class IsoDepthLaw(Law):
    """Schwethelm's joint law: r loops of a block are worth r^phi blocks."""

    name = "iso_depth"
    equation = "L = E + A (N_once + r^phi N_recurrent)^-alpha + B D^-beta"
    source = "Schwethelm et al. 2026, arXiv 2604.21106, equation 3; bounds: appendix F"
    columns = ("once_parameters", "recurrent_parameters", "loops", "tokens")
    amplitudes = (FLOOR, SIZE, DATA)
    exponents = (
        ALPHA,
        BETA,
        Coefficient("phi", "what a loop is worth: 0 nothing, 1 as much as own layers", -3.0, 3.0),
    )
    sweep = (
        "effective depth is held, and with it FLOPs per token at a width: more loops mean fewer stored parameters, "
        "and the reference is a stacked model of the same depth"
    )
    held_columns = ("effective_depth",)
    by_construction = (
        "the loss never falls below a floor E >= 0",
        "the loss never rises with parameters, nor with tokens",
        "the worth of loops is unbounded for phi > 0, and one exponent for every loop count",
    )
    axis = "tokens"

    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        worth = np.exp(exponents["phi"] * np.log(runs["loops"]))
        effective = runs["once_parameters"] + worth * runs["recurrent_parameters"]
        return 0.0, -exponents["alpha"] * np.log(effective), -exponents["beta"] * np.log(runs["tokens"])


@register
@final
class BoundedLaw(Law):
    """Chen's dense loop law: loops add effective parameters up to k1 times the block's."""

    name = "bounded"
    equation = "L = E + A N_eff^-alpha + B D^-beta, N_eff = N + k1 N_recurrent (1 - exp(-(r - 1) / k2))"
    source = "Chen et al. 2026, arXiv 2609.40316, equations 4 and 6 (our exponents are minus theirs, E is their c)"
    columns = ("parameters", "recurrent_parameters", "loops", "tokens")
    amplitudes = (FLOOR, SIZE, DATA)
    exponents = (
        ALPHA,
        BETA,
        Coefficient("k1", "blocks that any number of loops is worth at most", 1e-3, 1e2, logarithmic=True),
        Coefficient("k2", "loops after which 63 % of that is there", 1e-2, 1e2, logarithmic=True),
    )
    sweep = (
        "stored parameters are held within each model size while the loops change, at full backpropagation: r = 1 is "
        "the model without looping"
    )
    by_construction = (
        "the loss never falls below a floor E >= 0",
        "the loss never rises with parameters, tokens or loops",
        "loops are worth at most k1 N_recurrent parameters, however many",
    )
    axis = "loops"

    def log_shapes(self, exponents: Mapping[str, Any], runs: Runs) -> tuple[np.ndarray | float, ...]:
        gain = -exponents["k1"] * np.expm1(-(runs["loops"] - 1.0) / exponents["k2"])
        effective = runs["parameters"] + gain * runs["recurrent_parameters"]
        return 0.0, -exponents["alpha"] * np.log(effective), -exponents["beta"] * np.log(runs["tokens"])


__all__ = ["BoundedLaw", "IsoDepthLaw", "TrainingLaw"]
