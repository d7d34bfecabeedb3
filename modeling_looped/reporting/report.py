"""Reports: what a looped model costs, how it reads at each loop count, and how far it is from its teacher.

Written as `report.md` with pictures, and as `report.json` with every figure, from which model cards are made.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.accounting import checked_length, looped_config, parameter_counts
from modeling_looped.conversion.manifest import versions
from modeling_looped.conversion.verification import mean_loss
from modeling_looped.slots import checked_num_loops

from .costs import Costs, costs, costs_table, markdown_table
from .distances import BoundaryDistance, LayerError, layer_errors, loop_distances
from .layer_map import LayerMap
from .pictures import distances_picture, errors_picture, loops_picture, loss_picture
from .run_log import RunLog

REPORT, FIGURES = "report.md", "report.json"


class Report(NamedTuple):
    """The figures of a report.

    Attributes:
        parameters: stored ones by part.
        context: tokens of the context that costs are given for.
        costs: by loop count.
        losses: nats per token, by text, by loop count.
        teacher_losses: the same of the teacher, by text.
        distances: at loop boundaries; empty without a teacher.
        errors: of each layer's runs, given the teacher's input; empty without a teacher.
        tokens: number of tokens read, by text.
        run: the training run; `None`: there was none.
    """

    parameters: dict[str, int]
    context: int
    costs: list[Costs]
    losses: dict[str, dict[int, float]]
    teacher_losses: dict[str, float]
    distances: list[BoundaryDistance]
    errors: list[LayerError]
    tokens: dict[str, int]
    run: RunLog | None


def measure(
    model: PreTrainedModel,
    texts: Mapping[str, Sequence[Tensor]],
    *,
    loops: Sequence[int],
    context: int = 1024,
    teacher: PreTrainedModel | None = None,
    layers: LayerMap | None = None,
    run: RunLog | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> Report:
    """Measure everything that a report shows.

    Args:
        model: a looped causal model, in evaluation mode.
        texts: name -> windows of token ids [1, S] that training has not seen.
        loops: loop counts to measure.
        context: tokens of the context that costs are given for.
        teacher: the checkpoint that the model was made from; goes with `layers`.
        layers: which teacher layers the model's stand for. Distances are taken at the config's loop count, on the
            first text.
        run: log of the training run.
        progress: is called with a line for each thing measured, and the time that it took.

    Raises:
        ValueError: for no text, no loop count or one that is not an integer of at least 1, and for a teacher without
            `layers`.
    """
    if not texts or not all(texts.values()):
        raise ValueError(f"texts={sorted(texts)} must hold at least one text, each with at least one window.")
    counts = sorted({checked_num_loops(num_loops) for num_loops in loops})
    if not counts:
        raise ValueError("loops is empty: name at least one loop count.")
    if (teacher is None) != (layers is None):
        raise ValueError("teacher and layers go together: distances need both.")
    checked_length(context, "context")
    if model.training:
        raise ValueError("the model is in training mode, where it may drop or draw: call model.eval() first.")

    def timed(what: str, work: Callable[[], Any], shown: Callable[[Any], str] = lambda result: "") -> Any:
        start = time.perf_counter()
        result = work()
        progress(f"{what}{shown(result)} ({time.perf_counter() - start:.1f} s)")
        return result

    losses, teacher_losses = {}, {}
    rows = [
        timed(f"costs at {num_loops} loops", partial(costs, model, num_loops, sequence_length=context))
        for num_loops in counts
    ]
    for name, windows in texts.items():
        losses[name] = {
            num_loops: timed(
                f"loss on {name} at {num_loops} loops: ",
                partial(mean_loss, model, windows, num_loops=num_loops),
                "{:.3f}".format,
            )
            for num_loops in counts
        }
        if teacher is not None:
            work = partial(mean_loss, teacher, windows)
            teacher_losses[name] = timed(f"loss of the teacher on {name}: ", work, "{:.3f}".format)
    distances, errors = [], []
    if teacher is not None and layers is not None:
        pair = (model, teacher, layers, next(iter(texts.values())))
        distances = timed("distance to the teacher at loop boundaries", partial(loop_distances, *pair))
        errors = timed("error of each layer, given the teacher's input", partial(layer_errors, *pair))
    return Report(
        parameter_counts(model).parts,
        context,
        rows,
        losses,
        teacher_losses,
        distances,
        errors,
        {name: sum(window.numel() for window in windows) for name, windows in texts.items()},
        run,
    )


def write_report(
    report: Report,
    model: PreTrainedModel,
    output: Path,
    *,
    name: str,
    command: str = "",
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.md`, its pictures and `report.json` to `output`, which is made if missing.

    Args:
        report: what `measure` gave.
        model: the model it was measured on.
        output: folder.
        name: what the model is called.
        command: the command line, to be repeated.
        source: what the figures were measured on, such as hashes of the texts, for `report.json`.

    Returns:
        the path of `report.md`.
    """
    output.mkdir(parents=True, exist_ok=True)
    machine = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    config = looped_config(model)
    figures = {
        "name": name,
        "command": command,
        "machine": machine,
        "model": {
            "num_loops": config.num_loops,
            "max_trained_loops": config.max_trained_loops,
            "dtype": machine["dtype"],
        },
        "source": dict(source or {}),
        **report._asdict(),
        "costs": [row._asdict() for row in report.costs],
        "distances": [row._asdict() for row in report.distances],
        "errors": [row._asdict() for row in report.errors],
        "run": None
        if report.run is None
        else {**report.run._asdict(), "curves": {key: curve._asdict() for key, curve in report.run.curves.items()}},
    }
    sections = [f"# Report: {name}", body(report, output)]
    measured = f"Measured {machine['date']}, {machine['device']}, {machine['threads']} threads, {machine['dtype']}"
    sections.append(measured + (f":\n\n```bash\n{command}\n```" if command else "."))
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path = output / REPORT
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def of_training(run: RunLog) -> str:
    """What a training loss is, where it is no cross-entropy."""
    return "; of training: what the distillation minimised" if run.settings.get("teacher") else ""


def body(report: Report, output: Path) -> str:
    """The sections of the report in Markdown; draws their pictures into `output`."""
    sections = []
    if report.run is not None:
        loss_picture(output / "loss_by_tokens.png", report.run)
        last = ", ".join(f"{name} {curve.y[-1]:.3f}" for name, curve in report.run.curves.items())
        sections.append(
            f"## Training\n\n{report.run.steps} steps, {report.run.total_flos:.3g} FLOPs as the Trainer counted them. "
            f"Last losses: {last} (nats per token{of_training(report.run)}).\n\n![loss](loss_by_tokens.png)"
        )
    loops_picture(output / "loss_by_loops.png", report.losses, report.teacher_losses)
    sections.append(
        f"## Loss by loop count\n\nNats per token.\n\n{loss_table(report)}\n\n![loss by loops](loss_by_loops.png)"
    )
    if report.distances:
        distances_picture(output / "distance_to_teacher.png", report.distances)
        rows = [
            (
                "before the first loop" if row.layer is None else f"loop {row.loop + 1}, layer {row.layer}",
                "embeddings" if row.teacher_layer < 0 else row.teacher_layer,
                f"{row.relative_l2:.4f}",
                f"{row.cosine:.4f}",
            )
            for row in report.distances
        ]
        sections.append(
            "## Distance to the teacher\n\nThe state at each loop's end against the teacher's hidden state after the "
            "layer that it stands for.\n\n"
            + markdown_table(("state", "after teacher layer", "relative L2", "cosine"), rows)
            + "\n\n![distance](distance_to_teacher.png)"
        )
    if report.errors:
        errors_picture(output / "layer_errors.png", report.errors)
        rows = [
            (row.layer, row.loop + 1, row.teacher_layer, f"{row.of_output:.4f}", f"{row.of_update:.4f}")
            for row in report.errors
        ]
        sections.append(
            "## Error of each layer\n\nThe output of each run of a layer, given what enters the teacher's layer that "
            "it stands for, against that layer's output: relative to the output, and to what the layer adds (1 is no "
            "better than a layer that does nothing).\n\n"
            + markdown_table(("layer", "loop", "teacher layer", "of the output", "of the update"), rows)
            + "\n\n![errors](layer_errors.png)"
        )
    parts = markdown_table(
        ("part", "stored parameters"), [(part, f"{count:,}") for part, count in report.parameters.items() if count]
    )
    sections.append(f"## Costs by loop count\n\nWith a context of {report.context} tokens.")
    sections += [costs_table(report.costs), parts]
    return "\n\n".join(sections)


def loss_table(report: Report) -> str:
    """Losses by text and loop count in Markdown."""
    header = ["text", "tokens", *(f"num_loops={row.num_loops}" for row in report.costs)]
    rows = [
        [name, report.tokens[name], *(f"{loss:.3f}" for loss in by_loops.values())]
        for name, by_loops in report.losses.items()
    ]
    if report.teacher_losses:
        header.append("teacher")
        rows = [[*row, f"{report.teacher_losses[str(row[0])]:.3f}"] for row in rows]
    return markdown_table(header, rows)


__all__ = ["FIGURES", "REPORT", "Report", "measure", "write_report"]
