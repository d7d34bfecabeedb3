"""What pretraining and distillation share: train, evaluate, save, keep the record, and their programs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import unwrap_peft_model

from modeling_looped.accounting import count_flops
from modeling_looped.modeling_looped import LoopedPreTrainedModel

from .guard import ExplosionError
from .progress import ProgressLines
from .recipe import parse_recipe
from .record import finish, read_record, write_record


def train_and_record(
    trainer: Any,
    output: Path,
    record: dict[str, Any],
    *,
    checkpoint: str | None,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Train from `checkpoint` or from the start, and leave model, log and record in `output`.

    Args:
        trainer: a `Trainer` whose arguments are `RecipeArguments`.
        output: the run's folder.
        record: what is known of the run; written at once, so that a killed run has left it.
        checkpoint: folder to go on from; `None`: there is none.
        report: receives progress, line by line.

    Returns:
        the finished record.
    """
    if isinstance(unwrap_peft_model(trainer.model), LoopedPreTrainedModel):
        count_flops(trainer)
    progress = ProgressLines(report)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress)
    trainer.args.watch(trainer)
    earlier = read_record(output)
    write_record(trainer, output, record)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    speed: float | None = progress.tokens_per_second
    if not progress.steps:  # the run had ended: what is known of its training is what it wrote then
        known = earlier if earlier.get("status") == "finished" else {}
        metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
        metrics |= {name: value for name, value in known.get("metrics", {}).items() if name.startswith("train_")}
        speed = known.get("tokens_per_second")
        record = {**record, **{name: known[name] for name in ("recipe", "command") if name in known}}
    metrics |= trainer.evaluate() if trainer.eval_dataset else {}
    trainer.save_model()
    trainer.save_state()
    record = finish(record, trainer, metrics, speed)
    write_record(trainer, output, record)
    report(f"saved to {output}")
    return record


def run_program(program: str, given: Sequence[str], configs: tuple[type, type], train: Callable[..., object]) -> int:
    """A program that trains as its command line says, in one process or as one of many.

    Args:
        program: how it is started.
        given: the rest of the command line.
        configs: dataclasses of the recipe, the run's and the trainer's.
        train: called with an instance of each, `command` and `report`.

    Returns:
        the exit status: 1 if the recipe cannot work, or the training exploded.
    """
    try:
        run, args = parse_recipe(given, configs, program)
        leads = args.process_index == 0
        train(run, args, command=shlex.join([*program.split(), *given]), report=print if leads else lambda line: None)
        # a group that is left to the interpreter's end may abort it
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, ExplosionError, StrictDataclassError) as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 1
    return 0


__all__ = ["run_program", "train_and_record"]
