"""Training stability of looped models by injection, rate and loop count, and what many more loops do at inference.

    python benchmarks/stability.py --text FILE [--quick] [--output benchmarks/results/stability.json]

Small models are trained from scratch on the bytes of a text: the same initialisation scale, batches and loop counts
for every injection, one run per injection, loop count and learning rate. As where Parcae (arXiv 2604.12946) compares
injections, blocks are pre-norm, nothing normalises the state between loops, the depth of each step is drawn from a
Poisson distribution, and gradients are clipped to norm 1; the rate is constant after a short warm-up. A run

- diverges if a loss is not finite, or the mean of its last WINDOW losses is more than --margin nats above the lowest
  mean of WINDOW losses before;
- collapses if it ends with nothing learned: that mean is not below the entropy of single bytes, which counting gives;
- spikes each time that its loss rises more than --spike nats above the median of the WINDOW losses before.

Then each trained model reads held-out text with 1, 2, 4, ... 256 loops. `drift` is the most that the loss is above
that at the trained loop count from there on; `growth` is the state's root mean square after 256 loops over that there.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_runs import Settings, add_run_options, described, finite, loss_of, run_all, training_steps, write_json
from torch import Tensor

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.reporting.costs import markdown_table
from modeling_looped.training.data import Source

INJECTIONS = ("diagonal", "add", "concat")
#: Losses of which a mean or a median is taken.
WINDOW = 50
BYTES = 256
DEPTHS = tuple(2**n for n in range(9))
#: One byte in so many is held out, at the end of the text.
HELD_OUT = 20


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="text, JSON or parquet file to train on")
    add("--bytes", type=int, default=4_000_000, help="of the text (%(default)s)")
    add("--injections", nargs="+", default=list(INJECTIONS))
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    add("--loops", type=int, nargs="+", default=[4, 8])
    add("--steps", type=int, default=700)
    add("--width", type=int, default=64)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=64, help="bytes that a model reads at a time (%(default)s)")
    add("--warmup", type=int, default=20, help="steps in which the rate grows (%(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (%(default)s)")
    add("--margin", type=float, default=0.3, help="nats above its best that make a run diverged (%(default)s)")
    add("--spike", type=float, default=0.5, help="nats above the running median that make a spike (%(default)s)")
    add_run_options(parser, "build/stability")
    options = parser.parse_args()
    if options.quick:
        options.rates, options.loops, options.steps, options.bytes = [3e-3, 3e-2], [4], 2 * WINDOW + 10, 200_000
        options.work /= "quick"
    return options


def model_of(settings: Settings) -> LoopedForCausalLM:
    """A model of 1 + 2 x loops + 1 layers, initialised with the standard deviation sqrt(2 / 5 D) (Takase et al.)."""
    torch.manual_seed(settings["seed"])
    width = settings["width"]
    return LoopedForCausalLM(
        LoopedConfig(
            vocab_size=BYTES,
            hidden_size=width,
            intermediate_size=3 * width,
            num_attention_heads=width // 16,
            num_prelude_layers=1,
            num_core_layers=2,
            num_coda_layers=1,
            num_loops=settings["loops"],
            depth_sampling={"type": "poisson", "max_loops": 3 * settings["loops"]},
            injection=settings["injection"],
            initializer_range=math.sqrt(2 / (5 * width)),
            max_position_embeddings=settings["length"],
        )
    )


def run(settings: Settings) -> Settings:
    """Train one model and look at it."""
    text = torch.from_numpy(np.fromfile(settings["text"], dtype=np.uint8)).long()
    held_out = len(text) // HELD_OUT
    batches = batches_of(text[:-held_out], settings)
    model = model_of(settings)
    names = ("steps", "learning_rate", "warmup", "clip")
    steps = list(training_steps(model, batches, **{name: settings[name] for name in names}))
    losses = [step.loss for step in steps]
    norms = [step.gradient_norm for step in steps[WINDOW:]]
    counted = {name: settings[name] for name in ("margin", "spike")}
    return {
        **verdict(losses, entropy=entropy(text), **counted),
        "largest_gradient_norm": finite(max(norms, default=math.nan)),
        "median_gradient_norm": finite(statistics.median(norms)) if norms else None,
        "losses": [finite(round(loss, 4)) for loss in losses],
        "inference": None if not math.isfinite(losses[-1]) else by_depth(model, text[-held_out:], settings),
    }


def batches_of(text: Tensor, settings: Settings) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Step -> random windows of the text and the bytes that follow each byte; the same for every run."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(1_000_003 * settings["seed"] + step)
        starts = torch.randint(len(text) - settings["length"], (settings["batch"], 1), generator=random)
        windows = text[starts + torch.arange(settings["length"] + 1)]
        return windows[:, :-1], windows[:, 1:]

    return batch


def entropy(text: Tensor) -> float:
    """Nats per byte of a text, of which nothing is known but how often each byte occurs."""
    shares = torch.bincount(text, minlength=BYTES).double() / len(text)
    return torch.special.entr(shares).sum().item()


def verdict(losses: Sequence[float], *, entropy: float, margin: float, spike: float) -> dict[str, Any]:
    """Whether a run diverged or collapsed, how often it spiked, and its final loss, from the losses of its steps."""
    means = [statistics.fmean(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1)]
    unfinished = not all(map(math.isfinite, losses))
    diverged = unfinished or (bool(means) and means[-1] > min(means) + margin)
    spikes, above = 0, False
    for step in range(WINDOW, len(losses)):
        was_above, above = above, not losses[step] <= statistics.median(losses[step - WINDOW : step]) + spike
        spikes += above and not was_above
    return {
        "diverged": diverged,
        "finite": not unfinished,
        "collapsed": not unfinished and bool(means) and means[-1] >= entropy,
        "spikes": spikes,
        "final_loss": None if unfinished or not means else means[-1],
        "best_loss": finite(min(means)) if means else None,
    }


@torch.no_grad()
def by_depth(model: LoopedForCausalLM, text: Tensor, settings: Settings) -> Settings:
    """Loss and root mean square of the last state on held-out text, by the number of loops."""
    model.eval()
    model.config.max_trained_loops = None  # that these are more loops than it was trained with is the point
    ids, targets = batches_of(text, {**settings, "batch": 16})(0)
    trained, last = settings["loops"], DEPTHS[-1]
    depths = sorted({*DEPTHS, trained})
    loss, size = {}, {}
    for depth in depths:
        loss[depth] = finite(loss_of(model, ids, targets, num_loops=depth).item())
    states = model(ids, num_loops=max(depths), use_cache=False, output_loop_hidden_states=True).loop_hidden_states
    for depth in depths:
        size[depth] = finite(states[depth].double().square().mean().sqrt().item())
    beyond = [loss[depth] for depth in depths if depth >= trained]
    is_finite = None not in (*beyond, *size.values())
    return {
        "loss": loss,
        "state_rms": size,
        "finite": is_finite,
        "drift": max(beyond) - loss[trained] if is_finite else None,
        "growth": size[last] / size[trained] if is_finite else None,
    }


def table(results: dict[str, Settings], jobs: dict[str, Settings]) -> str:
    """Two Markdown tables: counts by injection and loop count, and every run."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, job in jobs.items():
        groups.setdefault((job["injection"], job["loops"]), []).append(name)
    counts = []
    for (injection, loops), names in groups.items():
        runs = [results[name] for name in names]
        losses = [done["final_loss"] for done in runs if done["final_loss"] is not None]
        trained = [done["inference"] for done in runs if done["inference"] and not done["diverged"]]
        inside = [seen for seen in trained if seen["finite"]]
        counts.append(
            (
                injection,
                loops,
                f"{sum(done['diverged'] for done in runs)} of {len(runs)}",
                sum(done["collapsed"] for done in runs),
                sum(done["spikes"] for done in runs),
                sum(done["spikes"] > 0 for done in runs),
                shown(min(losses, default=None)),
                f"{len(inside)} of {len(trained)}",
                shown(max((seen["drift"] for seen in inside), default=None)),
                shown(max((seen["growth"] for seen in inside), default=None), 1),
            )
        )
    header = ["injection", "loops", "diverged", "collapsed", "spikes", "runs with spikes", "best final loss"]
    header += ["finite at 256 loops", "largest drift", "largest growth"]
    each = []
    for name, job in jobs.items():
        done, seen = results[name], results[name]["inference"] or {"loss": {}}
        failure = [name for name in ("diverged", "collapsed") if done[name]]
        mark = " ".join([*failure, *([str(done["spikes"])] if done["spikes"] else [])])
        curve = [shown(seen["loss"].get(str(depth))) for depth in DEPTHS]
        setting = (job["injection"], job["loops"], f"{job['learning_rate']:g}")
        each.append((*setting, shown(done["final_loss"]), mark, *curve))
    head = ["injection", "loops", "rate", "final loss", "failures and spikes", *(f"at {depth}" for depth in DEPTHS)]
    return "\n\n".join((markdown_table(header, counts), markdown_table(head, each)))


def shown(value: float | None, digits: int = 3) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Train all, then print the tables."""
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    text = stored_text(Source(str(options.text)), options.work, options.bytes)
    shared = ("steps", "width", "batch", "length", "warmup", "clip", "margin", "spike")
    jobs = {
        f"{injection}-{loops}-{rate:g}": {
            **{name: getattr(options, name) for name in shared},
            "injection": injection,
            "loops": loops,
            "learning_rate": rate,
            "seed": 0,
            "text": str(text),
        }
        for loops in options.loops
        for rate in options.rates
        for injection in options.injections
    }
    results = run_all(run, jobs, options.work, options.workers)
    print(table(results, jobs))
    if options.output:
        runs = [{**jobs[name], **result} for name, result in results.items()]
        for done in runs:
            done["losses"] = done["losses"][::10]
        write_json(options.output, {**described(options), "runs": runs})


def stored_text(source: Source, work: Path, size: int) -> Path:
    """The first `size` bytes of the documents, as a file in `work` that is named by them: another text, another file.

    So jobs on it, which hold its name in their settings, are not taken for those on another one.
    """
    parts, length = [], 0
    for document in source.documents():
        parts.append(document.encode() + b"\n")
        length += len(parts[-1])
        if length >= size:
            break
    if length < size:
        raise ValueError(f"--bytes={size}: {source.path!r} has only {length}.")
    text = b"".join(parts)[:size]
    path = work / f"text-{hashlib.sha256(text).hexdigest()[:12]}.bytes"
    path.write_bytes(text)
    return path


if __name__ == "__main__":
    main()
