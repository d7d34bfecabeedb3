"""Language modelling from scratch: a looped model beside transformers of as many and of twice as many parameters.

    python benchmarks/language.py --text TRAIN --eval VALID [--preset tiny] [--bf16] [--quick] \
        [--output benchmarks/results/language.json]

- `looped`: few wide layers, run several times;
- `equal`: a stock Llama of as many parameters, in more and narrower layers;
- `twice`: one with twice as many layers, whose MLP is so much wider that all its parameters are twice as many;
- `once`: a stock Llama of the looped model's stored layers (with a wide core, which no Llama has, the looped model at
  one loop): whether it is the width that helps.

All have the same tokenizer, batches, optimiser and schedule, and with the same seed the same tokens in the same order.
The rate of each is the best of --rates, with the first seed on --tuning-tokens (`once` takes that of `equal`). Every
seed then trains the first three on --tokens, and those that --again names at that rate too: a rate that is best on few
tokens may be too high for many. The one whose mean loss over seeds is lower counts. What looping gives is
(L_equal - L_looped) / (L_equal - L_twice), of losses on held-out text. With the first seed follow, but for
--shares-only,

- since a looped step costs more, `looped` and `twice` on so few tokens that they cost the training FLOPs of `equal`;
- `looped_drawn`, the looped model that draws its loops batch by batch, on half the tokens: for
  `benchmarks/test_time_curve.py`;
- `once`, on as many tokens.

The presets with `qk_norm` give all of them normalised queries and keys; the stacks are then stock Qwen3s.

--output is written whenever a run is finished, for --recorded of a later call, on another machine too.

Every run is one of `python -m modeling_looped train`, in a folder of its own under --work: the same command goes on
where it was stopped, and reads what is finished.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from language_contestants import PRESETS, Preset, Shape, costs, fields_of
from language_table import DRAWN, EQUAL, LOOPED, ONCE, TWICE, Row, best_rates, share_of_means, shares, table
from small_runs import add_run_options, described, write_json

from modeling_looped.training.data import Source
from modeling_looped.training.record import RECORD
from modeling_looped.training.tokenizer import trained_tokenizer


class Job(NamedTuple):
    """One run; `tokens` to train on."""

    name: str
    learning_rate: float
    seed: int
    tokens: int


def name_and_rate(text: str) -> tuple[str, float]:
    """`twice=1e-2` as a contestant and its learning rate."""
    name, _, rate = text.partition("=")
    if name not in (LOOPED, TWICE, EQUAL):
        raise argparse.ArgumentTypeError(f"{text!r} must begin with one of {LOOPED}, {TWICE} and {EQUAL}")
    with contextlib.suppress(ValueError):
        if 0 < float(rate) < math.inf:
            return name, float(rate)
    raise argparse.ArgumentTypeError(f"{text!r} must end in a learning rate above 0, as in {name}=1e-2")


#: Options that decide what a run is, beside its contestant, rate, seed and tokens. The precision is not one of them:
#: a machine that multiplies no bf16 can go on with what another began, and every row says what its own was.
OF_A_RUN = ("optimizer", "eval_tokens", "length", "batch", "quick")


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What two runs were told differently, for an error; empty where that is nothing."""
    return "; ".join(
        f"{name}={theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    )


def recorded_runs(path: Path, options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[Job, Row]:
    """The runs in the --output of an earlier call, of those contestants that have the same config here.

    Raises:
        ValueError: if it was called with other settings, or has no such run; says why.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    then = parser.parse_args(shlex.split(record["command"])[2:])
    told = [
        {name: getattr(call, name) for name in OF_A_RUN}
        | {name: getattr(call, name).name for name in ("text", "eval")}
        for call in (then, options)
    ]
    if unlike := differences(*told):
        raise ValueError(f"it is of other settings: {unlike}.")
    shapes = {name: Shape(**part) if isinstance(part, dict) else part for name, part in record["preset"].items()}
    presets = (Preset(**shapes), PRESETS[options.preset])
    groups = [part["runs"] for part in record.values() if isinstance(part, dict) and "runs" in part]
    found = {}
    for row in (row for group in (record["tuning"], *groups) for row in group):
        theirs, ours = (fields_of(row["name"], preset, options.length) for preset in presets)
        if theirs == ours:
            found[Job(*(row[field] for field in Job._fields))] = {"bf16": then.bf16} | row
    if not found:
        raise ValueError(f"none of its contestants is one of --preset {options.preset}.")
    return found


def option_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="to train on")
    add("--eval", type=Path, required=True, help="text that training never sees")
    add("--preset", choices=PRESETS, default="tiny")
    add("--tokens", type=int, default=20_000_000, help="to train on (%(default)s)")
    add("--tuning-tokens", type=int, default=2_000_000, help="of the runs that choose the rates (%(default)s)")
    add("--rates", type=float, nargs="+", default=[1e-2, 2e-2, 4e-2], help="to try; adamw wants a tenth of them")
    again = "contestants and rates to try on --tokens too, such as twice=1e-2"
    add("--again", type=name_and_rate, nargs="*", default=[], metavar="NAME=RATE", help=again)
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of all three (%(default)s)")
    add("--eval-tokens", type=int, default=131_072, help="of the text to evaluate on (%(default)s)")
    add("--length", type=int, default=128, help="tokens of a block (%(default)s)")
    add("--batch", type=int, default=32, help="blocks per step (%(default)s)")
    add("--bf16", action="store_true", help="mixed precision, faster where the machine multiplies bf16")
    recorded = "earlier --outputs, whose runs, of either precision, are not to be repeated"
    add("--recorded", type=Path, nargs="+", default=[], metavar="FILE", help=recorded)
    add("--shares-only", action="store_true", help="end when every seed has trained the first three")
    add_run_options(parser, "build/language")
    return parser


def parse() -> argparse.Namespace:
    """Options of the command line, and `known`: the recorded runs that are not to be repeated."""
    parser = option_parser()
    options = parser.parse_args()
    options.known = {}
    for path in options.recorded:
        try:
            options.known |= recorded_runs(path, options, parser)
        except (OSError, KeyError, TypeError, ValueError) as error:
            parser.error(f"--recorded {path}: {error}")
    if options.quick:
        options.tokens, options.tuning_tokens, options.rates, options.seeds = 16_384, 8_192, [1e-3], [0]
        options.length, options.batch, options.eval_tokens = 64, 8, 4_096
        options.work /= "quick"
    options.work = options.work / (f"{options.preset}-bf16" if options.bf16 else options.preset)
    return options


def folder_of(options: argparse.Namespace, job: Job) -> Path:
    """Where a run is."""
    return options.work / f"{job.name}-seed{job.seed}-lr{job.learning_rate:g}-{job.tokens}"


def recorded_row(options: argparse.Namespace, job: Job) -> Row | None:
    """What --recorded says of a run."""
    return options.known.get(job._replace(tokens=job.tokens // options.length * options.length))


def arguments_of(options: argparse.Namespace, job: Job, tokenizer: Path) -> list[str]:
    """What the training command is told about a run."""
    settings: dict[str, Any] = {
        "model": json.dumps(fields_of(job.name, PRESETS[options.preset], options.length)),
        "tokenizer_name_or_path": tokenizer,
        "dataset_name": options.text,
        "eval_datasets": json.dumps({"valid": str(options.eval)}),
        "max_length": options.length,
        "max_train_tokens": job.tokens,
        "max_eval_tokens": options.eval_tokens,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "optim_recipe": options.optimizer,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "seed": job.seed,
        "data_seed": job.seed,
        "logging_steps": 20,
        "save_steps": 100,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "report_to": "none",
        "output_dir": folder_of(options, job),
    }
    if options.bf16:
        settings["bf16"] = True
        if not torch.cuda.is_available():
            # Without use_cpu the Trainer refuses bf16 there; PyTorch's fused attention is slow in the backward pass.
            settings |= {"use_cpu": True, "attn_implementation": "eager"}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    if job.name in (LOOPED, DRAWN):
        arguments += ["--eval_num_loops", "1", "2", "4", "8", "16"]
    return arguments


#: Says where a run is and not what it is: --work may be moved.
PLACES = ("--output_dir", "--tokenizer_name_or_path")


def by_option(arguments: Sequence[str]) -> dict[str, str]:
    """The words behind each option, but for places."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return {name: shlex.join(values) for name, values in found.items() if name not in PLACES}


def check_same_run(output: Path, arguments: Sequence[str]) -> None:
    """Raise ValueError if the folder is of a run that was told something else; its name does not say all."""
    record = output / RECORD
    if not record.exists():
        return
    command = shlex.split(json.loads(record.read_text(encoding="utf-8"))["command"])
    if unlike := differences(by_option(command[command.index("train") + 1 :]), by_option(arguments)):
        raise ValueError(f"{output} is of another run: {unlike}. Choose another --work, or remove it.")


def train(options: argparse.Namespace, job: Job, tokenizer: Path) -> Row:
    """One run, or the rest of it, or what an earlier call finished; returns its row."""
    if recorded := recorded_row(options, job):
        return recorded
    output, arguments = folder_of(options, job), arguments_of(options, job, tokenizer)
    found = finish(output, [sys.executable, "-m", "modeling_looped", "train", *arguments])
    parameters, flops = costs(fields_of(job.name, PRESETS[options.preset], options.length), options.length)
    metrics = found["metrics"]
    loops = {name: value for name, value in metrics.items() if "_loops_" in name and name.endswith("_loss")}
    row = {
        **job._asdict(),
        "loss": metrics["eval_valid_loss"],
        "parameters": parameters,
        "tokens": found["tokens_seen"],
        "flops": flops * found["tokens_seen"],
        "tokens_per_second": found["tokens_per_second"],
        "bf16": options.bf16,
        **({"loss_by_loops": loops} if loops else {}),
    }
    print(f"{output.name}: {row['loss']:.4f} nats per token", file=sys.stderr)
    return row


#: glibc returns tensors of 32 MB or more to the system when they are freed, and gets them back page by page; contexts
#: of 512 have such. Other allocators do not read these, and what the caller has set comes first.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def finish(output: Path, program: list[str]) -> dict[str, Any]:
    """The record of a run, which the program finishes unless it is finished."""
    with Path(f"{output}.lock").open("w") as lock:
        # The program holds the lock too: where this benchmark was killed and its program goes on, we wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = output / RECORD
        if not record.exists() or json.loads(record.read_text(encoding="utf-8"))["status"] != "finished":
            environment = {**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(
                program, env=environment, pass_fds=[lock.fileno()], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"{output} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(record.read_text(encoding="utf-8"))


def write(
    options: argparse.Namespace, tuning: list[Row], groups: dict[str, list[Row]], unfinished: Iterable[Row] = ()
) -> None:
    """Write the stages that are finished, and the runs so far of one that is not, where --output asks for it."""
    if options.output:
        found: dict[str, Any] = {
            name: {"share_of_gap": {**shares(rows), "means": share_of_means(rows)}, "runs": rows}
            for name, rows in groups.items()
        }
        if runs := list(unfinished):
            found["unfinished"] = {"runs": runs}
        preset = PRESETS[options.preset]._asdict()
        preset |= {name: part._asdict() for name, part in preset.items() if isinstance(part, Shape)}
        write_json(options.output, {**described(options), "preset": preset, "tuning": tuning, **found})


def main() -> None:
    """Train all, then print the table."""
    options = parse()
    preset = PRESETS[options.preset]
    tokenizer = options.work / "tokenizer"
    trained_tokenizer(
        tokenizer,
        Source(str(options.text), seed=0),
        vocab_size=preset.vocabulary,
        max_length=options.length,
        max_characters=20_000_000,
    )

    tuning: list[Row] = []
    groups: dict[str, list[Row]] = {}
    # Recorded runs are written again: --output may be the very file that they were read from.
    runs, writing = dict(options.known), threading.Lock()

    def finished(job: Job) -> Row:
        row = train(options, job, tokenizer)
        with writing:
            runs[job._replace(tokens=row["tokens"])] = row
            write(options, tuning, groups, runs.values())
        return row

    def run(jobs: list[Job]) -> list[Row]:
        for job in jobs:  # before any of them is trained
            if not recorded_row(options, job):
                check_same_run(folder_of(options, job), arguments_of(options, job, tokenizer))
        with ThreadPoolExecutor(options.workers) as pool:
            return list(pool.map(finished, jobs))

    names = (LOOPED, TWICE, EQUAL)  # the longest runs first
    first, *others = options.seeds
    tuning = run([Job(name, rate, first, options.tuning_tokens) for name in names for rate in options.rates])
    tuned = best_rates(tuning)
    to_train = sorted(dict.fromkeys([*tuned.items(), *options.again]), key=lambda pair: names.index(pair[0]))
    trained = run([Job(name, rate, seed, options.tokens) for name, rate in to_train for seed in (first, *others)])
    rates = best_rates(trained)
    same_tokens = [row for row in trained if row["learning_rate"] == rates[row["name"]]]
    behind = [row for row in trained if row not in same_tokens]
    groups = {"same tokens": same_tokens, **({"other rates": behind} if behind else {})}
    if not options.shares_only:
        per_token = {name: costs(fields_of(name, preset, options.length), options.length)[1] for name in names}
        as_cheap = {name: round(options.tokens * per_token[EQUAL] / per_token[name]) for name in (LOOPED, TWICE)}
        same_flops = run([Job(name, rates[name], first, tokens) for name, tokens in as_cheap.items()])
        same_flops += [row for row in same_tokens if (row["name"], row["seed"]) == (EQUAL, first)]
        groups["same FLOPs"] = same_flops
        drawn, once = run(
            [Job(DRAWN, rates[LOOPED], first, options.tokens // 2), Job(ONCE, rates[EQUAL], first, options.tokens)]
        )
        groups |= {"same tokens": [*same_tokens, once], "drawn depths": [drawn]}
    write(options, tuning, groups)
    print(table(groups))


if __name__ == "__main__":
    main()
