"""Scaling laws of looped models: fitted to a table of runs, with intervals, held-out error and the constraint held.

Needs the extra `scaling` (scipy, pandas, matplotlib): `pip install modeling-looped[scaling]`.
"""

from . import test_time_laws, training_laws
from .fit import Errors, Fit, fit_law
from .law import LAWS, Law
from .prediction import Prediction
from .table import read_table

__all__ = ["LAWS", "Errors", "Fit", "Law", "Prediction", "fit_law", "read_table", "test_time_laws", "training_laws"]
