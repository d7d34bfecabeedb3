"""The published sweeps behind the scaling laws, and losses drawn from the published coefficients, with noise.

Designs and coefficients: Parcae (arXiv 2604.12946, tables 11 and 18, appendix O), iso-depth (arXiv 2604.21106,
tables 2 and 6), Chen et al. (arXiv 2609.40316, tables C.1 and C.2). Where a paper leaves a coefficient out, a comment
says so.
"""

import math

import numpy as np
import pandas as pd

from modeling_looped.scaling.law import law_named
from modeling_looped.scaling.table import completed

PARCAE_140M = {"E": 2.662, "A": 522733.307, "alpha": 0.771, "B": 25420.102, "beta": 0.525}
PARCAE_370M = {"E": 2.439, "A": 832134.346, "alpha": 0.775, "B": 6386.865, "beta": 0.448}
# A and B are "only loosely identified" and not in the paper: these give its losses, 2.3 to 3.0
ISO_DEPTH = {"E": 1.57, "A": 25.0, "alpha": 0.199, "B": 1000.0, "beta": 0.369, "phi": 0.459}
# the paper prints no Z and z: a plateau that is reached at about the trained depth, as it says
DECAY = {"Z": 3.0, "z": 4.0}
ONE_CURVE = {"L_inf": 2.95, "Z": 2.1, "z": 0.55}


def chen_dense() -> dict[str, float]:
    """Table C.2's law for one expert (proposition A.2), with parameters and tokens in units, not billions."""
    start = 1.3174
    alpha = 0.1951 + 0.0137 * math.log(start)
    beta = 0.7548 - 0.0881 * math.log(start)
    return {
        "E": 1.3555,
        "A": 0.8085 * start**-0.1935 * 1e9**alpha,
        "alpha": alpha,
        "B": 3.4291 * start**-0.2056 * 1e9**beta,
        "beta": beta,
        "k1": 0.3682,
        "k2": 1.4037,
    }


def parcae_sweep(width: int = 768, layers: int = 2, budgets=(1, 2, 4, 8, 16, 64)) -> pd.DataFrame:
    """Prelude, core and coda of `layers` each; FLOPs in 1e18; mu in 2..12, tokens from the budget."""
    block = layers * 12 * width**2
    rows = []
    for budget in budgets:
        for loops in (2, 4, 6, 8, 10, 12):
            unrolled = 2 * block + loops * block + 32768 * width
            tokens = budget * 1e18 / (6 * unrolled)
            rows.append((3 * block + 32768 * width, unrolled, tokens, loops))
    return pd.DataFrame(rows, columns=["parameters", "unrolled_parameters", "tokens", "trained_loops"])


def decay_sweep() -> pd.DataFrame:
    """Each model of `parcae_sweep` at the loop counts of appendix O."""
    loops = pd.DataFrame({"loops": [1, 2, 4, 6, 8, 10, 12, 16, 20, 24]})
    return parcae_sweep().merge(loops, how="cross")


def iso_depth_sweep() -> pd.DataFrame:
    """The 116 runs of table 6: 4 + 16 layers of width 64 s, the 16 in r loops, each with an injection."""
    tokens = {
        6: (0.98, 2.10),
        8: (0.64, 1.36, 2.95),
        10: (0.45, 0.97, 2.08, 4.49),
        12: (0.34, 0.72, 1.55, 3.34, 7.13),
        14: (0.56, 1.20, 2.59),
        16: (0.96, 2.07, 4.43),
        18: (1.70, 3.62, 7.78),
        20: (1.42, 3.05),
        24: (2.20, 4.71),
        28: (3.58,),
        34: (2.52,),
    }
    rows = []
    for scale, counts in tokens.items():
        square = (64 * scale) ** 2
        for count in counts:
            for loops in (1, 2, 4, 8):
                injection = 2 * square if loops > 1 else 0
                rows.append((48 * square, 192 * square / loops + injection, loops, count * 1e9, 20))
    names = ["once_parameters", "recurrent_parameters", "loops", "tokens", "effective_depth"]
    return pd.DataFrame(rows, columns=names)


def chen_sweep() -> pd.DataFrame:
    """Three sizes (without their 202k embeddings, approximately), five token counts, six loop counts."""
    rows = [
        (stored * 1e9, block * 1e9, loops, tokens * 1e9)
        for stored, block in ((0.15, 0.1), (0.4, 0.3), (0.75, 0.65))
        for tokens in (100, 200, 300, 400, 500)
        for loops in (1, 2, 3, 4, 6, 8)
    ]
    return pd.DataFrame(rows, columns=["parameters", "recurrent_parameters", "loops", "tokens"])


def measured(design: pd.DataFrame, law: str, coefficients, noise: float, seed: int = 0) -> pd.DataFrame:
    """The design with losses of the law, times log-normal noise of this standard deviation."""
    chosen = law_named(law)
    runs = {name: completed(design)[name].to_numpy(dtype=float) for name in chosen.columns}
    drawn = np.random.default_rng(seed).standard_normal(len(design))
    return design.assign(loss=chosen.loss({"gamma": 1.0, **coefficients}, runs) * np.exp(noise * drawn))
