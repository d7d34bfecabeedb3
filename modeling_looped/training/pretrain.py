"""One pretraining run from its recipe to a folder: tokenizer, data, model, training, evaluation, and the record.

python -m modeling_looped train --recipe configuration/recipes/parcae_tiny.yaml --dataset_name TEXT --output_dir OUT
accelerate launch --config_file configuration/accelerate/ddp.yaml -m modeling_looped train --recipe ...
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from .data import collate_packed
from .fresh_model import build_config, check_attention, check_config, config_values, fresh_model
from .parameters import count
from .pretraining import PretrainingConfig, PretrainingRun, PretrainingTrainer, check_eval_loops
from .record import check_same_run, last_checkpoint, new_record
from .run_data import run_data, training_source
from .session import run_program, train_and_record
from .tokenizer import trained_tokenizer

#: Folder of a trained tokenizer in that of the run.
TOKENIZER = "tokenizer"


def pretrain(
    run: PretrainingRun,
    args: PretrainingConfig,
    *,
    command: str = "",
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Train a model from random weights as the recipe says, or go on where an earlier call stopped.

    `output_dir` receives the model with its tokenizer, checkpoints, `trainer_state.json` (the log, with the tokens
    seen), and `run.json`: recipe, versions, fingerprints of data and tokenizer, the model's config, parameter counts,
    tokens per second, final metrics.

    Args:
        run: model, tokenizer and text.
        args: training.
        command: how the user started it, for the record.
        report: receives progress, line by line.

    Returns:
        the record.

    Raises:
        ValueError: for a recipe that cannot work, or a folder that holds another run; says what would.
    """
    output = Path(str(args.output_dir))
    model: Any = run.model
    changes: Any = run.model_config
    values = config_values(model, changes)
    draft = build_config(values)  # what is wrong with it shall be known before anything is read
    check_config(draft, run.max_length)
    check_attention(draft, run.attn_implementation)
    check_eval_loops(draft, args)
    if not run.eval_datasets and IntervalStrategy(args.eval_strategy) != IntervalStrategy.NO:
        report(f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r} has no effect without eval_datasets")
        args.eval_strategy = IntervalStrategy.NO
    with args.main_process_first(local=False, desc="making the tokenizer"):
        tokenizer = tokenizer_of(run, args, values, draft, report)
    config = build_config(values, tokenizer)
    train, evaluations = run_data(run, args, tokenizer, report, count_bytes=True)

    checkpoint = last_checkpoint(output)
    record = new_record("modeling_looped.training.pretrain", run, args, train, evaluations, command)
    record["tokenizer"] = described(tokenizer)
    record["model"] = {**config.to_diff_dict(), "transformers_version": None}
    check_same_run(output, record, ("data", "tokenizer", "model"), resuming=checkpoint is not None)

    fresh = fresh_model(config, args.seed, run.attn_implementation)
    trainer = PretrainingTrainer(
        fresh,
        args,
        train_dataset=train,
        eval_dataset=evaluations or None,
        data_collator=collate_packed,
        processing_class=tokenizer,
    )
    record["parameters"] = count(fresh.parameters())
    report(f"   {record['parameters'] / 1e6:.2f} M parameters")
    return train_and_record(trainer, output, record, checkpoint=checkpoint, report=report)


def tokenizer_of(
    run: PretrainingRun, args: PretrainingConfig, values: dict[str, Any], draft: Any, report: Callable[[str], object]
) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names, or one that is trained, once.

    Raises:
        ValueError: if it cannot be loaded, or nothing says how many tokens to train.
    """
    if run.tokenizer_name_or_path is not None:
        return AutoTokenizer.from_pretrained(run.tokenizer_name_or_path)
    size = run.tokenizer_vocab_size or values.get("vocab_size")
    if size is None:
        raise ValueError(
            "tokenizer_vocab_size is missing: how many tokens to train; or name vocab_size in the model, or an "
            "existing tokenizer as tokenizer_name_or_path."
        )
    return trained_tokenizer(
        Path(str(args.output_dir)) / TOKENIZER,
        training_source(run, args),
        vocab_size=size,
        max_length=getattr(draft, "max_position_embeddings", run.max_length),
        max_characters=run.tokenizer_max_characters,
        report=report,
    )


def described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tells a tokenizer from another one: its size, and a hash of all that it does."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    does = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return {"tokens": len(tokenizer), "sha256": hashlib.sha256(does.encode()).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m modeling_looped train`; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_program("python -m modeling_looped train", given, (PretrainingRun, PretrainingConfig), pretrain)


__all__ = ["main", "pretrain"]
