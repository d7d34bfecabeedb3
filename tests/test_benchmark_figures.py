"""What the benchmarks make of their runs: verdicts, shares and tables, from runs written by hand."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import language
import language_contestants
import language_table
import reasoning
import small_runs
import stability

LIMITS = {"entropy": 3.4, "margin": 0.3, "spike": 0.5}


def falling(steps: int = 200) -> list[float]:
    """The losses of a run without trouble."""
    return [2.0 + 2.0 * math.exp(-step / 40) for step in range(steps)]


def test_a_run_without_trouble_neither_diverges_nor_spikes():
    verdict = stability.verdict(falling(), **LIMITS)
    assert verdict == {
        "diverged": False,
        "finite": True,
        "collapsed": False,
        "spikes": 0,
        "final_loss": pytest.approx(2.0, abs=0.05),
        "best_loss": verdict["final_loss"],
    }


def test_a_spike_is_counted_once_however_long_it_lasts():
    losses = falling()
    losses[100:103] = [3.5, 4.0, 3.5]
    losses[150] = 3.0
    verdict = stability.verdict(losses, **LIMITS)
    assert (verdict["spikes"], verdict["diverged"]) == (2, False)


@pytest.mark.parametrize("end", [[math.nan], [math.inf], [2.5] * stability.WINDOW])
def test_a_run_that_ends_badly_diverged(end):
    assert stability.verdict([*falling(), *end], **LIMITS)["diverged"]


def test_a_run_that_ends_where_counting_bytes_would_has_collapsed():
    verdict = stability.verdict([3.41] * 100, **LIMITS)
    assert (verdict["collapsed"], verdict["diverged"]) == (True, False)
    text = torch.tensor([7, 9] * 50)
    assert stability.entropy(text) == pytest.approx(math.log(2))


def test_a_run_that_stops_before_the_first_window_has_a_verdict_too():
    verdict = stability.verdict([3.0, math.nan], **LIMITS)
    assert (verdict["diverged"], verdict["final_loss"], verdict["best_loss"]) == (True, None, None)


def test_runs_on_another_text_are_other_runs(tmp_path):
    """Their settings name the file, and the file its bytes."""
    paths = []
    for word in ("cat", "dog", "cat"):
        (tmp_path / f"{word}.txt").write_text(f"the {word} sat on the mat")
        paths.append(stability.stored_text(stability.Source(str(tmp_path / f"{word}.txt")), tmp_path, 12))
    assert paths[0] == paths[2] != paths[1]
    assert paths[0].read_bytes() == b"the cat sat "
    with pytest.raises(ValueError, match=r"--bytes=99: .* has only 23"):
        stability.stored_text(stability.Source(str(tmp_path / "cat.txt")), tmp_path, 99)


def test_the_stability_table_counts_what_its_runs_say():
    jobs = {f"{rate}": {"injection": "add", "loops": 4, "learning_rate": rate} for rate in (0.001, 0.1)}
    curve = {str(depth): 2.0 for depth in stability.DEPTHS}
    seen = {"loss": curve, "finite": True, "drift": 0.25, "growth": 60.0}
    good = {"diverged": False, "collapsed": False, "spikes": 3, "final_loss": 2.0, "inference": seen}
    bad = {"diverged": True, "collapsed": False, "spikes": 0, "final_loss": None, "inference": None}
    table = stability.table(dict(zip(jobs, (good, bad), strict=True)), jobs)
    assert "| add | 4 | 1 of 2 | 0 | 3 | 1 | 2.000 | 1 of 1 | 0.250 | 60.0 |" in table
    assert "| add | 4 | 0.1 | - | diverged |" in table


def answered(shares: dict[int, float]) -> dict:
    """What a contestant answered, by hardness."""
    return {"exact": min(shares.values()), "by_hardness": {str(hardness): share for hardness, share in shares.items()}}


def test_the_reasoning_tables_have_the_share_of_the_gap_and_the_harder_problems():
    shares = {"once": 0.2, "looped": 0.8, "stacked": 1.0}
    jobs = {kind: {"task": "composition", "contestant": kind} for kind in shares}
    harder = {"4": answered({4: 0.5, 5: 0.4, 8: 0.2, 9: 0.1, 12: 0.1})}
    results = {
        kind: {
            "trained": answered({1: 1.0, 4: share}),
            "by_loops": {"trained": {"4": None}, "harder": harder if kind == "looped" else {}},
        }
        for kind, share in shares.items()
    }
    text = reasoning.tables(results, jobs)
    assert "| composition, 4 steps | 0.20 (0.20) | 0.80 (0.80) | 1.00 (1.00) | 75% |" in text
    assert "| composition, 4 | looped | 0.50 |" in text
    assert "| composition, 5 to 8 | looped | 0.30 |" in text
    assert "| composition, 9 to 12 | looped | 0.10 |" in text


@pytest.mark.parametrize("kind", reasoning.CONTESTANTS)
def test_every_contestant_of_the_reasoning_benchmark_runs_as_many_layers_as_it_should(kind):
    settings = {"seed": 0, "contestant": kind, "layers": 1, "loops": 4, "width": 16, "injection": "diagonal"}
    model = reasoning.model_of(settings, reasoning.TASKS["hops"])
    assert model.config.num_hidden_layers == (1 if kind == "once" else 4)
    assert len(model.model.layers) == (4 if kind == "stacked" else 1)


def row(name: str, loss: float, seed: int = 0, rate: float = 1e-3) -> dict:
    """A run of the language benchmark."""
    return {
        "name": name,
        "loss": loss,
        "seed": seed,
        "learning_rate": rate,
        "parameters": 10**6,
        "tokens": 10**6,
        "flops": 1e12,
    }


def test_the_share_of_the_gap_is_taken_seed_by_seed_and_from_the_best_rates():
    rows = [row("equal", 4.0), row("looped", 3.7), row("twice", 3.5), row("equal", 3.9, seed=1)]
    assert language_table.shares(rows) == {0: pytest.approx(0.6)}
    rows += [row("looped", 3.9, seed=1), row("twice", 3.95, seed=1)]
    assert language_table.shares(rows)[1] is None  # where twice the parameters bring nothing there is no share
    text = language_table.table({"same tokens": rows})
    assert "| same tokens | looped | 1.00 | 1.00 | 1.0 | 0.001 | 2 | 3.8000 [3.7000, 3.9000] | 67% (60%, -) |" in text
    tuned = [
        row("looped", 3.7, rate=1e-3),
        row("looped", 3.6, rate=2e-3),
        row("equal", 4.0),
        row("equal", 4.1, rate=2),
    ]
    assert language_table.best_rates(tuned) == {"looped": 2e-3, "equal": 1e-3}
    tuned += [row("looped", 4.5, seed=1, rate=2e-3), row("looped", 3.8, seed=1, rate=1e-3)]
    assert language_table.best_rates(tuned)["looped"] == 1e-3  # of the mean over seeds
    text = language_table.table({"other rates": tuned})
    assert [line.split("|")[6:8] for line in text.splitlines() if "looped" in line] == [
        [" 0.001 ", " 2 "],
        [" 0.002 ", " 2 "],
    ]


def test_the_share_of_mean_losses_is_over_the_seeds_that_all_three_have():
    rows = [row("equal", 4.0), row("looped", 3.7), row("twice", 3.5), row("equal", 9.0, seed=1)]
    assert language_table.share_of_means(rows) == pytest.approx(0.6)
    rows += [row("looped", 8.9, seed=1), row("twice", 8.9, seed=1)]
    assert language_table.share_of_means(rows) == pytest.approx(0.4 / 0.6)
    assert language_table.share_of_means(rows[:2]) is None


def test_another_rate_names_its_contestant():
    assert language.name_and_rate("twice=1e-2") == ("twice", 0.01)
    with pytest.raises(argparse.ArgumentTypeError, match="'once=1e-2' must begin with one of looped, twice and equal"):
        language.name_and_rate("once=1e-2")
    for text in ("twice", "twice=fast", "twice=0", "twice=-1e-2", "twice=nan", "twice=inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' must end in a learning rate above 0"):
            language.name_and_rate(text)


def recorded_options(*words: str) -> argparse.Namespace:
    """Options as the language benchmark parses them."""
    return language.option_parser().parse_args(["--text", "a/train.txt", "--eval", "valid.txt", *words])


#: What a million tokens are in whole blocks of 128.
SEEN = 999_936


def recording(tmp_path: Path, *words: str) -> Path:
    """What a call of the language benchmark wrote about one run of each contestant."""
    shapes = language_contestants.NARROW._asdict()
    shapes |= {name: part._asdict() for name, part in shapes.items() if isinstance(part, language_contestants.Shape)}
    command = ["python", "benchmarks/language.py", "--text", "b/train.txt", "--eval", "valid.txt", *words]
    tuning = [row("twice", 4.5, rate=2e-3) | {"tokens": SEEN}]
    runs = [row(name, loss) | {"tokens": SEEN} for name, loss in (("equal", 4.0), ("looped", 3.9), ("twice", 3.7))]
    path = tmp_path / "record.json"
    record = {"command": " ".join(command), "preset": shapes, "tuning": tuning, "same tokens": {"runs": runs}}
    small_runs.write_json(path, record)
    return path


def test_recorded_runs_of_the_same_contestants_are_not_repeated(tmp_path):
    path = recording(tmp_path, "--bf16", "--preset", "narrow", "--tuning-tokens", "5")
    options = recorded_options("--bf16", "--preset", "wide_core", "--tokens", "7")
    found = language.recorded_runs(path, options, language.option_parser())
    stacks = {("equal", 1e-3): 4.0, ("twice", 1e-3): 3.7, ("twice", 2e-3): 4.5}
    assert {(job.name, job.learning_rate): run["loss"] for job, run in found.items()} == stacks
    options.known = found
    job = language.Job("twice", 1e-3, 0, 10**6)
    assert language.train(options, job, tmp_path) == found[job._replace(tokens=SEEN)]
    options = recorded_options("--bf16", "--preset", "narrow")
    found = language.recorded_runs(path, options, language.option_parser())
    assert {(job.name, job.learning_rate): run["loss"] for job, run in found.items()} == {
        **stacks,
        ("looped", 1e-3): 3.9,
    }


def test_recorded_runs_of_the_other_precision_stand_and_say_so(tmp_path):
    path = recording(tmp_path, "--bf16")
    record = json.loads(path.read_text())
    record["same tokens"]["runs"] += [row("equal", 4.1, seed=1) | {"tokens": SEEN, "bf16": False}]
    small_runs.write_json(path, record)
    found = language.recorded_runs(path, recorded_options("--preset", "narrow"), language.option_parser())
    said = {(job.name, job.seed): run["bf16"] for job, run in found.items()}
    assert said == {("equal", 0): True, ("looped", 0): True, ("twice", 0): True, ("equal", 1): False}


def test_several_calls_can_be_gone_on_with(tmp_path, monkeypatch, capsys):
    first = recording(tmp_path)
    record = json.loads(first.read_text())
    record["same tokens"]["runs"] = [row("equal", 4.1, seed=1) | {"tokens": SEEN}]
    small_runs.write_json(second := tmp_path / "second.json", record)
    words = ["language.py", "--text", "a/train.txt", "--eval", "valid.txt", "--preset", "narrow", "--recorded"]
    monkeypatch.setattr("sys.argv", [*words, str(first), str(second)])
    known = language.parse().known
    assert {(job.name, job.seed) for job in known} == {("equal", 0), ("looped", 0), ("twice", 0), ("equal", 1)}
    monkeypatch.setattr("sys.argv", [*words, str(first), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        language.parse()
    assert "--recorded" in (said := capsys.readouterr().err)
    assert "none.json: [Errno 2]" in said


def test_a_call_that_was_stopped_left_its_runs(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    words = ["--text", "train.txt", "--eval", "valid.txt", "--bf16", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmarks/language.py", *words])
    options = language.option_parser().parse_args(words)
    so_far = [row(name, 4.0) | {"tokens": SEEN} for name in ("looped", "twice")]
    language.write(options, [], {}, so_far)
    found = language.recorded_runs(path, options, language.option_parser())
    assert list(found.values()) == [run | {"bf16": True} for run in so_far]
    language.write(options, so_far, {"same tokens": so_far})
    assert "unfinished" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "tiny"], "none of its contestants is one of --preset tiny"),
        (["--preset", "narrow", "--optimizer", "adamw"], "other settings: optimizer='muon' there and 'adamw' here"),
        (["--preset", "narrow", "--length", "64"], "length=128 there and 64 here"),
        (["--preset", "narrow", "--eval", "other.txt"], "eval='valid.txt' there and 'other.txt' here"),
    ],
)
def test_recorded_runs_of_others_are_refused(words, says, tmp_path):
    path = recording(tmp_path)
    with pytest.raises(ValueError, match=says):
        language.recorded_runs(path, recorded_options(*words), language.option_parser())


def folder_of_a_run(work: Path, job: language.Job, *words: str) -> argparse.Namespace:
    """Options of a call, with the folder of a run that a call with the words `words` began under `work`."""
    began = recorded_options("--bf16", "--work", str(work), *words)
    folder = language.folder_of(began, job)
    folder.mkdir()
    arguments = language.arguments_of(began, job, work / "tokenizer")
    command = shlex.join(["python", "-m", "modeling_looped", "train", *arguments])
    small_runs.write_json(folder / "run.json", {"command": command, "status": "running"})
    return began


@pytest.mark.parametrize("name", language_table.NAMES)
def test_a_folder_of_the_same_run_is_gone_on_with_wherever_it_was_moved(name, tmp_path):
    job = language.Job(name, 1e-2, 1, 10**6)
    (there := tmp_path / "there").mkdir()
    options = folder_of_a_run(there, job, "--preset", "narrow")
    here = there.rename(tmp_path / "here")
    options.work = here
    folder = language.folder_of(options, job)
    assert (folder / "run.json").exists()
    language.check_same_run(folder, language.arguments_of(options, job, here / "tokenizer"))
    language.check_same_run(tmp_path / "none", [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "tiny_qk_norm"], '--model=.*"intermediate_size": 256.* there and .*"intermediate_size": 312.*'),
        (["--batch", "16"], "--per_device_train_batch_size='32' there and '16' here"),
        (["--optimizer", "adamw"], "--optim_recipe='muon' there and 'adamw' here"),
    ],
)
def test_a_folder_of_another_run_is_refused(words, says, tmp_path):
    job = language.Job("twice", 1e-2, 0, 10**6)
    folder_of_a_run(tmp_path, job)
    options = recorded_options("--bf16", "--work", str(tmp_path), *words)
    with pytest.raises(ValueError, match=f"is of another run: .*{says}.*Choose another --work, or remove it"):
        language.check_same_run(
            language.folder_of(options, job), language.arguments_of(options, job, tmp_path / "tokenizer")
        )


RECORDS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("language*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_figures_in_the_repository_need_no_repeating(path):
    record = json.loads(path.read_text())
    parser = language.option_parser()
    options = parser.parse_args(shlex.split(record["command"])[2:])
    found = language.recorded_runs(path, options, parser).values()
    runs = (*record["tuning"], *record["same tokens"]["runs"])
    assert all({"bf16": options.bf16} | run in found for run in runs)


@pytest.mark.parametrize("name_of_preset", language_contestants.PRESETS)
def test_contestants_of_the_language_benchmark_have_the_sizes_that_it_says(name_of_preset):
    preset, length = language_contestants.PRESETS[name_of_preset], 16
    found = {
        name: language_contestants.costs(language_contestants.fields_of(name, preset, length), length)
        for name in language_table.NAMES
    }
    parameters = {name: count for name, (count, _) in found.items()}
    flops = {name: cost for name, (_, cost) in found.items()}
    # The middle layer loses with more, too; norms per loop of narrower heads make 96 parameters more of 430,944.
    most = {"tiny_middle": 1.01, "tiny_qk_norm": 1.0003}.get(name_of_preset, 1)
    assert 0.98 * parameters["equal"] < parameters["looped"] <= most * parameters["equal"]
    assert preset.twice.layers == 2 * preset.stacked.layers
    times = 1.77 if name_of_preset in ("tiny", "tiny_middle") else 2
    assert parameters["twice"] == pytest.approx(times * parameters["equal"], rel=5e-3)
    kinds = {name: language_contestants.fields_of(name, preset, length)["model_type"] for name in ("equal", "twice")}
    assert set(kinds.values()) == {"qwen3" if preset.qk_norm else "llama"}
    assert found["looped_drawn"] == found["looped"]  # on average, it runs as many loops
    head = 6 * preset.vocabulary * (preset.embeddings or preset.looped.width)
    stored, run = (2 * preset.outer + preset.looped.layers * loops for loops in (1, preset.loops))
    assert flops["looped"] - head == pytest.approx(run / stored * (flops["once"] - head), rel=0.1)


def double(settings: dict) -> dict:
    """A run that does next to nothing; a module's function, for other processes to find."""
    return {"doubled": 2 * settings["number"]}


def test_finished_runs_are_read_and_not_run_again(tmp_path):
    jobs = {"one": {"number": 1}}
    small_runs.write_json(tmp_path / "one.json", {"settings": {"number": 1}, "result": {"doubled": "read"}})
    assert small_runs.run_all(double, jobs, tmp_path, workers=1) == {"one": {"doubled": "read"}}
    with pytest.raises(ValueError, match="other settings"):
        small_runs.run_all(double, {"one": {"number": 3}}, tmp_path, workers=1)


def test_training_steps_lower_the_loss_and_stop_at_one_that_is_not_finite():
    torch.manual_seed(0)
    model, ids = tiny_model(), random_tokens(2, 7)
    losses = [s.loss for s in small_runs.training_steps(model, lambda step: (ids, ids), steps=8, learning_rate=1e-2)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    assert len(list(small_runs.training_steps(model, lambda step: (ids, ids), steps=8, learning_rate=1e-2))) == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_flops_have_those_of_attention(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    ids = random_tokens(2, 64)
    counted = small_runs.training_flops(model, ids)
    assert counted == pytest.approx(ids.numel() * model.training_flops_per_token(sequence_length=64), rel=1e-2)
    assert counted > 1.05 * ids.numel() * model.training_flops_per_token(sequence_length=1)
    assert model.config._attn_implementation == implementation


def test_files_of_figures_are_json_that_everybody_reads(tmp_path):
    assert small_runs.finite(math.nan) is None
    with pytest.raises(ValueError, match="JSON"):
        small_runs.write_json(tmp_path / "x.json", {"loss": math.nan})
    options = argparse.Namespace(workers=2, quick=True)
    small_runs.write_json(tmp_path / "x.json", small_runs.described(options))
    assert json.loads((tmp_path / "x.json").read_text())["quick"] is True
