"""Speed and memory of a looped model beside a stock Llama of the same effective depth.

    python benchmarks/speed.py [--threads 2] [--repetitions 9] [--output benchmarks/results/speed.json]

Both models have the same width, heads, MLP and number of layer executions per token; Llama stores every one of its
layers, the looped model stores the core once. For each task the two run alternately, and the table gives medians over
the repetitions and the ratio looped / Llama of tokens per second (above 1: the looped model is faster). `llama`
against a second `llama` shows how far from 1 noise alone takes the ratio. Peak memory comes from a fresh process per
model and task.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from modeling_looped import LoopedConfig, LoopedForCausalLM

PRELUDE, CORE, CODA, LOOPS = 2, 2, 2, 8
EFFECTIVE_DEPTH = PRELUDE + CORE * LOOPS + CODA
IN_PLACE = {"injection": "none", "state_init": "input", "prelude_norm": False}
PROMPT, DECODED, TRAINED = 256, 32, 256


def make(name: str, shape: dict) -> PreTrainedModel:
    """Build one contestant, randomly initialised."""
    torch.manual_seed(0)
    if name.startswith("llama"):
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=EFFECTIVE_DEPTH)).eval()
    loop = {"num_prelude_layers": PRELUDE, "num_core_layers": CORE, "num_coda_layers": CODA, "num_loops": LOOPS}
    return LoopedForCausalLM(LoopedConfig(**shape, **loop, **(IN_PLACE if name == "in_place" else {}))).eval()


def tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Fixed random prompts [batch, length]."""
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def prefill(model: PreTrainedModel, batch: int = 1) -> int:
    """One cached forward over a prompt; returns the tokens processed."""
    model(tokens(model, batch, PROMPT), use_cache=True, logits_to_keep=1)
    return batch * PROMPT


@torch.no_grad()
def decode(model: PreTrainedModel, batch: int) -> int:
    """Greedy steps on a cache; returns the tokens decoded and leaves the time of the steps in `decode.seconds`."""
    cache = DynamicCache(config=model.config)
    step = model(tokens(model, batch, 32), past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(DECODED):
        step = model(step.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
    decode.seconds = time.perf_counter() - start
    return batch * DECODED


def train(model: PreTrainedModel, batch: int = 2) -> int:
    """Forward and backward of one batch; returns the tokens processed."""
    ids = tokens(model, batch, TRAINED)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    return batch * TRAINED


TASKS: dict[str, Callable[[PreTrainedModel], int]] = {
    "prefill": prefill,
    "decode, batch 1": lambda model: decode(model, 1),
    "decode, batch 8": lambda model: decode(model, 8),
    "training step": train,
}


def tokens_per_second(task: str, model: PreTrainedModel) -> float:
    """Run a task once."""
    start = time.perf_counter()
    count = TASKS[task](model)
    return count / (decode.seconds if task.startswith("decode") else time.perf_counter() - start)


def key_value_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token, counted in the cache that a forward really fills."""
    with torch.no_grad():
        cache = model(tokens(model, 1, 16), use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) // 16


def peak_memory(name: str, task: str, arguments: list[str]) -> float:
    """Peak resident memory in MiB of a fresh process that does one task."""
    child = [sys.executable, __file__, *arguments, "--only", name, "--task", task]
    return float(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "head_dim": args.hidden_size // args.heads,
        "dtype": args.dtype,
    }

    def contestant(name: str) -> PreTrainedModel:
        return make(name, shape).to(getattr(torch, args.dtype))

    if args.only:
        tokens_per_second(args.task, contestant(args.only))
        # VmHWM starts anew with the program, while getrusage's maximum is inherited from the process that forked it
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return

    models = {name: contestant(name) for name in ("llama", "llama again", "in_place", "diagonal")}
    speeds = {task: {name: [] for name in models} for task in TASKS}
    for repetition in range(args.repetitions + 1):
        print(f"repetition {repetition} of {args.repetitions}", file=sys.stderr)
        for task in TASKS:
            for name, model in models.items():
                speed = tokens_per_second(task, model)
                if repetition:  # the first one warms up
                    speeds[task][name].append(speed)

    passed_on = sys.argv[1:]
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": {**shape, "effective_depth": EFFECTIVE_DEPTH, "layout": f"{PRELUDE}+{CORE}x{LOOPS}+{CODA}"},
        "repetitions": args.repetitions,
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "key_value_bytes_per_token": {name: key_value_bytes_per_token(model) for name, model in models.items()},
        "tasks": {},
    }
    print("| task | llama, tokens/s | llama again | in place | diagonal | peak MiB: llama / in place / diagonal |")
    print("|---|---|---|---|---|---|")
    for task in TASKS:
        base = speeds[task]["llama"]
        ratios = {
            name: statistics.median(a / b for a, b in zip(speeds[task][name], base, strict=True)) for name in models
        }
        peaks = {name: peak_memory(name, task, passed_on) for name in ("llama", "in_place", "diagonal")}
        medians = {name: statistics.median(values) for name, values in speeds[task].items()}
        results["tasks"][task] = {"tokens_per_second": medians, "ratio_to_llama": ratios, "peak_mib": peaks}
        row = [f"{ratios[name]:.2f}x" for name in ("llama again", "in_place", "diagonal")]
        memory = " / ".join(f"{peak:.0f}" for peak in peaks.values())
        print(f"| {task} | {medians['llama']:.0f} | {' | '.join(row)} | {memory} |")
    print(f"parameters: {results['parameters']}")
    print(f"key-value bytes per token: {results['key_value_bytes_per_token']}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
