"""Tables of runs: reading, deriving columns, choosing rows, and what is refused before anything is fitted.

| column | meaning |
|---|---|
| `loss` | of the run, in nats per token |
| `tokens` | that it was trained on |
| `loops` | at which the loss was measured |
| `trained_loops` | in training, their mean where depth is sampled |
| `parameters` | that are stored |
| `once_parameters`, `recurrent_parameters` | of them outside of the loop, and in the block that loops |
| `unrolled_parameters` | of a stack as deep: once_parameters + trained_loops (or loops) * recurrent_parameters |

Any two of `parameters`, `once_parameters`, `recurrent_parameters` give the third. Counts may be in any unit, the same
in all rows; the amplitudes of a law are in that unit then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .law import Law, did_you_mean

LOSS = "loss"
#: Columns whose logarithm or quotient some law takes.
POSITIVE = (LOSS, "tokens", "loops", "trained_loops", "parameters", "unrolled_parameters")


class Derived(NamedTuple):
    """How a column follows from others."""

    name: str
    needs: tuple[str, ...]
    of: Callable[..., pd.Series]


DERIVED = (
    Derived("parameters", ("once_parameters", "recurrent_parameters"), lambda once, block: once + block),
    Derived("once_parameters", ("parameters", "recurrent_parameters"), lambda stored, block: stored - block),
    Derived("recurrent_parameters", ("parameters", "once_parameters"), lambda stored, once: stored - once),
    Derived("loops", ("trained_loops",), lambda loops: loops),
    Derived(
        "unrolled_parameters",
        ("once_parameters", "recurrent_parameters", "trained_loops"),
        lambda once, block, loops: once + loops * block,
    ),
    Derived(
        "unrolled_parameters",
        ("once_parameters", "recurrent_parameters", "loops"),
        lambda once, block, loops: once + loops * block,
    ),
)


def read_table(path: Path, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a table of runs.

    Args:
        path: CSV, or TSV by its ending.
        names: column as it is called here -> as the file calls it.

    Raises:
        ValueError: for no rows, or a name that the file lacks.
    """
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", skipinitialspace=True)
    for ours, theirs in (names or {}).items():
        if theirs not in table:
            raise ValueError(f"{path} has no column {theirs!r}; it has: {listed(table)}.{did_you_mean(theirs, table)}")
        if ours in table and ours != theirs:
            raise ValueError(f"{path} has columns {ours!r} and {theirs!r}: both would be called {ours!r}.")
    table = table.rename(columns={theirs: ours for ours, theirs in (names or {}).items()})
    if table.empty:
        raise ValueError(f"{path} has no rows.")
    return table


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns that follow from its own."""
    table = table.copy()
    found = True
    while found:
        found = False
        for rule in DERIVED:
            if rule.name not in table and all(name in table for name in rule.needs):
                table[rule.name] = rule.of(*(table[name] for name in rule.needs))
                found = True
    return table


def select(table: pd.DataFrame, expression: str, option: str) -> np.ndarray:
    """The rows [n] for which an expression over the columns is true, such as `tokens > 1e9 and loops == 4`.

    Raises:
        ValueError: for what is no such expression; names the option that it came from.
    """
    try:
        chosen = table.eval(expression, engine="python")
    except Exception as error:  # pandas raises a dozen kinds, SyntaxError and its own among them
        raise ValueError(
            f"{option}={expression!r} cannot be evaluated: {error}. Columns are: {listed(table)}."
        ) from error
    if not isinstance(chosen, pd.Series) or chosen.dtype != bool:
        raise ValueError(f"{option}={expression!r} must be true or false for each row, such as 'tokens > 1e9'.")
    return chosen.to_numpy()


def checked(table: pd.DataFrame, law: Law) -> pd.DataFrame:
    """The completed table, if the law can be fitted to it.

    Raises:
        ValueError: for a missing column, a value that is no number, or one that is not positive.
    """
    table = completed(table)
    for name in (LOSS, *law.columns):
        if name not in table:
            raise ValueError(
                f"law={law.name!r} needs a column {name!r}{how_to(name)}; the table has: {listed(table)}."
            )
    for name in (LOSS, *law.columns, *law.held_columns, *law.blocks):
        if name not in table:
            continue
        values = np.array([as_number(value) for value in table[name]])
        wrong = ~np.isfinite(values)
        if wrong.any():
            raise refusal(table, name, wrong, "must be a finite number")
        wrong = np.less_equal(values, 0) if name in POSITIVE else np.less(values, 0)
        if wrong.any():
            raise refusal(table, name, wrong, "must be above 0" if name in POSITIVE else "must not be negative")
        table[name] = values
    if is_of_training(law) and "trained_loops" in table:
        others = ~at_trained_loops(table)
        if others.any():
            raise ValueError(
                f"law={law.name!r} is of losses at the loops that were trained, and {others.sum()} of {len(table)} "
                "rows have other loops than trained_loops (or, where that is a mean of sampled depths and no whole "
                "number, differ by more than 1): choose rows with where='abs(loops - trained_loops) <= 1', or fit "
                "law='unified'."
            )
    return table


def is_of_training(law: Law) -> bool:
    """Whether a law is of the loss that training reaches, at no other loop count."""
    return "tokens" in law.columns and "trained_loops" not in law.columns


def at_trained_loops(table: pd.DataFrame) -> np.ndarray:
    """The rows [n] measured at the loops that were trained; sampled depths have a mean, which may be no whole number.

    Within 1 of that: a Poisson depth of at least 1 has a mean a little above its parameter, and a log-normal Poisson
    one (Huginn's) a mean of one more.
    """
    loops, trained = (np.array([as_number(value) for value in table[name]]) for name in ("loops", "trained_loops"))
    return np.abs(loops - trained) <= np.where(trained % 1 == 0, 0.0, 1.0)


def as_number(value: object) -> float:
    """A cell as a number, NaN if it is none."""
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def refusal(table: pd.DataFrame, name: str, wrong: np.ndarray, rule: str) -> ValueError:
    """The error for values of a column that break a rule."""
    first = int(np.argmax(wrong))
    return ValueError(
        f"{name}={table[name].iloc[first]!s} in row {first + 1} {rule} ({wrong.sum()} of {len(table)} rows are not)."
    )


def how_to(name: str) -> str:
    """How a column may be given instead, for an error message."""
    ways = [" and ".join(repr(need) for need in rule.needs) for rule in DERIVED if rule.name == name]
    return f" (or {', or '.join(ways)})" if ways else ""


def values_of(text: str) -> dict[str, float]:
    """`parameters=1e9 tokens=2e10 loops=8`, as numbers by column.

    Raises:
        ValueError: for anything else.
    """
    values = {}
    for part in text.replace(",", " ").split():
        name, separator, number = part.partition("=")
        try:
            values[name] = float(number)
        except ValueError:
            separator = ""
        if not (separator and name):
            raise ValueError(f"predict={text!r}: {part!r} must be column=number, such as tokens=2e10.")
    if not values:
        raise ValueError("predict is empty: name columns and values, such as 'tokens=2e10 loops=8'.")
    return values


def columns_of(table: pd.DataFrame, law: Law) -> dict[str, np.ndarray]:
    """The columns that a law reads, as arrays [n]."""
    return {name: np.asarray(table[name], dtype=float) for name in law.columns}


def block_of(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """For each row [n], the number of its block: rows that agree in these columns.

    Raises:
        ValueError: for a column that the table lacks.
    """
    if not columns:
        return np.arange(len(table))
    for name in columns:
        if name not in table:
            raise ValueError(f"blocks: the table has no column {name!r}; it has: {listed(table)}.")
    return table.groupby(list(columns), sort=False).ngroup().to_numpy()


def listed(table: pd.DataFrame) -> str:
    """The names of its columns."""
    return ", ".join(map(str, table.columns))


__all__ = ["LOSS", "block_of", "checked", "columns_of", "completed", "read_table", "select", "values_of"]
