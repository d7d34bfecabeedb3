"""One distillation run from its recipe to a folder: data, models, training, evaluation, and the record of all that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.conversion.companions import TOKENIZER_FILES
from modeling_looped.conversion.teacher import TeacherFiles, find_teacher

from .config import DistillationConfig
from .data import PackedBlocks, PackedStream, collate_packed
from .fresh_model import check_attention
from .layer_map import map_of_folder
from .parameters import count
from .recipe import RunConfig, check_names
from .record import RECORD, check_same_run, last_checkpoint, new_record
from .run_data import run_data, training_source
from .session import train_and_record
from .targets import TargetBlocks, compute_targets
from .trainer import DistillationTrainer

#: What a run minimises, which cannot change while it goes on.
OBJECTIVE = (
    "stage",
    "divergence",
    "beta",
    "temperature",
    "cross_entropy_weight",
    "hidden_weight",
    "hidden_loss",
    "hidden_granularity",
    "layer_map",
    "trainable",
)


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
    source = find_teacher(run.student, gguf_file=run.student_gguf_file, field="student")
    check_attention(source.config, run.student_attn_implementation, "student_attn_implementation")
    teacher_files = teacher_of(args)
    tokenizer = source.tokenizer()
    if teacher_files is not None:
        check_same_tokens(tokenizer, teacher_files)
    train, evaluations = run_data(run, args, tokenizer, report)
    checkpoint = last_checkpoint(output)
    record = new_record("modeling_looped.training.run", run, args, train, evaluations, command)
    record["teacher"] = None if teacher_files is None else teacher_files.provenance()
    record["start"] = {"sha256": source.provenance()["sha256"], "config": run.student_config}
    record["objective"] = {name: getattr(args, name) for name in OBJECTIVE}
    check_same_run(output, record, ("data", "teacher", "start", "objective"), resuming=checkpoint is not None)

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
    return train_and_record(trainer, output, record, checkpoint=checkpoint, report=report)


def check_same_tokens(tokenizer: Any, files: TeacherFiles) -> None:
    """Raise ValueError for a teacher whose tokenizer gives a token another id: its distributions would be of others.

    A teacher without a tokenizer is taken at its word, and tokens that only one of the two has may be padding.
    """
    if files.gguf_file is None and not any((files.folder / name).is_file() for name in TOKENIZER_FILES):
        return
    ours, theirs = tokenizer.get_vocab(), files.tokenizer().get_vocab()
    unlike = next((token for token, number in ours.items() if theirs.get(token, number) != number), None)
    if unlike is not None:
        raise ValueError(
            f"teacher_model_name_or_path={files.name!r} has another tokenizer than the student: {unlike!r} is token "
            f"{theirs[unlike]} there and {ours[unlike]} here. Distillation compares distributions token by token."
        )


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
    attention: Any = {"attn_implementation": run.student_attn_implementation}
    if source.gguf_file is None:
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **attention, **changes)
    loaded = source.model(dtype=dtype)
    values = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    config = type(loaded.config).from_dict({**values, **changes})
    # anew: what was loaded from a GGUF file refuses to be saved
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
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


__all__ = ["RECORD", "distill", "training_source"]
