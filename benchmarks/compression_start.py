"""What each way of starting a compressed model is worth before any training, on one checkpoint.

    python benchmarks/compression_start.py --teacher PATH_OR_ID [--gguf-file F] --calibration FILE [--output JSON]

Every row compresses the teacher to the same stored layers (or drops layers, the baseline), and is measured on the same
held-out text: the loss in nats per token, and the mean relative error of the shared projections, weighed by what
calibration saw, before and after the low-rank differences. Calibrate on another text than the held-out one.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from modeling_looped.conversion.calibration import calibrate
from modeling_looped.conversion.compress import compress
from modeling_looped.conversion.layer_plan import LayerPlan, fitting_plan, kept_plan
from modeling_looped.conversion.plan_search import droppable_block
from modeling_looped.conversion.teacher import find_teacher
from modeling_looped.conversion.verification import HELD_OUT_TEXT, loss_by_loops, mean_loss, text_windows


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--calibration", required=True, type=Path, help="text, some ten thousand words")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--prelude", type=int, default=5)
    parser.add_argument("--core", type=int, default=10)
    parser.add_argument("--coda", type=int, default=5)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 16, 64, 128])
    parser.add_argument("--orders", nargs="*", choices=("cycle", "sequence"), default=["cycle", "sequence"])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    files = find_teacher(args.teacher, gguf_file=args.gguf_file)
    tokenizer, teacher = files.tokenizer(), files.model(dtype=torch.float32).eval()
    held_out = text_windows(tokenizer, HELD_OUT_TEXT.read_text(encoding="utf-8"))
    words = args.calibration.read_text(encoding="utf-8")[: 8 * args.calibration_tokens]
    windows = [w for w in text_windows(tokenizer, words) if w.numel()][: max(1, args.calibration_tokens // 512)]
    layers = teacher.config.num_hidden_layers
    middle = range(args.prelude, layers - args.coda)
    calibration = calibrate(teacher, windows, layers=middle)
    rows = []

    def save() -> None:
        if args.output is None:
            return
        results = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "held_out_tokens": sum(map(torch.numel, held_out)),
            "calibration_tokens": calibration.tokens,
            "losses": losses,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def measure(name: str, plan: LayerPlan, **options) -> None:
        start = time.perf_counter()
        model, errors = compress(teacher, plan, calibration=calibration, **options)
        seconds = time.perf_counter() - start
        loss = loss_by_loops(model, held_out, [plan.num_loops])[plan.num_loops]
        shared, adapted = (
            statistics.fmean(getattr(error, kind) for error in errors) for kind in ("shared", "adapted")
        )
        row = {
            "start": name,
            "stored_layers": plan.num_stored_layers,
            "parameters": model.num_parameters(),
            "loss": loss,
            "error_shared": shared,
            "error_adapted": adapted,
            "seconds": seconds,
            **options,
        }
        rows.append(row)
        save()  # after each row: a run that is stopped keeps what it measured
        print(
            f"| {name} | {plan.num_stored_layers} | {model.num_parameters() / 1e6:.1f} | {loss:.3f} | {shared:.3f} | "
            f"{adapted:.3f} | {seconds:.0f} |",
            flush=True,
        )

    losses = {"teacher": mean_loss(teacher, held_out)}
    print(f"teacher: {losses['teacher']:.3f} nats per token, {teacher.num_parameters() / 1e6:.1f} M parameters")
    print("| start | stored layers | parameters, M | loss | error, shared | error, adapted | seconds |")
    print("|---|---|---|---|---|---|---|")
    stored = args.prelude + args.core + args.coda
    block = droppable_block(calibration, layers - stored)
    kept = [layer for layer in range(layers) if layer not in block]
    measure(f"drop layers {block[0]}-{block[-1]}, nothing loops", kept_plan(kept, kept[-1:], 1))
    for order in args.orders:
        plan = fitting_plan(layers, args.prelude, args.core, args.coda, args.loops, order=order)
        for rank in args.ranks:
            for merge in ("average", "least_squares"):
                for alignment in ("none", "neurons_and_heads"):
                    adapters = ("svd",) if rank == 0 else ("svd", "weighted_svd")
                    for adapter in adapters:
                        if alignment != "none" and rank not in (0, 64):
                            continue
                        name = f"{order}, {merge}, align {alignment}, rank {rank} {adapter if rank else ''}".strip()
                        measure(name, plan, rank=rank, merge=merge, alignment=alignment, adapter=adapter)


if __name__ == "__main__":
    main()
