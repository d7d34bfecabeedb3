"""From a teacher's files to a folder with its looped model: load, retrofit, verify, measure, save."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.families import family_of
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.slots import SlotLayout
from modeling_looped.state_map import Drop, New, Rename
from modeling_looped.version import __version__

from .output_folder import MANIFEST, check_output, staged
from .retrofit import retrofit, retrofit_config
from .special_tokens import align_special_tokens
from .teacher import TeacherFiles, find_teacher, sha256
from .verification import (
    HELD_OUT_TEXT,
    TOLERANCE,
    compare_at_one_loop,
    loss_by_loops,
    mean_loss,
    refuse_difference,
    text_windows,
)

PACKAGES = ("gguf", "huggingface_hub", "safetensors", "tokenizers", "torch", "transformers")


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
    planned = retrofit_config(stock, prelude, core, coda, loops)
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
    looped = retrofit(source, prelude, core, coda, loops)

    step(f"comparing with the teacher at num_loops=1, on {sum(map(torch.numel, windows))} tokens of {text.name}")
    comparison = compare_at_one_loop(source, looped, windows)
    report(
        f"   largest difference of two logits {comparison.max_difference:.2e} (logits reach "
        f"{comparison.max_logit:.1f}; tolerance {tolerance:.0e})"
    )
    refuse_difference(comparison, tolerance)

    step("measuring the loss on the same text")
    counts = sorted({1, 2, 4, loops})
    teacher_loss = mean_loss(source, windows)
    losses = loss_by_loops(looped, windows, counts)
    for line in loss_table(teacher_loss, losses, looped.config):
        report(f"   {line}")

    step(f"saving to {output}")
    manifest = {
        "made_by": f"modeling_looped {__version__}: retrofit",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "source": teacher.provenance(),
        "source_model": describe(source),
        "settings": {"prelude": prelude, "core": core, "coda": coda, "loops": loops, "dtype": dtype},
        "trained_loops": 1,
        "layers": layer_map(looped.config.slot_layout()),
        "weights": weight_map(source),
        "special_tokens": repairs,
        "checks": {
            "equals_the_teacher_at_num_loops_1": {
                "max_logit_difference": comparison.max_difference,
                "tolerance": tolerance,
                "max_logit": comparison.max_logit,
                "max_hidden_state_difference_by_layer": comparison.hidden_states,
                "tokens": comparison.tokens,
            },
            "loss_nats_per_token": {"teacher": teacher_loss, **{f"num_loops={k}": v for k, v in losses.items()}},
            "text": {"file": text.name, "sha256": sha256(text)},
        },
        "versions": versions(),
    }
    with staged(output) as folder:
        looped.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        manifest["sha256"] = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    step("done")
    return Retrofitted(looped, tokenizer, manifest)


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


def layer_map(layout: SlotLayout) -> list[dict[str, Any]]:
    """For each layer of the teacher (stored under the same number): its part, and the slots in which it runs."""
    slots: list[list[int]] = [[] for _ in range(layout.stored_layers)]
    for slot in range(layout.num_slots):
        slots[layout.layer_and_loop(slot)[0]].append(slot)
    parts = zip(("prelude", "core", "coda"), layout.stored_ranges(), strict=True)
    return [
        {"teacher_layer": layer, "part": part, "slots": slots[layer]} for part, layers in parts for layer in layers
    ]


def weight_map(source: PreTrainedModel) -> dict[str, Any]:
    """What became of the teacher's weights: the rules of its family that are not plain copies."""
    rules = family_of(source.config).state_map(tied=source.config.tie_word_embeddings).rules
    return {
        "renamed": {
            rule.source: rule.target for rule in rules if isinstance(rule, Rename) and rule.source != rule.target
        },
        "dropped": {rule.source: rule.because for rule in rules if isinstance(rule, Drop)},
        "new": {rule.target: rule.because for rule in rules if isinstance(rule, New)},
        "all others": "copied under the same name",
    }


def to_json(manifest: dict[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line each."""
    text = json.dumps(manifest, indent=2)
    return re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is, in numbers."""
    return {
        "model_type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": platform.python_version(), "modeling_looped": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


__all__ = ["Retrofitted", "retrofit_checkpoint"]
