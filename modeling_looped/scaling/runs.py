"""A table of runs from the folders that training left behind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_looped.accounting import layout_of, parameter_counts, skeleton
from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.depth_sampling import SampledDepth
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.reporting.run_log import SETTINGS, RunLog, read_run

#: Name of an evaluation loss at a loop count other than the model's own, as pretraining logs it.
AT_LOOPS = re.compile(r"(?P<name>.+)_loops_(?P<loops>\d+)")


def gather(folders: Iterable[Path], evaluation: str | None = None, *, every_loop: bool = False) -> pd.DataFrame:
    """One row per run folder: its last evaluation loss, tokens, loops and parameters without embeddings.

    Args:
        folders: output folders of pretraining or distillation: `run.json` beside `trainer_state.json`.
        evaluation: which evaluation set's loss; `None`: the only one.
        every_loop: whether a run has a row for each loop count at which it was evaluated (`eval_num_loops`), as the
            laws of test time want it; else it has one, at its own.

    Raises:
        ValueError: for a folder without these files, an unfinished run, no or several evaluation losses.
    """
    return pd.DataFrame([row for folder in folders for row in rows_of(folder, evaluation, every_loop)])


def rows_of(folder: Path, evaluation: str | None, every_loop: bool) -> list[dict[str, Any]]:
    """The rows of one run."""
    log = read_run(folder)
    # a record of distillation holds its student, one of pretraining its model
    config = log.settings.get("student", {}).get("config") or log.settings.get("model")
    if config is None:
        raise ValueError(f"run={str(folder)!r} has no {SETTINGS} that names its model's config.")
    if log.settings.get("status") != "finished":
        raise ValueError(
            f"run={str(folder)!r} is not finished (status {log.settings.get('status')!r}): its last loss is that of "
            "neither its tokens nor its learning rate."
        )
    name = set_of(log, folder, evaluation)
    own = {
        "run": folder.name,
        "loss": log.curves[name].y[-1],
        "tokens": float(log.settings["tokens_seen"]),
        **sizes(config),
    }
    others = []
    for curve, values in log.curves.items():
        match = AT_LOOPS.fullmatch(curve)
        if every_loop and match and match["name"] == name:
            depth = effective_depth(config, int(match["loops"]))
            others.append(own | {"loss": values.y[-1], "loops": int(match["loops"]), "effective_depth": depth})
    return [own, *others]


def set_of(log: RunLog, folder: Path, evaluation: str | None) -> str:
    """The name of the evaluation set whose loss is asked for."""
    names = [name for name in log.curves if name != "training" and not AT_LOOPS.fullmatch(name)]
    if evaluation is None and len(names) == 1:
        return names[0]
    if evaluation is None or evaluation not in names:
        asked = "" if evaluation is None else f" called {evaluation!r}"
        raise ValueError(
            f"run={str(folder)!r} has {len(names)} evaluation losses{asked or ', and one must be chosen'}: "
            f"{', '.join(names) or 'none'}."
        )
    return evaluation


def effective_depth(values: dict[str, Any], loops: int) -> int:
    """Layers that run, from a looped model's config, at `loops`."""
    return layout_of(LoopedConfig.from_dict(values), loops).num_invocations


def sizes(values: dict[str, Any]) -> dict[str, float]:
    """Parameters and loops of a model, from its config.

    Embeddings and head do not count, as in the papers of the laws; what runs in every loop (core and injection) is
    recurrent.
    """
    if values.get("model_type") == LoopedConfig.model_type:
        config = LoopedConfig.from_dict(values)
        model = skeleton(LoopedForCausalLM, config)
        parts = parameter_counts(model).parts
        recurrent = parts["core"] + parts["loop"]
        sampling = model.model.depth_sampling
        trained = float(config.num_loops)
        if isinstance(sampling, SampledDepth):
            depths = sampling.probabilities(config.num_loops)
            trained = float(depths @ torch.arange(1, len(depths) + 1, dtype=depths.dtype) / depths.sum())
        return {
            "parameters": sum(parts.values()) - parts["embedding"] - parts["head"],
            "recurrent_parameters": recurrent,
            "loops": config.num_loops,
            "trained_loops": trained,
            "effective_depth": layout_of(config, None).num_invocations,
        }
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    return {
        "parameters": sum(one.numel() for one in model.parameters() if id(one) not in ends),
        "recurrent_parameters": 0,
        "loops": 1,
        "trained_loops": 1.0,
        "effective_depth": config.num_hidden_layers,
    }


__all__ = ["gather"]
