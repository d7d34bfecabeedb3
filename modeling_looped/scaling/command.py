"""The command `scaling-law`: fit scaling laws of looped models to a table of runs.

    python -m modeling_looped scaling-law --table runs.csv --law training iso_depth --hold-out 'tokens > 1e10' \
        --predict 'once_parameters=1e8 recurrent_parameters=4e8 loops=4 tokens=2e10' --output build/scaling

Writes scaling_law.json, scaling_law.md and pictures. Columns of the table are described in
modeling_looped/scaling/table.py, laws with --list.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .fit import Fit, fit_law, shown_interval
from .law import LAWS, law_named
from .report import write_reports
from .runs import gather
from .table import read_table, values_of

Report = Callable[[str], object]


def number_of(text: str) -> tuple[str, float]:
    """`name=number`, taken apart."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=number") from error


def name_of(text: str) -> tuple[str, str]:
    """`ours=theirs`, taken apart."""
    ours, separator, theirs = text.partition("=")
    if not (ours and separator and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} must be name-here=name-in-the-file")
    return ours, theirs


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m modeling_looped scaling-law",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--table", type=Path, metavar="FILE", help="CSV or TSV, one row per run")
    add("--runs", nargs="+", type=Path, metavar="DIR", help="output folders of training runs, instead of a table")
    add("--evaluation", metavar="NAME", help="evaluation set of the runs whose loss is fitted, if there are several")
    add(
        "--names",
        nargs="+",
        type=name_of,
        default=[],
        metavar="OURS=THEIRS",
        help="columns that the file calls otherwise",
    )
    add("--every-loop", action="store_true", help="of the runs, every loop count that they were evaluated at")
    add("--law", nargs="+", metavar="LAW", help=f"laws to fit: {', '.join(LAWS)}")
    add("--list", action="store_true", help="describe the laws and their columns, and stop")
    add("--where", metavar="EXPRESSION", help="use only these rows, such as 'trained_loops == 8'")
    add(
        "--hold-out",
        metavar="EXPRESSION",
        help="rows that are not fitted and measure the error, such as 'tokens > 1e9'",
    )
    add("--hold", nargs="+", type=number_of, default=[], metavar="NAME=VALUE", help="coefficients that are not fitted")
    add("--free", nargs="+", default=[], metavar="NAME", help="coefficients to fit that a law holds by itself (gamma)")
    add("--blocks", nargs="*", metavar="COLUMN", help="columns whose equal values are resampled together")
    add("--delta", type=float, default=1e-3, help="of Huber's loss, in log loss (%(default)s)")
    add("--restarts", type=int, default=512, metavar="N", help="random starts (%(default)s)")
    add("--polished", type=int, default=16, metavar="N", help="best starts that are refined (%(default)s)")
    add("--bootstrap", type=int, default=200, metavar="N", help="resamples for the intervals (%(default)s)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--seed", type=int, default=0, help="of starts and resamples (%(default)s)")
    add("--predict", nargs="+", default=[], metavar="VALUES", help="runs to predict, such as 'tokens=2e10 loops=8 …'")
    add("--max-extrapolation", type=float, default=10.0, metavar="X", help="times outside of the range (%(default)s)")
    add("--output", type=Path, metavar="DIR", help="folder to write")
    return made


def scaling_law(options: argparse.Namespace, command: str, report: Report) -> Path:
    """Read the runs, fit every law, predict, and write.

    Raises:
        ValueError: for options or runs that cannot work, with what would.
    """
    for name in options.law:
        law_named(name)
    asked = [values_of(text) for text in options.predict]
    table, source = runs_of(options)
    report(f"{len(table)} rows")
    fits = [
        fit_law(
            name,
            table,
            hold_out=options.hold_out,
            where=options.where,
            hold=dict(options.hold),
            free=options.free,
            blocks=options.blocks,
            delta=options.delta,
            restarts=options.restarts,
            polished=options.polished,
            resamples=options.bootstrap,
            confidence=options.confidence,
            seed=options.seed,
            predict=asked,
            max_extrapolation=options.max_extrapolation,
        )
        for name in options.law
    ]
    for fit in fits:
        for line in summary(fit):
            report(line)
        for one in fit.predictions:
            beyond = f"  EXTRAPOLATED: {', '.join(one.outside)}" if one.outside else ""
            interval = "" if one.interval is None else f" {shown_interval(one.interval)}"
            report(f"   predicted {one.loss:.4f}{interval} for {one.values}{beyond}")
    written = write_reports(fits, options.output, command=command, source=source)
    report(f"written to {written}")
    return written


def runs_of(options: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of runs, and where it came from."""
    if options.table is not None:
        digest = hashlib.sha256(options.table.read_bytes()).hexdigest()
        return read_table(options.table, dict(options.names)), {"table": str(options.table), "sha256": digest}
    table = gather(options.runs, options.evaluation, every_loop=options.every_loop)
    return table, {"runs": [str(folder) for folder in options.runs]}


def summary(fit: Fit) -> list[str]:
    """A fit in a few lines."""
    lines = [f"{fit.law.name}: {fit.law.equation}"]
    for name, value in fit.coefficients.items():
        interval = shown_interval(fit.intervals[name]) if name in fit.intervals else ""
        lines.append(f"   {name} = {value:.6g} {'(held)' if name in fit.held else interval}")
    lines.append(f"   error {fit.fitted.rmse:.5f} nats RMSE on {fit.fitted.runs} fitted runs")
    if fit.held_out is not None:
        lines[-1] += f", {fit.held_out.rmse:.5f} on {fit.held_out.runs} held out"
    lines.append(f"   constraint: {fit.law.sweep}")
    return (
        lines
        + [f"   in this table: {line}" for line in fit.constraint.this_table]
        + [f"   WARNING: {line}" for line in fit.warnings]
    )


def described() -> str:
    """All laws, for `--list`."""
    return "\n\n".join(
        "\n   ".join(
            (law.name, law.equation, f"columns: loss, {', '.join(law.columns)}", f"holds: {law.sweep}", law.source)
        )
        for law in LAWS.values()
    )


def main(arguments: Sequence[str] | None = None, report: Report = print) -> int:
    """Run the command; returns its exit status."""
    made = parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = made.parse_args(given)
    if options.list:
        report(described())
        return 0
    if (options.table is None) == (options.runs is None):
        made.error("give either --table or --runs")
    if not options.law or options.output is None:
        made.error("--law and --output are required")
    try:
        scaling_law(options, shlex.join(["python", "-m", "modeling_looped", "scaling-law", *given]), report)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"scaling-law: {error}\n")
        return 1
    return 0


__all__ = ["main"]
