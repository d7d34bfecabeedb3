"""Many short trainings for one benchmark: each a file once it is done, several at a time, one thread each.

A benchmark that is stopped and started again reads what is done and goes on with the next run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

#: What one run is told, and what it answers: both JSON.
Settings = dict[str, Any]


class Step(NamedTuple):
    """One optimiser step: its loss, and the norm of the gradient before it was clipped."""

    loss: float
    gradient_norm: float


def add_run_options(parser: argparse.ArgumentParser, work: str) -> None:
    """The options that every benchmark of short trainings has."""
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute, whose figures mean nothing")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of finished runs (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")


def run_all(
    run: Callable[[Settings], Settings], jobs: dict[str, Settings], work: Path, workers: int
) -> dict[str, Settings]:
    """What `run` answers to every job.

    Args:
        run: a function of a module, which other processes can import.
        jobs: name -> settings.
        work: folder with a file per finished job, which is read and not run again.
        workers: jobs at a time.

    Raises:
        ValueError: if a file there is of a job with other settings.
    """
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Settings] = {}
    for name, settings in jobs.items():
        if (path := work / f"{name}.json").exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            if done["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(f"{path} was run with other settings, {done['settings']}: choose another --work.")
            results[name] = done["result"]
    waiting = [name for name in jobs if name not in results]
    print(f"{len(results)} of {len(jobs)} runs are done in {work}", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
        futures = {pool.submit(timed, run, jobs[name]): name for name in waiting}
        try:
            for future in as_completed(futures):
                name = futures[future]
                results[name] = json.loads(json.dumps(future.result()))  # the same as read from a file
                write_json(work / f"{name}.json", {"settings": jobs[name], "result": results[name]})
                print(f"{len(results)}/{len(jobs)} {name}: {results[name]['seconds']:.0f} s", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else what still waits would run before the error shows
            raise
    return {name: results[name] for name in jobs}


def begin_worker() -> None:
    """One thread; and the process ends with the benchmark, however that ends."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent's end."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def timed(run: Callable[[Settings], Settings], settings: Settings) -> Settings:
    """The answer of a run, and how long it took."""
    start = time.perf_counter()
    return {**run(settings), "seconds": time.perf_counter() - start}


def training_steps(
    model: PreTrainedModel,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 0,
    decay: bool = False,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float = 1.0,
) -> Iterator[Step]:
    """Train with AdamW without weight decay, yielding after each step; ends where a loss is not finite.

    Args:
        model: a causal language model; it is left in training mode.
        batch: step (from 0) -> token ids and targets [B, S], the latter -100 where there is none.
        steps: at most so many.
        learning_rate: after warm-up.
        warmup: steps in which it grows linearly.
        decay: whether it then falls linearly to a tenth at the end.
        betas: of AdamW.
        clip: largest gradient norm.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.0)
    model.train()
    for step in range(steps):
        grown = min(1.0, (step + 1) / (warmup + 1))
        fallen = 1.0 - 0.9 * max(0.0, step - warmup) / max(1, steps - warmup) if decay else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * grown * fallen
        ids, targets = batch(step)
        loss = loss_of(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        yield Step(loss.item(), norm.item())
        if not math.isfinite(loss.item()):
            return


def loss_of(model: PreTrainedModel, ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Mean cross-entropy in nats of the targets [B, S], each predicted at its own position."""
    logits = model(ids, use_cache=False, **inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_flops(model: PreTrainedModel, ids: Tensor) -> int:
    """FLOPs of a forward and a backward on token ids [B, S], as torch counts them; gradients are left behind.

    They are counted with attention in plain products, every query against all S keys: torch's counter does not know
    the fused attention of the CPU, and would leave attention out.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids, ids).backward()
    model.set_attn_implementation(implementation)
    return counter.get_total_flops()


def finite(value: float) -> float | None:
    """The number, or `None` for what JSON cannot say."""
    return value if math.isfinite(value) else None


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, when and where, for the head of a file of figures."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {options.workers} runs at a time, one thread each",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quick": options.quick,
    }
