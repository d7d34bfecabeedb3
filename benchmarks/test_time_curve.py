"""Loss of a looped model by loops at test time, and how well a saturating exponential predicts the loops held out.

    python benchmarks/test_time_curve.py --model build/demo --text english.txt --loops 8 --hold-out 6 7 8 \
        --output benchmarks/results/test_time_curve.json

The exponential (the scaling law `test_time_exponential`) is fitted to the loops that are not held out. Its peer is the
guess that the loss stays where the nearest fitted loop count left it; the ratio of the two errors on the held-out
loops says what the law adds. Losses are saved as they are measured: the same command goes on where it was stopped.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped import LoopedForCausalLM
from modeling_looped.conversion.manifest import versions
from modeling_looped.conversion.teacher import sha256
from modeling_looped.conversion.verification import mean_loss, text_windows
from modeling_looped.scaling import Fit, fit_law


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="folder of a looped model")
    add("--text", required=True, type=Path, metavar="FILE", help="that it was not trained on")
    add("--tokens", type=int, default=10_240, metavar="N", help="of the text, at most (%(default)s)")
    add("--length", type=int, default=512, metavar="S", help="of a window, in tokens (%(default)s)")
    add("--loops", required=True, type=int, metavar="T", help="loops 1..T are measured")
    add("--hold-out", required=True, nargs="+", type=int, metavar="T", help="loop counts that are not fitted")
    add("--resamples", type=int, default=200, metavar="N", help="of the bootstrap (%(default)s)")
    add("--seed", type=int, default=0)
    add("--output", required=True, type=Path, metavar="FILE", help="JSON to write, and to go on from")
    return parser.parse_args(arguments)


def checked(options: argparse.Namespace) -> None:
    """Raise ValueError for loop counts that cannot be fitted, before anything is loaded."""
    counts = range(1, options.loops + 1)
    beyond = sorted(set(options.hold_out) - set(counts))
    if beyond:
        raise ValueError(f"hold_out={beyond} must lie in 1..loops={options.loops}.")
    left = len(counts) - len(set(options.hold_out))
    if left < 4:
        raise ValueError(
            f"loops={options.loops} without hold_out leaves {left} loop counts; three coefficients need 4."
        )
    if options.tokens < 2 or options.length < 2:
        raise ValueError(f"tokens={options.tokens}, length={options.length} must be at least 2.")


def measure(options: argparse.Namespace, key: dict) -> dict[int, float]:
    """Losses by loop count, as far as the output does not hold them yet."""
    saved = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    if saved and saved.get("measured_on") != key:
        raise ValueError(
            f"output={str(options.output)!r} holds losses of {saved.get('measured_on')}, not of {key}: name another."
        )
    losses = {int(loops): loss for loops, loss in saved.get("losses", {}).items()}
    missing = [loops for loops in range(1, options.loops + 1) if loops not in losses]
    if not missing:
        return losses
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    if not isinstance(model, LoopedForCausalLM):
        raise ValueError(
            f"model={str(options.model)!r} is a {type(model).__name__}, and loops are of LoopedForCausalLM."
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(tokenizer, options.text.read_text(encoding="utf-8"), length=options.length)
    windows = windows[: max(1, options.tokens // options.length)]
    for loops in missing:
        start = time.perf_counter()
        losses[loops] = mean_loss(model, windows, num_loops=loops)
        print(f"{loops} loops: {losses[loops]:.5f} nats ({time.perf_counter() - start:.1f} s)", flush=True)
        tokens = sum(window.numel() for window in windows)
        config = {"num_loops": model.config.num_loops, "max_trained_loops": model.config.max_trained_loops}
        write(options.output, {"measured_on": key, "tokens": tokens, "model": config, "losses": losses})
    return losses


def write(path: Path, figures: dict) -> None:
    """Replace the file, whole or not at all; what it held under other names stays."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**held, **figures}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def persistence(fit: Fit) -> float:
    """Root of the mean squared error of the peer on the held-out loops, in nats."""
    fitted, out = (fit.table[fit.table["is_held_out"] == side].set_index("loops")["loss"] for side in (False, True))
    nearest = [fitted.iloc[int(np.argmin(np.abs(fitted.index.to_numpy() - loops)))] for loops in out.index]
    return float(np.sqrt(np.mean((np.array(nearest) - out.to_numpy()) ** 2)))


def benchmark(options: argparse.Namespace, command: str) -> dict:
    """Measure, fit, compare and write."""
    checked(options)
    if not (options.model / "config.json").is_file():
        raise ValueError(f"model={str(options.model)!r} has no config.json.")
    weights = sorted(options.model.glob("*.safetensors"))
    key = {
        "model": {path.name: sha256(path) for path in (options.model / "config.json", *weights)},
        "text": sha256(options.text),
        "tokens": options.tokens,
        "length": options.length,
    }
    losses = measure(options, key)
    table = pd.DataFrame({"loops": range(1, options.loops + 1)}).assign(loss=lambda rows: rows["loops"].map(losses))
    held = f"loops in [{', '.join(map(str, sorted(set(options.hold_out))))}]"
    fit = fit_law("test_time_exponential", table, hold_out=held, resamples=options.resamples, seed=options.seed)
    error, peer = fit.held_out.rmse, persistence(fit)
    figures = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "coefficients": fit.coefficients,
        "intervals": fit.intervals,
        "fitted": fit.fitted._asdict(),
        "held_out": {"loops": sorted(set(options.hold_out)), **fit.held_out._asdict()},
        "nearest_loop_rmse": peer,
        "ratio_to_nearest_loop": error / peer if peer else None,
        "warnings": fit.warnings,
    }
    write(options.output, figures)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in fit.coefficients.items())
    print(f"L(T) = L_inf + Z exp(-z T): {shown}")
    print(
        f"held out: RMSE {error:.5f} nats, nearest fitted loop count {peer:.5f}; "
        f"ratio {figures['ratio_to_nearest_loop']}"
    )
    for line in fit.warnings:
        print(f"WARNING: {line}")
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        benchmark(options, shlex.join(["python", "benchmarks/test_time_curve.py", *given]))
    except (ValueError, OSError) as error:
        print(f"test_time_curve.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
