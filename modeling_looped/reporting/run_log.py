"""Run logs: the curves of a training run, from what a stock `Trainer` leaves in its output folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

STATE, SETTINGS = "trainer_state.json", "run.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
EVALUATION = re.compile(r"eval_(?:(.+)_)?loss")


class Curve(NamedTuple):
    """One logged quantity.

    Attributes:
        x: tokens seen, or steps where no tokens were logged.
        y: values.
    """

    x: list[float]
    y: list[float]


class RunLog(NamedTuple):
    """A training run.

    Attributes:
        axis: what the curves' x is: `tokens` or `steps`.
        curves: `training`, and each evaluation set's loss, in nats per token.
        settings: what `run.json` says, if it is there.
        total_flos: FLOPs as the Trainer counted them.
        steps: optimiser steps taken.
    """

    axis: str
    curves: dict[str, Curve]
    settings: dict[str, Any]
    total_flos: float
    steps: int


def read_run(folder: Path) -> RunLog:
    """Read the log of a run.

    `trainer_state.json` is taken from the folder itself, or from its last checkpoint. Tokens are those of
    `num_input_tokens_seen`, which `TrainingArguments(include_num_input_tokens_seen=...)` logs.

    Raises:
        ValueError: if the folder holds no such file, it cannot be read, or it has no losses.
    """
    path = state_file(folder)
    state = read_json(path)
    history = state.get("log_history", [])
    entries = [entry for entry in history if "loss" in entry or any(map(EVALUATION.fullmatch, entry))]
    if not entries:
        raise ValueError(f"run={str(folder)!r}: {path.name} has no losses; was the run logged (logging_steps)?")
    axis = "tokens" if any("num_input_tokens_seen" in entry for entry in entries) else "steps"
    curves: dict[str, Curve] = {}
    seen = 0.0
    for entry in entries:
        # an evaluation that was logged without tokens belongs to those of the step before it
        seen = float(entry.get("num_input_tokens_seen", seen) if axis == "tokens" else entry.get("step", seen))
        for key, value in entry.items():
            match = EVALUATION.fullmatch(key)
            if key == "loss" or match:
                name = "training" if match is None else (match[1] or "evaluation")
                curve = curves.setdefault(name, Curve([], []))
                curve.x.append(seen)
                curve.y.append(float(value))
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    return RunLog(axis, curves, settings, float(state.get("total_flos", 0)), int(state.get("global_step", 0)))


def state_file(folder: Path) -> Path:
    """The newest `trainer_state.json` of a run."""
    if (folder / STATE).is_file():
        return folder / STATE
    steps = [
        (int(match[1]), path)
        for path in folder.glob(f"*/{STATE}")
        if (match := CHECKPOINT.fullmatch(path.parent.name))
    ]
    if not steps:
        raise ValueError(f"run={str(folder)!r} holds no {STATE}, neither itself nor in a checkpoint-<step> folder.")
    return max(steps)[1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must be a JSON object.")
    return value


__all__ = ["Curve", "RunLog", "read_run"]
