"""The record of a run in its folder, and how a folder that holds another run is told."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_looped.conversion.manifest import versions

from .data import PackedBlocks, PackedStream
from .recipe import DataConfig, changed_values

#: Record of a run in its folder.
RECORD = "run.json"

PACKAGES = ("accelerate", "datasets", "peft")


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run in the folder `output`, if there is one."""
    return get_last_checkpoint(str(output)) if output.is_dir() else None


def new_record(
    made_by: str,
    run: DataConfig,
    args: TrainingArguments,
    train: PackedBlocks | PackedStream,
    evaluations: dict[str, PackedBlocks],
    command: str,
) -> dict[str, Any]:
    """What is known of a run when its data are read: recipe, versions, place, data."""
    return {
        "made_by": made_by,
        "status": "running",
        "command": command,
        "recipe": {**changed_values(run), **changed_values(args)},
        "versions": {**versions(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "device": str(args.device),
        "processes": args.world_size,
        "data": {
            "name": run.dataset_name,
            "fingerprint": train.fingerprint,
            "tokens": train.num_tokens if isinstance(train, PackedBlocks) else None,
            "max_length": run.max_length,
        },
        "evaluation_data": {
            name: {"fingerprint": blocks.fingerprint, "tokens": blocks.num_tokens}
            for name, blocks in evaluations.items()
        },
    }


def finish(
    record: dict[str, Any], trainer: Trainer, metrics: dict[str, Any], tokens_per_second: float | None
) -> dict[str, Any]:
    """The record of a run that has ended."""
    return {
        **record,
        "status": "finished",
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # accelerate's word for how the processes share the work: NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED
        "distributed": trainer.accelerator.distributed_type.value,
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        # of the last session that trained; a resumed run has several
        "tokens_per_second": tokens_per_second,
        "metrics": metrics,
    }


def read_record(output: Path) -> dict[str, Any]:
    """What an earlier call has left in `output`; empty if there is nothing."""
    path = output / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_same_run(output: Path, record: dict[str, Any], names: Sequence[str], *, resuming: bool) -> None:
    """Raise ValueError if `output` holds another run, of which one of the entries `names` is another.

    That is one with checkpoints to go on from (`resuming`), or a finished one, whose model would be written over.
    """
    earlier = read_record(output)
    if not resuming and earlier.get("status") != "finished":
        return
    holds = "checkpoints of a run" if resuming else "the finished model of a run"
    for name in names:
        if earlier.get(name) != json.loads(json.dumps(record[name])):
            raise ValueError(
                f"output_dir={str(output)!r} holds {holds} with another `{name}`: {earlier.get(name)} "
                f"there, {record[name]} here. Choose another folder, or remove what it holds."
            )


def write_record(trainer: Trainer, output: Path, record: dict[str, Any]) -> None:
    """Write `run.json`, whole or not at all, from the process that leads."""
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / f"{RECORD}.unfinished"
        unfinished.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.replace(output / RECORD)


__all__ = ["RECORD", "check_same_run", "finish", "last_checkpoint", "new_record", "read_record", "write_record"]
