"""What a fit leaves behind: `scaling_law.json`, `scaling_law.md`, and pictures."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_looped.conversion.manifest import versions
from modeling_looped.reporting.costs import markdown_table
from modeling_looped.reporting.pictures import new_axes

from .fit import Errors, Fit, shown_interval
from .prediction import Prediction
from .table import LOSS

FIGURES, REPORT = "scaling_law.json", "scaling_law.md"
PACKAGES = ("numpy", "pandas", "scipy")


def write_reports(
    fits: Sequence[Fit],
    output: Path,
    *,
    command: str = "",
    source: dict[str, Any] | None = None,
) -> Path:
    """Write figures, report and pictures to `output`, which is made if missing.

    Args:
        fits: of one table.
        output: folder.
        command: the command line, to be repeated.
        source: where the table came from.

    Returns:
        the path of the report.
    """
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "source": source or {},
        "fits": [figures_of(fit) for fit in fits],
    }
    (output / FIGURES).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sections = ["# Scaling laws"]
    if len(fits) > 1:
        sections.append(comparison(fits))
    for fit in fits:
        fit_picture(output / f"{fit.law.name}_fit.png", fit)
        residual_picture(output / f"{fit.law.name}_residuals.png", fit)
        sections.append(section(fit))
    if command:
        sections.append(f"Made by:\n\n```bash\n{command}\n```")
    path = output / REPORT
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def figures_of(fit: Fit) -> dict[str, Any]:
    """A fit as JSON holds it."""
    return {
        "law": fit.law.name,
        "equation": fit.law.equation,
        "source": fit.law.source,
        "constraint": fit.constraint._asdict(),
        "coefficients": {
            name: {
                "value": value,
                "interval": list(fit.intervals[name]) if name in fit.intervals else None,
                "held": name in fit.held,
            }
            for name, value in fit.coefficients.items()
        },
        "confidence": fit.confidence,
        "fitted": fit.fitted._asdict(),
        "held_out": None if fit.held_out is None else fit.held_out._asdict(),
        "agreement_of_starts": fit.agreement,
        "warnings": fit.warnings,
        "ranges": {name: list(ends) for name, ends in fit.ranges.items()},
        "predictions": [one._asdict() for one in fit.predictions],
        "settings": fit.settings,
    }


def section(fit: Fit) -> str:
    """One law in Markdown."""
    law = fit.law
    meanings = {one.name: one.meaning for one in (*law.amplitudes, *law.exponents)}
    rows = [
        (
            name,
            f"{value:.6g}",
            "held" if name in fit.held else shown_interval(fit.intervals[name]) if name in fit.intervals else "none",
            meanings[name],
        )
        for name, value in fit.coefficients.items()
    ]
    parts = [
        f"## {law.name}",
        f"`{law.equation}`\n\n{law.source}.",
        f"**Constraint.** The law is of a sweep in which {law.sweep}.\n\n"
        + "\n".join(f"- in this table, {line}" for line in fit.constraint.this_table)
        + "\n"
        + "\n".join(f"- by construction: {line}" for line in law.by_construction),
        markdown_table(("coefficient", "value", f"{fit.confidence:.0%} interval", "meaning"), rows),
        markdown_table(("runs", "number", "RMSE, nats", "mean error", "worst error", "R²"), error_rows(fit)),
    ]
    if fit.warnings:
        parts.append("**Not to be trusted without a look:**\n\n" + "\n".join(f"- {line}" for line in fit.warnings))
    if fit.predictions:
        parts.append(
            markdown_table(("for", "loss, nats", "interval", "outside of the fitted range"), shown(fit.predictions))
        )
    parts.append(f"![fit]({law.name}_fit.png)\n\n![residuals]({law.name}_residuals.png)")
    return "\n\n".join(parts)


def error_rows(fit: Fit) -> list[tuple[Any, ...]]:
    """Errors on fitted and held-out runs, as rows of a table."""
    named: list[tuple[str, Errors | None]] = [("fitted", fit.fitted), ("held out", fit.held_out)]
    return [
        (
            name,
            errors.runs,
            f"{errors.rmse:.5f}",
            f"{errors.mean_percent:.3f} %",
            f"{errors.worst_percent:.3f} %",
            "" if errors.r2 is None else f"{errors.r2:.5f}",
        )
        for name, errors in named
        if errors is not None
    ]


def shown(predictions: Sequence[Prediction]) -> list[tuple[Any, ...]]:
    """Predictions as rows of a table."""
    return [
        (
            ", ".join(f"{name}={value:g}" for name, value in one.values.items()),
            f"{one.loss:.4f}",
            "none" if one.interval is None else shown_interval(one.interval),
            ", ".join(f"{name} by {factor:.2f} times" for name, factor in one.outside.items()) or "no",
        )
        for one in predictions
    ]


def comparison(fits: Sequence[Fit]) -> str:
    """All laws in one table. Their constraints differ: a lower error is not a licence for another sweep."""
    rows = [
        (
            fit.law.name,
            len(fit.coefficients) - len(fit.held),
            f"{fit.fitted.rmse:.5f}",
            "" if fit.held_out is None else f"{fit.held_out.rmse:.5f}",
            "violated" if fit.constraint.violated else "not violated",
        )
        for fit in fits
    ]
    header = ("law", "coefficients", "RMSE, nats", "RMSE held out", "the sweep's constraint")
    return markdown_table(header, rows)


def halves(fit: Fit) -> list[tuple[str, str, np.ndarray]]:
    """Label, marker and rows of the fitted and the held-out runs."""
    out = fit.table["is_held_out"].to_numpy()
    return [
        (label, marker, rows) for label, marker, rows in (("fitted", "o", ~out), ("held out", "s", out)) if rows.any()
    ]


def fit_picture(path: Path, fit: Fit) -> None:
    """Predicted against measured losses."""
    figure, axes = new_axes(fit.law.name, "measured loss, nats", "loss of the law, nats")
    for label, marker, rows in halves(fit):
        chosen = fit.table[rows]
        axes.plot(chosen[LOSS], chosen["predicted"], linestyle="", marker=marker, alpha=0.7, label=label)
    ends = [fit.table[LOSS].min(), fit.table[LOSS].max()]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=120)


def residual_picture(path: Path, fit: Fit) -> None:
    """What the law is off, in percent, along the law's main column."""
    figure, axes = new_axes(fit.law.name, fit.law.axis, "law - measured, % of the loss")
    for label, marker, rows in halves(fit):
        chosen = fit.table[rows]
        percent = 100.0 * (chosen["predicted"] / chosen[LOSS] - 1.0)
        axes.plot(chosen[fit.law.axis], percent, linestyle="", marker=marker, alpha=0.7, label=label)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


__all__ = ["FIGURES", "REPORT", "write_reports"]
