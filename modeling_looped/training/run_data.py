"""The text of a run as blocks: what its recipe says to train on and to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from .data import PackedBlocks, PackedStream, Source, packed_blocks
from .recipe import DataConfig


def training_source(run: DataConfig, args: TrainingArguments) -> Source:
    """Where the text to train on comes from, in the order of the run's seed."""
    return Source(
        str(run.dataset_name),
        run.dataset_config,
        run.dataset_split,
        run.dataset_text_field,
        run.dataset_streaming,
        args.data_seed if args.data_seed is not None else args.seed,
    )


def training_data(run: DataConfig, args: TrainingArguments, tokenizer: Any) -> PackedBlocks | PackedStream:
    """The blocks to train on; for a stream, the number of steps is set from the number of tokens.

    Raises:
        ValueError: for a stream without an end.
    """
    source = training_source(run, args)
    if not run.dataset_streaming:
        return packed_blocks(source, tokenizer, run.max_length, run.max_train_tokens)
    if args.max_steps <= 0:
        if run.max_train_tokens is None:
            raise ValueError("dataset_streaming=True needs max_train_tokens or max_steps: a stream has no known end.")
        per_step = run.max_length * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = run.max_train_tokens // per_step
        if args.max_steps < 1:
            raise ValueError(f"max_train_tokens={run.max_train_tokens} is less than one step of {per_step} tokens.")
    return PackedStream(source, tokenizer, run.max_length)


def run_data(
    run: DataConfig,
    args: TrainingArguments,
    tokenizer: Any,
    report: Callable[[str], object],
    *,
    count_bytes: bool = False,
) -> tuple[PackedBlocks | PackedStream, dict[str, PackedBlocks]]:
    """What to train on, and the evaluation sets by name; read by one process of a machine before the others.

    Args:
        run, args: the recipe.
        tokenizer: makes tokens of the text.
        report: receives what is read.
        count_bytes: whether the evaluation sets know the bytes of their text.

    Raises:
        ValueError: if text cannot be read, or does not fill a block.
    """
    evaluated: Any = run.eval_datasets or {}
    with args.main_process_first(desc="reading the data"):
        report(f"reading {run.dataset_name}")
        train = training_data(run, args, tokenizer)
        evaluations = {
            name: packed_blocks(
                Source.of(place, text_field=run.dataset_text_field),
                tokenizer,
                run.max_length,
                run.max_eval_tokens,
                count_bytes=count_bytes,
            )
            for name, place in evaluated.items()
        }
    described = f"{train.num_tokens:,} tokens" if isinstance(train, PackedBlocks) else "a stream"
    report(f"   {described} in blocks of {run.max_length}")
    return train, evaluations


__all__ = ["run_data", "training_data", "training_source"]
