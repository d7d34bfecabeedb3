"""The part of a run that pretraining and distillation share: train, evaluate, save, and keep the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import unwrap_peft_model

from modeling_looped.accounting import count_flops
from modeling_looped.modeling_looped import LoopedPreTrainedModel

from .progress import ProgressLines
from .record import finish, write_record


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
    write_record(trainer, output, record)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if trainer.eval_dataset else {}
    trainer.save_model()
    trainer.save_state()
    record = finish(record, trainer, {**result.metrics, **metrics}, progress.tokens_per_second)
    write_record(trainer, output, record)
    report(f"saved to {output}")
    return record


def leave_process_group() -> None:
    """What a program of many processes does at its end: a group that is left to the interpreter's may abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


__all__ = ["leave_process_group", "train_and_record"]
