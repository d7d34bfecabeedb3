"""What training a looped model costs: speed beside a stock Llama of the same depth, and memory by loop count.

    python benchmarks/training_cost.py [--threads 2] [--repetitions 9] [--output benchmarks/results/training_cost.json]

Speed: a training step (forward, backward, AdamW) of a looped model and of a stock `LlamaForCausalLM` with as many
layers as the looped one runs, alternately in one process. FLOPs are counted on a real step of each by
`torch.utils.flop_counter`, recomputation apart. The ratio of FLOPs per second compares them at equal FLOPs (above 1:
the looped model is faster); `llama again`, a second one, says what noise alone makes of a ratio of 1.

Memory, by loop count, with the whole graph, with checkpointing of each layer or each loop, and with backpropagation
through the last loops only (`--backprop-loops`): the tensors that the forward saves for the backward, each storage
once, without parameters; and the most that a forward and backward take at a time beside parameters, as torch's
profiler sees it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from small_runs import training_flops
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.reporting.costs import markdown_table
from modeling_looped.reporting.measured_memory import measured_peak, saved_bytes

PRELUDE, CORE, CODA = 2, 2, 2
#: How gradients are made.
WAYS = ("whole graph", "per layer", "per loop", "truncated")
#: What gradient checkpointing recomputes at a time.
CHECKPOINTED = {"per layer": "layer", "per loop": "loop"}


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hidden-size", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--intermediate-size", type=int, default=704)
    add("--vocab-size", type=int, default=4096)
    add("--batch", type=int, default=2)
    add("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    add("--speed-loops", type=int, nargs="+", default=[4, 8], help="loop counts whose speed is measured")
    add("--memory-loops", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--backprop-loops", type=int, default=2, help="loops that truncated backpropagation keeps (%(default)s)")
    add("--threads", type=int, default=2)
    add("--repetitions", type=int, default=9)
    add("--quick", action="store_true", help="a smoke run of a minute, whose figures mean nothing")
    add("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.quick:
        options.hidden_size, options.intermediate_size, options.length = 64, 128, 32
        options.speed_loops, options.memory_loops, options.repetitions = [2], [1, 2, 4], 2
    return options


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    """The fields that both models' configs have."""
    return {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": options.length,
    }


def looped(options: argparse.Namespace, loops: int, way: str = "whole graph") -> LoopedForCausalLM:
    """The looped model in training mode."""
    torch.manual_seed(0)
    layers = {"num_prelude_layers": PRELUDE, "num_core_layers": CORE, "num_coda_layers": CODA, "num_loops": loops}
    if way == "truncated":
        layers["backprop_loops"] = min(options.backprop_loops, loops)
    granularity = CHECKPOINTED.get(way)
    config = LoopedConfig(**shape_of(options), **layers, checkpoint_granularity=granularity or "layer")
    model = LoopedForCausalLM(config).train()
    if granularity is not None:
        model.activation_checkpointing_enable()
    return model


def llama(options: argparse.Namespace, loops: int) -> LlamaForCausalLM:
    """A stock Llama of as many layers as the looped model runs, in training mode."""
    torch.manual_seed(0)
    depth = PRELUDE + CORE * loops + CODA
    return LlamaForCausalLM(LlamaConfig(**shape_of(options), num_hidden_layers=depth)).train()


def tokens(options: argparse.Namespace) -> torch.Tensor:
    """Fixed random tokens [batch, length]."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(options.vocab_size, (options.batch, options.length), generator=random)


class Contestant:
    """A model that trains."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss(self) -> torch.Tensor:
        """The forward."""
        return self.model(self.ids, labels=self.ids, use_cache=False).loss

    def step(self) -> float:
        """One training step; returns its seconds."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def flops(self) -> int:
        """FLOPs of forward and backward, as torch counts them on real ones."""
        flops = training_flops(self.model, self.ids)
        self.optimizer.zero_grad()
        return flops


def speeds(options: argparse.Namespace, loops: int) -> dict[str, dict[str, float]]:
    """Speed of every contestant, and what it is beside Llama's."""
    ids = tokens(options)
    models: dict[str, PreTrainedModel] = {name: llama(options, loops) for name in ("llama", "llama again")}
    models |= {f"looped, {way}": looped(options, loops, way) for way in WAYS}
    contestants = {name: Contestant(model, ids) for name, model in models.items()}
    # a checkpointed step is worth what the same step is without recomputation
    flops = {name: contestants[name].flops() for name in ("llama", "looped, whole graph", "looped, truncated")}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(options.repetitions + 1):
        print(f"{loops} loops, repetition {repetition} of {options.repetitions}", file=sys.stderr)
        for name, contestant in contestants.items():
            taken = contestant.step()
            if repetition:  # the first one warms up
                seconds[name].append(taken)
    rows = {}
    for name, times in seconds.items():
        worth = flops.get(name, flops["llama" if name.startswith("llama") else "looped, whole graph"])
        ratio = statistics.median(base / own for base, own in zip(seconds["llama"], times, strict=True))
        rows[name] = {
            "parameters": contestants[name].model.num_parameters(),
            "gflops_per_step": worth / 1e9,
            "tokens_per_second": ids.numel() / statistics.median(times),
            "ratio_tokens_per_second": ratio,
            "ratio_flops_per_second": ratio * worth / flops["llama"],
        }
    return rows


def memory(options: argparse.Namespace, loops: int, way: str) -> dict[str, int]:
    """Bytes that a step saves and takes."""
    contestant = Contestant(looped(options, loops, way), tokens(options))

    def step() -> None:
        contestant.loss().backward()
        contestant.optimizer.zero_grad()

    return {"saved": saved_bytes(contestant.model, contestant.loss), "peak": measured_peak(step)}


def main() -> None:
    """Measure, print the tables, write the figures."""
    options = parse()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quick": options.quick,
        "shape": {**shape_of(options), "layout": f"{PRELUDE}+{CORE}xT+{CODA}", "batch": options.batch},
        "speed": {},
        "memory": {},
    }

    def save() -> None:  # after each part: a run that is stopped keeps what it measured
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for loops in options.memory_loops:
        results["memory"][loops] = {way: memory(options, loops, way) for way in WAYS}
        save()
    for loops in options.speed_loops:
        results["speed"][loops] = speeds(options, loops)
        save()
    print("MiB saved for the backward / at the peak")
    rows = [
        [loops, *(f"{cell['saved'] / 2**20:.1f} / {cell['peak'] / 2**20:.1f}" for cell in ways.values())]
        for loops, ways in results["memory"].items()
    ]
    print(markdown_table(["loops", *WAYS], rows))
    for loops, contestants in results["speed"].items():
        print(f"\nTraining steps, {loops} loops, {PRELUDE + CORE * loops + CODA} layers run")
        rows = [
            [
                name,
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['gflops_per_step']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['ratio_tokens_per_second']:.2f}x",
                f"{row['ratio_flops_per_second']:.2f}x",
            ]
            for name, row in contestants.items()
        ]
        header = ["model", "parameters, M", "GFLOPs per step", "tokens/s", "tokens/s to llama", "FLOP/s to llama"]
        print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
