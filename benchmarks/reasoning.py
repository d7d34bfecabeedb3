"""Reasoning in depth: k layers looped L times beside k layers once and k x L layers stacked, trained alike.

    python benchmarks/reasoning.py [--quick] [--output benchmarks/results/reasoning.json]

Each contestant learns each generated task (reasoning_tasks.py) from scratch with every seed, on the same problems,
with the same rate and number of steps:

- `once`: k layers, run once: as many parameters as the looped model;
- `looped`: the same k layers, run L times;
- `stacked`: k x L layers: the same operations per token, L times the parameters in layers;
- `sampled`: the looped model, which draws the loop count of each step; on tasks that have harder problems.

The first table has the share of right answers among the hardest that were trained on, and in brackets of problems all
of whose answers are right; `share` is (looped - once) / (stacked - once) of the former. The second has problems
harder than any that was trained on, answered with more loops than were trained.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable

import torch
from reasoning_tasks import NOTHING, TASKS, Problems, Task
from small_runs import Settings, add_run_options, described, run_all, training_steps, write_json
from transformers import PreTrainedModel

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.reporting.costs import markdown_table

CONTESTANTS = ("once", "looped", "stacked", "sampled")
#: Steps of training, the same for all contestants: in short trials the tasks were learned at different speeds.
STEPS = {"hops": 5000, "addition": 4000, "composition": 1500}
#: Loop counts at test time, as multiples of the trained one.
MULTIPLES = (0.25, 0.5, 1, 1.5, 2, 3, 4)
#: Seeds of problems: those of a run's steps follow each other.
STEPS_APART = 10_000_000


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, help="of training, instead of each task's own number")
    add("--learning-rate", type=float, default=2e-3)
    add("--batch", type=int, default=32, help="problems per step (%(default)s)")
    add("--width", type=int, default=64)
    add("--layers", type=int, default=1, help="k (%(default)s)")
    add("--loops", type=int, default=4, help="L (%(default)s)")
    add("--injection", default="diagonal")
    add("--test-problems", type=int, default=500)
    add_run_options(parser, "build/reasoning")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.test_problems = options.seeds[:1], 20, 50
        options.work /= "quick"
    return options


def model_of(settings: Settings, task: Task) -> PreTrainedModel:
    """A contestant, initialised from the run's seed."""
    torch.manual_seed(settings["seed"])
    kind, layers, loops, width = (settings[name] for name in ("contestant", "layers", "loops", "width"))
    parts = {"num_prelude_layers": 0, "num_core_layers": layers, "num_loops": 1 if kind == "once" else loops}
    parts["injection"] = settings["injection"]
    if kind == "stacked":
        parts = {"num_prelude_layers": layers * loops, "num_core_layers": 0}
    if kind == "sampled":
        parts["depth_sampling"] = {"type": "poisson", "min_loops": loops // 2, "max_loops": 3 * loops}
    return LoopedForCausalLM(
        LoopedConfig(
            vocab_size=task.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_attention_heads=4,
            num_coda_layers=0,
            # as in the stack, embeddings start small beside what layers write: normalised, they hide it for long
            prelude_norm=False,
            position_embedding="learned",
            max_position_embeddings=task.length,
            **parts,
        )
    )


def run(settings: Settings) -> Settings:
    """Train one contestant on one task, and ask it."""
    task = TASKS[settings["task"]]
    model = model_of(settings, task)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        problems = task.problems("train", settings["batch"], seed=STEPS_APART * settings["seed"] + step)
        return problems.inputs, problems.answers

    steps = settings["steps"]
    how = {"learning_rate": settings["learning_rate"], "warmup": steps // 20, "decay": True, "betas": (0.9, 0.98)}
    losses = [step.loss for step in training_steps(model, batch, steps=steps, **how)]
    model.config.max_trained_loops = None  # that these are more loops than it was trained with is the point
    loops = settings["loops"]
    counts = sorted({max(1, round(loops * multiple)) for multiple in MULTIPLES})
    asked: dict[str, Problems] = {"trained": task.problems("test", settings["test_problems"], seed=0)}
    if task.hardest > task.trained:
        asked["harder"] = task.problems("test", settings["test_problems"], seed=1, hardest=task.hardest)
    looped = settings["contestant"] in ("looped", "sampled")
    return {
        "parameters": model.num_parameters(),
        "final_loss": statistics.fmean(losses[-steps // 20 :]),
        "trained": answers_right(model, asked["trained"]),
        "by_loops": {
            name: {count: answers_right(model, problems, num_loops=count) for count in counts if looped}
            for name, problems in asked.items()
        },
    }


@torch.no_grad()
def answers_right(model: PreTrainedModel, problems: Problems, **inputs: int) -> Settings:
    """Shares of right answers: of all problems `exact`ly, and `by_hardness`."""
    model.eval()
    right, asked = [], problems.answers != NOTHING
    for ids, answers in zip(problems.inputs.split(250), problems.answers.split(250), strict=True):
        right.append(model(ids, use_cache=False, **inputs).logits.argmax(dim=-1) == answers)
    correct = torch.cat(right)
    hardness = [int(value) for value in problems.hardness[asked].unique()]
    return {
        "exact": (correct | ~asked).all(dim=1).double().mean().item(),
        "by_hardness": {value: correct[problems.hardness == value].double().mean().item() for value in hardness},
    }


def tables(results: dict[str, Settings], jobs: dict[str, Settings]) -> str:
    """Both Markdown tables; means over seeds, and from the lowest to the highest."""
    found: dict[tuple[str, str], list[Settings]] = {}
    for name, job in jobs.items():
        found.setdefault((job["task"], job["contestant"]), []).append(results[name])
    contestants = [kind for kind in CONTESTANTS if any(key[1] == kind for key in found)]
    rows, deeper = [], []
    for task in dict.fromkeys(job["task"] for job in jobs.values()):
        hardest = str(TASKS[task].trained)
        shares = {
            kind: [done["trained"]["by_hardness"][hardest] for done in found[task, kind]]
            for kind in contestants
            if (task, kind) in found
        }
        row = [f"{task}, {hardest} steps"]
        for kind in contestants:
            exact = statistics.fmean(done["trained"]["exact"] for done in found[task, kind]) if kind in shares else 0
            row.append(f"{spread(shares[kind])} ({exact:.2f})" if kind in shares else "-")
        row.append(share_of(shares))
        rows.append(row)
        for kind in ("looped", "sampled"):
            done = found.get((task, kind), [])
            if not done or "harder" not in done[0]["by_loops"]:
                continue
            for low, high in groups_of(TASKS[task]):
                cells = [f"{task}, {low}" + (f" to {high}" if high > low else ""), kind]
                for count in done[0]["by_loops"]["harder"]:
                    answered = [one["by_loops"]["harder"][count] for one in done]
                    cells += [spread([mean_right(one, low, high) for one in answered])]
                deeper.append(cells)
    header = ["task", *contestants, "share"]
    text = markdown_table(header, rows)
    if deeper:
        counts = next(iter(found[key] for key in found if key[1] in ("looped", "sampled")))[0]["by_loops"]["trained"]
        text += "\n\n" + markdown_table(["task, steps", "trained", *(f"{c} loops" for c in counts)], deeper)
    return text


def groups_of(task: Task) -> Iterable[tuple[int, int]]:
    """Ranges of hardness, the first of which was trained."""
    yield task.trained, task.trained
    middle = (task.trained + task.hardest + 1) // 2
    yield task.trained + 1, middle
    yield middle + 1, task.hardest


def mean_right(answered: Settings, low: int, high: int) -> float:
    """Mean over hardnesses from `low` to `high` of the share of right answers."""
    shares = [share for hardness, share in answered["by_hardness"].items() if low <= int(hardness) <= high]
    return statistics.fmean(shares) if shares else float("nan")


def share_of(shares: dict[str, list[float]]) -> str:
    """How much of what stacking gives looping gives too."""
    once, looped, stacked = (
        statistics.fmean(shares.get(kind, [float("nan")])) for kind in ("once", "looped", "stacked")
    )
    return f"{(looped - once) / (stacked - once):.0%}" if stacked > once else "-"


def spread(values: list[float]) -> str:
    """Mean, and from the lowest to the highest."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Train all, then print the tables."""
    options = parse()
    shared = ("learning_rate", "batch", "width", "layers", "loops", "injection", "test_problems")
    jobs = {
        f"{task}-{kind}-seed{seed}": {
            **{name: getattr(options, name) for name in shared},
            "steps": options.steps or STEPS[task],
            "task": task,
            "contestant": kind,
            "seed": seed,
        }
        for seed in options.seeds
        for task in options.tasks
        for kind in options.contestants
        if kind != "sampled" or TASKS[task].hardest > TASKS[task].trained
    }
    results = run_all(run, jobs, options.work, options.workers)
    print(tables(results, jobs))
    if options.output:
        write_json(options.output, {**described(options), "runs": [{**jobs[n], **r} for n, r in results.items()]})


if __name__ == "__main__":
    main()
