"""Scaling laws: published coefficients come back from data drawn from them, with intervals; what is refused."""

import numpy as np
import pandas as pd
import pytest
from scaling_designs import (
    DECAY,
    ISO_DEPTH,
    ONE_CURVE,
    PARCAE_140M,
    PARCAE_370M,
    chen_dense,
    chen_sweep,
    decay_sweep,
    iso_depth_sweep,
    measured,
    parcae_sweep,
)

from modeling_looped.scaling import LAWS, fit_law
from modeling_looped.scaling.law import law_named
from modeling_looped.scaling.search import Problem

QUICK = {"restarts": 64, "polished": 3, "resamples": 0}
CURVE = pd.DataFrame({"loops": range(1, 25)})

#: name -> law, sweep, coefficients, noise, coefficients that are freed, and how far (as a share) each may be off
PUBLISHED = {
    "training, 140M": ("training", parcae_sweep, PARCAE_140M, 3e-4, (), {"E": 0.01, "alpha": 0.1, "beta": 0.05}),
    "training, 370M": (
        *("training", lambda: parcae_sweep(1024, 4, (32, 64, 128)), PARCAE_370M, 1e-4, ()),
        {"E": 0.02, "alpha": 0.1, "beta": 0.05},
    ),
    "iso_depth": (
        *("iso_depth", iso_depth_sweep, ISO_DEPTH, 2e-3, ()),
        {"E": 0.05, "alpha": 0.1, "beta": 0.1, "phi": 0.1},
    ),
    "test_time_exponential": (
        *("test_time_exponential", lambda: CURVE, ONE_CURVE, 5e-4, ()),
        {"L_inf": 0.001, "Z": 0.02, "z": 0.02},
    ),
    "unified": (
        *("unified", decay_sweep, {**PARCAE_140M, **DECAY}, 1e-3, ()),
        {"E": 0.02, "alpha": 0.1, "beta": 0.05, "Z": 0.02, "z": 0.02},
    ),
    "unified, gamma learned": (
        *("unified", decay_sweep, {**PARCAE_140M, **DECAY, "gamma": 1.19}, 1e-3, ("gamma",)),
        {"E": 0.02, "alpha": 0.1, "beta": 0.05, "Z": 0.02, "z": 0.03, "gamma": 0.02},
    ),
    "bounded": (
        *("bounded", chen_sweep, chen_dense(), 3e-4, ()),
        {"E": 0.05, "alpha": 0.1, "beta": 0.1, "k1": 0.1, "k2": 0.1},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_coefficients_come_back_from_data_drawn_from_them(name):
    law, sweep, true, noise, free, tolerance = PUBLISHED[name]
    fit = fit_law(
        *(law, measured(sweep(), law, true, noise)), free=free, restarts=128, polished=4, resamples=20, confidence=0.99
    )
    assert fit.agreement >= 0.5
    assert fit.fitted.mean_percent < 100 * noise
    assert set(fit.intervals) == set(true)
    for coefficient, value in true.items():
        low, high = fit.intervals[coefficient]
        assert low <= value <= high, coefficient
        if coefficient in tolerance:
            assert fit.coefficients[coefficient] == pytest.approx(value, rel=tolerance[coefficient]), coefficient


def test_every_registered_law_is_recovered_here():
    assert {law for law, *_ in PUBLISHED.values()} == set(LAWS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_derivatives_are_those_of_finite_differences(name):
    law, sweep, true, *_ = PUBLISHED[name]
    table = measured(sweep(), law, true, 0.01).iloc[::3]
    chosen = law_named(law)
    table = table.assign(once_parameters=1e7) if law == "bounded" else table
    runs = {column: table[column].to_numpy(dtype=float) for column in chosen.columns}
    problem = Problem(chosen, runs, table["loss"].to_numpy(), {}, delta=1.0)
    vector = problem.vector({"gamma": 1.0, **true})
    assert problem.coefficients(vector) == pytest.approx({"gamma": 1.0, **true} if law == "unified" else true)
    for place in range(len(vector)):
        step = np.zeros_like(vector)
        step[place] = 1e-6
        expected = (problem.residuals(vector + step) - problem.residuals(vector - step)) / 2e-6
        np.testing.assert_allclose(problem.jacobian(vector)[:, place], expected, atol=1e-7)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = []
    for seed in range(10):
        table = measured(CURVE, "test_time_exponential", ONE_CURVE, 5e-4, seed)
        fit = fit_law("test_time_exponential", table, restarts=8, polished=1, resamples=24, confidence=0.9, seed=seed)
        covered += [low <= ONE_CURVE[name] <= high for name, (low, high) in fit.intervals.items()]
    assert 0.7 <= np.mean(covered) <= 0.99


def test_outliers_move_least_squares_and_not_the_huber_fit():
    table = measured(iso_depth_sweep(), "iso_depth", ISO_DEPTH, 1e-3)
    table.loc[::20, "loss"] *= 1.15  # runs that diverged a little
    off = {
        objective: abs(
            fit_law("iso_depth", table, objective=objective, **QUICK).coefficients["phi"] - ISO_DEPTH["phi"]
        )
        for objective in ("huber", "squares")
    }
    assert off["huber"] < 0.03
    assert off["squares"] > 3 * off["huber"]


def test_the_same_seed_gives_the_same_fit_and_another_one_other_intervals():
    table = measured(CURVE, "test_time_exponential", ONE_CURVE, 1e-3)
    first, second, third = (
        fit_law("test_time_exponential", table, restarts=16, polished=1, resamples=8, seed=seed) for seed in (3, 3, 4)
    )
    assert (first.coefficients, first.intervals) == (second.coefficients, second.intervals)
    assert first.intervals != third.intervals


def test_held_out_errors_are_those_of_the_rows_that_were_held_out_and_not_fitted():
    table = measured(CURVE, "test_time_exponential", ONE_CURVE, 0.0)
    table.loc[table["loops"] > 12, "loss"] += 0.1
    fit = fit_law("test_time_exponential", table, hold_out="loops > 12", **QUICK)
    assert fit.coefficients == pytest.approx(ONE_CURVE, rel=1e-4)  # the spoilt rows were not fitted
    assert (fit.fitted.runs, fit.held_out.runs) == (12, 12)
    assert fit.fitted.rmse < 1e-6
    assert fit.held_out.rmse == pytest.approx(0.1, rel=1e-4)
    assert fit.held_out.worst_percent == pytest.approx(100 * 0.1 / table["loss"][12:].min(), rel=1e-3)


def test_a_term_may_be_held_at_zero_and_an_exponent_at_a_value():
    table = measured(iso_depth_sweep(), "iso_depth", {**ISO_DEPTH, "phi": 1.0, "E": 0.0}, 1e-5)
    fit = fit_law("iso_depth", table, hold={"phi": 1.0, "E": 0.0}, **QUICK)
    assert fit.held == {"phi": 1.0, "E": 0.0}
    assert fit.coefficients == pytest.approx({**ISO_DEPTH, "phi": 1.0, "E": 0.0}, rel=5e-3)
    restricted = fit_law(
        "iso_depth", measured(iso_depth_sweep(), "iso_depth", ISO_DEPTH, 0.0), hold={"phi": 0}, **QUICK
    )
    assert restricted.fitted.rmse > 0.005


def test_the_bootstrap_resamples_the_rows_of_a_trained_model_together():
    table = measured(decay_sweep().iloc[:120], "unified", {**PARCAE_140M, **DECAY}, 1e-3)
    fit = fit_law("unified", table, restarts=8, polished=1, resamples=0)
    assert fit.settings["blocks"] == ["unrolled_parameters", "tokens", "trained_loops"]
    rows = fit_law("unified", table, restarts=8, polished=1, resamples=0, blocks=())
    assert rows.settings["blocks"] == []


def test_few_blocks_are_named_and_a_single_one_gives_no_intervals():
    table = measured(CURVE, "test_time_exponential", ONE_CURVE, 1e-3).head(4)
    fit = fit_law("test_time_exponential", table, restarts=8, polished=1, resamples=5)
    assert any("4 blocks for 3 coefficients: intervals rest on few" in line for line in fit.warnings)
    assert all(low < high for low, high in fit.intervals.values())
    one = fit_law(
        "test_time_exponential", table.assign(model=1), restarts=8, polished=1, resamples=5, blocks=["model"]
    )
    assert one.intervals == {}
    assert any("1 blocks for 3 coefficients: there are no intervals" in line for line in one.warnings)


def test_what_the_runs_do_not_determine_is_named_and_has_no_interval():
    table = measured(parcae_sweep(), "training", PARCAE_140M, 1e-3).query("trained_loops == 4")
    fit = fit_law(
        "training", table.assign(unrolled_parameters=1e8), hold={"beta": 0.5}, restarts=16, polished=2, resamples=5
    )
    assert set(fit.intervals) == {"B"}
    assert any("unrolled_parameters=1e+08" in line for line in fit.warnings)
    assert any("not determined by these runs: E, A, alpha" in line for line in fit.warnings)


def test_a_coefficient_on_its_bound_is_named():
    table = measured(parcae_sweep(), "training", {**PARCAE_140M, "B": 0.0}, 0.0)
    fit = fit_law("training", table, **QUICK)
    assert any(line.startswith("B=") and "lower bound" in line for line in fit.warnings)
    steep = measured(iso_depth_sweep(), "iso_depth", {**ISO_DEPTH, "phi": 5.0}, 0.0)
    assert any("upper bound" in line for line in fit_law("iso_depth", steep, **QUICK).warnings)


def test_losses_that_rise_past_their_minimum_are_named():
    table = measured(CURVE, "test_time_exponential", ONE_CURVE, 0.0)
    table.loc[table["loops"] > 20, "loss"] += 0.2
    fit = fit_law("test_time_exponential", table, **QUICK)
    assert any("the loss rises by 0.2" in line and "plateau" in line for line in fit.warnings)


def test_the_constraint_says_whether_this_table_holds_the_sweep():
    sizes = pd.concat([parcae_sweep(), parcae_sweep(1024, 4, (32, 64))], ignore_index=True)
    two = fit_law("training", measured(sizes, "training", PARCAE_140M, 1e-3), **QUICK)
    assert two.constraint.violated
    assert "2 values" in two.constraint.this_table[0]
    assert any("constraint is not held" in line for line in two.warnings)
    one = fit_law("iso_depth", measured(iso_depth_sweep(), "iso_depth", ISO_DEPTH, 1e-3), **QUICK)
    assert one.constraint.this_table == ["effective_depth: held, 20 in all 116 runs"]
    assert "effective depth is held" in one.constraint.sweep


def test_predictions_are_the_laws_with_intervals_and_say_where_they_extrapolate():
    fit = fit_law(
        *("iso_depth", measured(iso_depth_sweep(), "iso_depth", ISO_DEPTH, 1e-3)), restarts=64, polished=2, resamples=8
    )
    inside = fit.predict({"parameters": 2e8, "recurrent_parameters": 1e8, "loops": 4, "tokens": 2e9})
    law = law_named("iso_depth")
    runs = {"once_parameters": [1e8], "recurrent_parameters": [1e8], "loops": [4], "tokens": [2e9]}
    true = law.loss(ISO_DEPTH, {name: np.array(value, dtype=float) for name, value in runs.items()})
    assert inside.loss == pytest.approx(true[0], rel=2e-3)
    assert inside.interval[0] <= inside.loss <= inside.interval[1]
    assert inside.outside == {}
    beyond = fit.predict({"once_parameters": 1e8, "recurrent_parameters": 1e8, "loops": 16, "tokens": 7.78e10})
    assert beyond.outside == pytest.approx({"loops": 2.0, "tokens": 10.0})
    with pytest.raises(ValueError, match=r"loops=100 is 12.5 times outside of the fitted range 1..8"):
        fit.predict({"once_parameters": 1e8, "recurrent_parameters": 1e8, "loops": 100, "tokens": 2e9})
    with pytest.raises(ValueError, match=r"'loop' is no column of the fit. Did you mean 'loops'"):
        fit.predict({"once_parameters": 1e8, "recurrent_parameters": 1e8, "loop": 4, "tokens": 2e9})
    with pytest.raises(ValueError, match=r"predict: law='iso_depth' needs a column 'once_parameters'"):
        fit.predict({"loops": 4, "tokens": 2e9})


TABLE = measured(parcae_sweep(), "training", PARCAE_140M, 1e-3)
REFUSED = {
    "an unknown law": ({"law": "trainning"}, r"law='trainning' is unknown.*Did you mean 'training'"),
    "a missing column": (
        {"table": TABLE.drop(columns="tokens")},
        r"needs a column 'tokens'; the table has: parameters, unrolled_parameters, trained_loops, loss",
    ),
    "a missing column that others give": (
        {"table": TABLE.drop(columns="unrolled_parameters")},
        r"'unrolled_parameters' \(or 'once_parameters' and 'recurrent_parameters' and 'trained_loops'",
    ),
    "no loss": ({"table": TABLE.drop(columns="loss")}, "needs a column 'loss'"),
    "too few runs": (
        {"table": TABLE.head(5)},
        r"5 coefficients to fit \(E, A, B, alpha, beta\), and 5 runs are too few",
    ),
    "a loss of zero": ({"table": TABLE.assign(loss=[0.0, *TABLE["loss"][1:]])}, r"loss=0.0 in row 1 must be above 0"),
    "negative tokens": ({"table": TABLE.assign(tokens=-1.0)}, r"tokens=-1.0 in row 1 .*\(36 of 36 rows"),
    "words for numbers": ({"table": TABLE.assign(tokens="many")}, "tokens=many in row 1 must be a finite number"),
    "a hold-out of everything": ({"hold_out": "tokens > 0"}, "holds out all 36 runs"),
    "a hold-out of nothing": ({"hold_out": "tokens < 0"}, "holds out none of 36 runs"),
    "a hold-out that is no expression": ({"hold_out": "tokens >"}, r"hold_out='tokens >' cannot be evaluated"),
    "a hold-out of an unknown column": ({"hold_out": "token > 1"}, r"cannot be evaluated: .*Columns are: parameters"),
    "a hold-out that is a number": ({"hold_out": "tokens + 1"}, "must be true or false for each row"),
    "rows of none": ({"where": "tokens < 0"}, "leaves no rows"),
    "losses at other loops": (
        {"table": TABLE.assign(loops=4)},
        r"30 of 36 rows have other loops than trained_loops.*fit law='unified'",
    ),
    "losses at other loops, of a law of training that reads loops": (
        {"law": "bounded", "table": TABLE.assign(loops=4, recurrent_parameters=1e7)},
        r"law='bounded' is of losses at the loops that were trained, and 30 of 36 rows",
    ),
    "several curves as one": (
        {"law": "test_time_exponential", "table": measured(decay_sweep(), "unified", {**PARCAE_140M, **DECAY}, 0.0)},
        r"is of one trained model, and the table has 36 values of tokens",
    ),
    "an unknown coefficient": ({"hold": {"gama": 1.0}}, "has no coefficient 'gama'; it has: E, A, B, alpha, beta"),
    "a coefficient beyond its bounds": ({"hold": {"alpha": -1.0}}, r"alpha=-1.0 must lie in 0..2.5"),
    "one that is held and freed": ({"hold": {"alpha": 1.0}, "free": ["alpha"]}, "'alpha' is both held and freed"),
    "all coefficients held": ({"hold": PARCAE_140M}, "nothing is left to fit"),
    "an unknown block": ({"blocks": ["budget"]}, "blocks: the table has no column 'budget'"),
    "a prediction without its columns": ({"predict": [{"tokens": 1e9}]}, "predict: law='training' needs a column"),
    "a prediction too far": (
        {"predict": [{"unrolled_parameters": 1e8, "tokens": 1e15}], "max_extrapolation": 100.0},
        r"tokens=1e\+15 is .* times outside of the fitted range .* max_extrapolation is 100",
    ),
    "an extrapolation below one": (
        {"predict": [{"unrolled_parameters": 1e8, "tokens": 1e9}], "max_extrapolation": 0.5},
        "max_extrapolation=0.5 must be at least 1",
    ),
    "no restarts": ({"restarts": 0}, "restarts=0"),
    "a confidence of one": ({"confidence": 1.0}, "confidence=1.0 must lie between 0 and 1"),
    "no delta": ({"delta": 0.0}, "delta=0.0 must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_by_name(name):
    changed, message = REFUSED[name]
    arguments = {"law": "training", "table": TABLE, **QUICK, **changed}
    with pytest.raises(ValueError, match=message):
        fit_law(arguments.pop("law"), arguments.pop("table"), **arguments)
