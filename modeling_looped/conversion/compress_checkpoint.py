"""From a teacher's files to a folder with its compressed model: load, plan, compress, measure, save."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.training.data import Source

from .calibration import Calibration, calibrate
from .checkpoint import Steps, check_device, write_result
from .compress import FITTED, check_options, compress
from .layer_plan import LayerPlan
from .manifest import versions
from .merging import CALIBRATED_MERGES, InitialError
from .output_folder import check_output
from .special_tokens import align_special_tokens
from .teacher import TeacherFiles, find_teacher, sha256
from .verification import HELD_OUT_TEXT, in_full_precision, loss_by_loops, mean_loss, text_windows

#: More than any tokenizer needs.
CHARACTERS_PER_TOKEN = 12

#: Tokens that a model reads at once, at most.
WINDOW = 512

#: Endings of files with a column `text`; any other is one text.
TABLES = (".json", ".jsonl", ".parquet")

#: Makes the plan once the number of layers and the teacher's calibration are known.
Planner = Callable[[int, Calibration | None], LayerPlan]


class CompressedCheckpoint(NamedTuple):
    """What `compress_checkpoint` made: the model, the teacher's tokenizer and the manifest."""

    model: LoopedForCausalLM
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]


def compress_checkpoint(
    teacher: str | TeacherFiles,
    output: Path,
    planner: Planner,
    *,
    rank: int = 0,
    merge: str = "average",
    adapter: str = "svd",
    alignment: str = "none",
    loop_update: dict | str = "replace",
    searches: bool = True,
    calibration_text: Path | None = None,
    calibration_tokens: int = 8192,
    gguf_file: str | None = None,
    revision: str | None = None,
    text: Path = HELD_OUT_TEXT,
    device: str = "cpu",
    dtype: str = "auto",
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], object] = lambda line: None,
) -> CompressedCheckpoint:
    """Compress the checkpoint `teacher` and save the looped model, its tokenizer and a manifest in `output`.

    Args:
        teacher: folder or Hub id of a stacked checkpoint, or what `find_teacher` made of it.
        output: folder to write; must not exist or be empty, unless `overwrite`.
        planner: makes the plan.
        searches: whether `planner` reads the calibration; if it does not, none is made that nothing else needs.
        rank, merge, adapter, alignment, loop_update: as in `compress`.
        calibration_text: file of text to calibrate on, plain or with a column `text` (.jsonl, .json, .parquet);
            `None`: no calibration.
        calibration_tokens: how much of it is read.
        gguf_file, revision: as in `find_teacher`.
        text: file of held-out text for the losses; another one than the calibration's.
        device, dtype, overwrite, command, report: as in `retrofit_checkpoint`.

    Raises:
        ValueError: for arguments that cannot work, with what would.
    """
    step = Steps(report)
    check_output(output, overwrite=overwrite)
    check_device(device)
    # again in `compress`, but that comes only after the search for a plan, which may take hours
    check_options(rank, merge, adapter, alignment, loop_update, calibrated=calibration_text is not None)
    if adapter in FITTED and calibration_text is None:
        raise ValueError(f"adapter={adapter!r} needs calibration_text, on which it fits.")
    if calibration_tokens < 1:
        raise ValueError(f"calibration_tokens={calibration_tokens} must be at least 1.")
    content = text.read_text(encoding="utf-8")
    seen_text = None if calibration_text is None else beginning(calibration_text, calibration_tokens)
    if seen_text and content.startswith(seen_text):
        raise ValueError(
            f"calibration_text={str(calibration_text)!r} is the held-out text, or its beginning: its loss would be "
            "too good."
        )

    if isinstance(teacher, str):
        step(f"looking up {teacher}")
        teacher = find_teacher(teacher, gguf_file=gguf_file, revision=revision)
    layers = teacher.config.num_hidden_layers
    if seen_text is None or not searches:
        planner(layers, None).check(layers)  # what cannot work fails before the weights are loaded
    step("loading the tokenizer and the teacher")
    tokenizer = teacher.tokenizer()
    length = min(WINDOW, teacher.config.max_position_embeddings)
    held_out = text_windows(tokenizer, content, length=length)
    source = teacher.model(dtype=dtype, device=device)
    for line in align_special_tokens(source.config, source.generation_config, tokenizer):
        report(f"   {line}")

    calibration, windows = None, []
    if seen_text is not None:
        windows = text_windows(tokenizer, seen_text, length=length)
        if len(seen_text) == characters_for(calibration_tokens):  # cut: full windows, as a long text has them
            windows = list(torch.cat(windows, dim=1).split(length, dim=1))
        windows = windows[: max(1, calibration_tokens // length)]
        # fitting makes statistics of its own, of the student
        measured = () if adapter in FITTED and merge not in CALIBRATED_MERGES else None
        if searches or measured is None:
            step(f"calibrating on {sum(map(torch.numel, windows))} tokens of {Path(str(calibration_text)).name}")
            calibration = calibrate(in_full_precision(source), windows, layers=measured)
    plan = planner(layers, calibration)
    for line in plan.rows():
        report(f"   {line}")
    fitted = f" and fitting their adapters to {sum(map(torch.numel, windows))} tokens" if adapter in FITTED else ""
    step(f"merging layers{fitted}")
    model, errors = compress(
        source,
        plan,
        rank=rank,
        merge=merge,
        adapter=adapter,
        alignment=alignment,
        calibration=calibration,
        windows=[window for window in windows if window.shape[1] == windows[0].shape[1]],
        loop_update=loop_update,
        progress=lambda line: report(f"   {line}"),
    )
    for line in error_table(errors):
        report(f"   {line}")
    step(f"measuring the loss on {text.name}")
    teacher_loss = mean_loss(in_full_precision(source), held_out)
    losses = loss_by_loops(in_full_precision(model), held_out, sorted({1, plan.num_loops}))
    report(f"   teacher {teacher_loss:.3f}, {parameters(source)}")
    for loops, loss in losses.items():
        report(f"   {loops} loops {loss:.3f}, {parameters(model)}")

    step(f"saving to {output}")
    manifest = {
        "made_by": "modeling_looped.conversion.compress",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "source": teacher.provenance(),
        "versions": versions(),
        "plan": dataclasses.asdict(plan),
        "dropped_layers": plan.dropped(layers),
        "settings": {
            "rank": rank,
            "merge": merge,
            "adapter": adapter,
            "alignment": alignment,
            "loop_update": model.config.loop_update,
            "dtype": dtype,
            "device": device,
        },
        "calibration": None
        if calibration_text is None
        else {
            "file": calibration_text.name,
            "sha256": sha256(calibration_text),
            "tokens": sum(map(torch.numel, windows)),
        },
        "parameters": {"teacher": source.num_parameters(), "compressed": model.num_parameters()},
        "initial_errors": [error._asdict() for error in errors],
        "checks": {
            "teacher_loss": teacher_loss,
            "loss_by_num_loops": losses,
            "text": {"file": text.name, "sha256": sha256(text)},
        },
    }
    write_result(output, model, tokenizer, manifest, teacher)
    step("done: the model is only a start, and reads badly until it is trained")
    return CompressedCheckpoint(model, tokenizer, manifest)


def beginning(file: Path, tokens: int) -> str:
    """The beginning of a text file, or the first documents of one with a column `text`: enough for `tokens` tokens of
    any tokenizer, and of a text file for a window.

    Raises:
        ValueError: if it is a table without that column.
    """
    if file.suffix not in TABLES:
        with file.open(encoding="utf-8") as opened:
            return opened.read(characters_for(tokens))
    return "\n\n".join(Source(str(file), streaming=True).beginning(CHARACTERS_PER_TOKEN * tokens))


def characters_for(tokens: int) -> int:
    """Characters of a text that hold `tokens` tokens of any tokenizer, and a window."""
    return CHARACTERS_PER_TOKEN * max(tokens, WINDOW)


def error_table(errors: Sequence[InitialError]) -> list[str]:
    """Mean errors of the projections of each core layer, as lines of text."""
    rows = ["core layer, loop, stands for: error of the shared weights, with low rank"]
    for key in dict.fromkeys((error.core_layer, error.loop, error.teacher_layer) for error in errors):
        mine = [error for error in errors if (error.core_layer, error.loop, error.teacher_layer) == key]
        shared, adapted = (statistics.fmean(getattr(error, kind) for error in mine) for kind in ("shared", "adapted"))
        rows.append(f"{key[0]:>10} {key[1]:>5} {key[2]:>11}: {shared:.3f} {adapted:.3f}")
    return rows


def parameters(model: PreTrainedModel) -> str:
    """How many parameters a model has, as text."""
    return f"{model.num_parameters() / 1e6:.1f} M parameters"


__all__ = ["CompressedCheckpoint", "compress_checkpoint"]
