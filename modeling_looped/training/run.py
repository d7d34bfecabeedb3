"""One distillation run from its recipe to a folder: data, models, training, evaluation, and the record of all that."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from modeling_looped.conversion.manifest import versions
from modeling_looped.conversion.teacher import TeacherFiles, find_teacher

from .config import DistillationConfig
from .data import PackedBlocks, PackedStream, Source, collate_packed, packed_blocks
from .layer_map import map_of_folder
from .parameters import count
from .progress import ProgressLines
from .recipe import RunConfig, changed_values, check_names
from .targets import TargetBlocks, compute_targets
from .trainer import DistillationTrainer

#: Record of a run in its folder.
RECORD = "run.json"

PACKAGES = ("accelerate", "datasets", "peft")


def distill(
    run: RunConfig,
    args: DistillationConfig,
    *,
    command: str = "",
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Distil as the recipe says, or go on where an earlier call in the same `output_dir` stopped.

    `output_dir` receives the healed model with its tokenizer, checkpoints, `trainer_state.json` (the log, with the
    tokens seen), and `run.json`: recipe, versions, fingerprint of the data, teacher, parameter counts, tokens per
    second, final metrics.

    Args:
        run: student and data; `student` is a folder or a Hub id by now.
        args: teacher, loss and training.
        command: how the user started it, for the record.
        report: receives progress, line by line.

    Returns:
        the record.

    Raises:
        ValueError: for a recipe that cannot work, or a folder that holds another run; says what would.
    """
    if not isinstance(run.student, str):
        raise ValueError(f"student={run.student} must be a folder or a Hub id here.")
    output = Path(str(args.output_dir))
    evaluated: Any = run.eval_datasets or {}
    source = find_teacher(run.student, gguf_file=run.student_gguf_file, field="student")
    teacher_files = teacher_of(args)
    tokenizer = source.tokenizer()
    with args.main_process_first(desc="reading the data"):
        report(f"reading {run.dataset_name}")
        train = training_data(run, args, tokenizer)
        evaluations = {
            name: packed_blocks(
                Source.of(place, text_field=run.dataset_text_field), tokenizer, run.max_length, run.max_eval_tokens
            )
            for name, place in evaluated.items()
        }
    described = f"{train.num_tokens:,} tokens" if isinstance(train, PackedBlocks) else "a stream"
    report(f"   {described} in blocks of {run.max_length}")
    checkpoint = get_last_checkpoint(output) if output.is_dir() else None
    record = {
        "made_by": "modeling_looped.training.run",
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
        "teacher": None if teacher_files is None else teacher_files.provenance(),
    }
    check_same_run(output, record, resuming=checkpoint is not None)

    if run.teacher_targets is not None:
        with args.main_process_first(desc="computing the teacher's distributions"):
            folder = Path(run.teacher_targets)
            train = with_targets(run, args, train, folder / "train", args.temperature, teacher_files, report)
            # what is reported as KL is that of temperature 1
            evaluations = {
                name: with_targets(run, args, blocks, folder / f"eval_{name}", 1.0, teacher_files, report)
                for name, blocks in evaluations.items()
            }
        if not args.compares_hidden_states:
            args.teacher_model_name_or_path = None  # nothing is asked of the teacher any more
    report(f"loading the student {run.student}")
    student = load_student(source, run)
    if args.compares_hidden_states and teacher_files is not None and args.layer_map is None:
        args.layer_map = map_of_folder(source.folder, teacher_files.config.num_hidden_layers)
    trainer = DistillationTrainer(
        student,
        None,
        args,
        train_dataset=train,
        eval_dataset=evaluations or None,
        data_collator=collate_packed,
        processing_class=tokenizer,
    )
    teacher = trainer.teacher
    record["parameters"] = {
        "student": student.num_parameters(),
        "trainable": count(p for p in student.parameters() if p.requires_grad),
        "teacher": None if teacher is None else count(teacher.parameters()),
    }
    record["student"] = {"name": run.student, "config": student.config.to_diff_dict()}
    for line in ("student", "trainable", "teacher"):
        number = record["parameters"][line]
        report(f"   {line}: {'-' if number is None else f'{number / 1e6:.2f} M'} parameters")
    progress = ProgressLines(report)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress)
    write_record(trainer, output, record)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if evaluations else {}
    trainer.save_model()
    trainer.save_state()
    record |= {
        "status": "finished",
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        # of the last session; a resumed run has several
        "tokens_per_second": progress.tokens_per_second,
        "metrics": {**result.metrics, **metrics},
    }
    write_record(trainer, output, record)
    report(f"saved to {output}")
    return record


def training_source(run: RunConfig, args: DistillationConfig) -> Source:
    """Where the text to train on comes from, in the order of the run's seed."""
    return Source(
        str(run.dataset_name),
        run.dataset_config,
        run.dataset_split,
        run.dataset_text_field,
        run.dataset_streaming,
        args.data_seed if args.data_seed is not None else args.seed,
    )


def training_data(run: RunConfig, args: DistillationConfig, tokenizer: Any) -> PackedBlocks | PackedStream:
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


def with_targets(
    run: RunConfig,
    args: DistillationConfig,
    blocks: PackedBlocks | PackedStream,
    folder: Path,
    temperature: float,
    files: TeacherFiles | None,
    report: Callable[[str], object],
) -> TargetBlocks:
    """The blocks with the teacher's distributions, which are computed as far as they are not there yet."""
    if files is None or not isinstance(blocks, PackedBlocks):
        raise ValueError(f"teacher_targets={run.teacher_targets!r} need teacher_model_name_or_path, and no stream.")
    given: Any = args.teacher_model_init_kwargs or {}
    dtype = given.get("dtype", "auto")
    same: dict[str, Any] = {
        "teacher": {"sha256": files.provenance()["sha256"], "dtype": dtype},
        "top_k": run.top_k,
        "temperature": temperature,
    }
    compute_targets(
        lambda: files.model(dtype=dtype, device=args.device),
        blocks,
        folder,
        batch_size=args.per_device_eval_batch_size,
        report=report,
        **same,
    )
    return TargetBlocks(blocks, folder, **same)


def load_student(source: TeacherFiles, run: RunConfig) -> PreTrainedModel:
    """The student with its changed config, in the dtype that it trains in."""
    dtype = getattr(torch, run.student_dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"student_dtype={run.student_dtype!r} must be one of: float32, bfloat16, float16.")
    changes: Any = run.student_config or {}
    check_names(changes, source.config.to_dict(), "student_config")
    if source.gguf_file is None:
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **changes)
    loaded = source.model(dtype=dtype)
    values = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    config = type(loaded.config).from_dict({**values, **changes})
    # anew: what was loaded from a GGUF file refuses to be saved
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    return model


def teacher_of(args: DistillationConfig) -> TeacherFiles | None:
    """The files of the teacher that `args` name."""
    if args.teacher_model_name_or_path is None:
        return None
    return find_teacher(
        args.teacher_model_name_or_path,
        gguf_file=args.teacher_gguf_file,
        revision=args.teacher_model_revision,
        field="teacher_model_name_or_path",
    )


def check_same_run(output: Path, record: dict[str, Any], *, resuming: bool) -> None:
    """Raise ValueError if `output` holds checkpoints of a run with other data or another teacher."""
    path = output / RECORD
    if not resuming:
        return
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("data", "teacher"):
        if earlier.get(name) != json.loads(json.dumps(record[name])):
            raise ValueError(
                f"output_dir={str(output)!r} holds checkpoints of a run with another `{name}`: {earlier.get(name)} "
                f"there, {record[name]} here. Choose another folder, or remove them."
            )


def write_record(trainer: DistillationTrainer, output: Path, record: dict[str, Any]) -> None:
    """Write `run.json`, whole or not at all, from the process that leads."""
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / f"{RECORD}.unfinished"
        unfinished.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.replace(output / RECORD)


__all__ = ["RECORD", "distill"]
