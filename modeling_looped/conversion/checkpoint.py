"""From a teacher's files to a folder with its looped model: load, retrofit, verify, measure, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.modeling_looped import LoopedForCausalLM

from .companions import LICENCE_FILES, copy_files
from .manifest import manifest_json, retrofit_manifest
from .output_folder import MANIFEST, check_output, staged
from .retrofit import identity_loops, retrofit, retrofit_config
from .special_tokens import align_special_tokens
from .teacher import TeacherFiles, find_teacher, sha256
from .verification import (
    HELD_OUT_TEXT,
    TOLERANCE,
    compare_at_one_loop,
    in_full_precision,
    loss_by_loops,
    refuse_difference,
    text_windows,
)


class Retrofitted(NamedTuple):
    """What `retrofit_checkpoint` made.

    Attributes:
        model: the looped model.
        tokenizer: the teacher's.
        manifest: what was written to `looped_manifest.json`.
    """

    model: LoopedForCausalLM
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]


def retrofit_checkpoint(
    teacher: str | TeacherFiles,
    output: Path,
    *,
    prelude: int,
    core: int,
    coda: int,
    loops: int,
    identity_rank: int | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    text: Path = HELD_OUT_TEXT,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
    dtype: str = "auto",
    overwrite: bool = False,
    command: str = "",
    report: Callable[[str], object] = lambda line: None,
) -> Retrofitted:
    """Retrofit the checkpoint `teacher` and save the looped model, its tokenizer and a manifest in `output`.

    Everything that can be checked without the weights is checked before they are loaded, and nothing is written unless
    the looped model equals the teacher at one loop.

    Args:
        teacher: folder or Hub id of a stacked checkpoint, or what `find_teacher` made of it.
        output: folder to write; must not exist or be empty, unless `overwrite`.
        prelude, core, coda, loops: as in `retrofit`.
        identity_rank: loops after the first start as the identity, with low-rank weights of this rank; `None`: they
            are damped, and need no training.
        gguf_file, revision: as in `find_teacher`, of a teacher that is given by name.
        text: file of held-out text, for the comparison and the losses.
        tolerance: largest difference of two logits that counts as equal.
        device: where to compute.
        dtype: of the weights; `auto`: the teacher's.
        overwrite: whether the result of an earlier conversion in `output` may be replaced.
        command: the command line, for the manifest.
        report: is called with each line of progress.

    Raises:
        ValueError: for arguments that cannot work, with what would.
        ConversionError: if the looped model differs from the teacher at one loop; `output` is left as it was.
    """
    step = Steps(report)
    check_output(output, overwrite=overwrite)
    check_device(device)
    content = text.read_text(encoding="utf-8")

    if isinstance(teacher, str):
        step(f"looking up {teacher}")
        teacher = find_teacher(teacher, gguf_file=gguf_file, revision=revision)
    step("reading its config")
    stock = teacher.config
    further = {} if identity_rank is None else identity_loops(identity_rank, loops)
    planned = retrofit_config(stock, prelude, core, coda, loops, **further)
    report(
        f"   {stock.model_type}, {stock.num_hidden_layers} layers of width {stock.hidden_size}: {prelude} prelude + "
        f"{core} core x {loops} + {coda} coda = {planned.num_hidden_layers} slots"
    )

    step("loading the tokenizer")
    tokenizer = teacher.tokenizer()
    windows = text_windows(tokenizer, content, length=min(512, stock.max_position_embeddings))
    step("loading the teacher")
    source = teacher.model(dtype=dtype, device=device)
    repairs = align_special_tokens(source.config, source.generation_config, tokenizer)
    for line in repairs:
        report(f"   {line}")
    step("copying its layers")
    looped = retrofit(source, prelude, core, coda, loops, **further)

    step(f"comparing with the teacher at num_loops=1, on {sum(map(torch.numel, windows))} tokens of {text.name}")
    exact_source, exact = in_full_precision(source), in_full_precision(looped)
    comparison = compare_at_one_loop(exact_source, exact, windows)
    report(
        f"   largest difference of two logits {comparison.max_difference:.2e} (logits reach "
        f"{comparison.max_logit:.1f}; tolerance {tolerance:.0e})"
    )
    refuse_difference(comparison, tolerance)

    step("measuring the loss on the same text")
    losses = {1: comparison.loss} | loss_by_loops(exact, windows, sorted({2, 4, loops} - {1}))
    del exact_source, exact
    for line in loss_table(comparison.teacher_loss, losses, looped.config):
        report(f"   {line}")

    step(f"saving to {output}")
    manifest = {
        "command": command,
        "source": teacher.provenance(),
        **retrofit_manifest(source, looped),
        "settings": {"dtype": dtype, "device": device},
        "special_tokens": repairs,
        "checks": {
            "equals_teacher_at_num_loops_1": {"tolerance": tolerance, **comparison._asdict()},
            "loss_by_num_loops": losses,
            "text": {"file": text.name, "sha256": sha256(text)},
        },
    }
    write_result(output, looped, tokenizer, manifest, teacher)
    step("done")
    return Retrofitted(looped, tokenizer, manifest)


def write_result(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: dict[str, Any],
    teacher: TeacherFiles,
) -> None:
    """Write model, tokenizer, manifest and the teacher's licence to `output`, whole or not at all.

    Adds the weights' hashes to `manifest`.
    """
    with staged(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_files(teacher.folder, folder, LICENCE_FILES)  # most licences ask that they travel with what is derived
        manifest["sha256"] = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        (folder / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")


class Steps:
    """Reports each step with the time since the first."""

    def __init__(self, report: Callable[[str], object]):
        self.report = report
        self.start = time.perf_counter()

    def __call__(self, line: str) -> None:
        self.report(f"[{time.perf_counter() - self.start:6.1f} s] {line}")


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error


def loss_table(teacher_loss: float, losses: dict[int, float], config: LoopedConfig) -> list[str]:
    """The losses as lines of text, each beside the teacher's."""
    rows = [
        ("loops", "layers run", "loss", "to teacher"),
        ("teacher", config.num_stored_layers, f"{teacher_loss:.3f}", ""),
    ]
    rows += [
        (loops, config.slot_layout(loops).num_slots, f"{loss:.3f}", f"{loss - teacher_loss:+.3f}")
        for loops, loss in losses.items()
    ]
    return ["".join(f"{cell!s:>12}" for cell in row) for row in rows]


__all__ = ["Retrofitted", "retrofit_checkpoint"]
