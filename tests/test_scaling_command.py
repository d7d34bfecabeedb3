"""`python -m modeling_looped scaling-law`: from a file or run folders to figures, a report and pictures."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
from helpers import tiny_model
from scaling_designs import ISO_DEPTH, PARCAE_140M, iso_depth_sweep, measured, parcae_sweep
from teachers import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerState

from modeling_looped.__main__ import main
from modeling_looped.accounting import parameter_counts
from modeling_looped.conversion.verification import mean_loss, text_windows
from modeling_looped.scaling import fit_law, read_table
from modeling_looped.scaling.runs import gather

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
QUICK = ["--restarts", "32", "--polished", "2", "--bootstrap", "8"]


@pytest.fixture(scope="module")
def runs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "runs.csv"
    design = iso_depth_sweep()
    design["trained_loops"] = design["loops"]
    measured(design, "iso_depth", ISO_DEPTH, 1e-3).rename(columns={"loss": "val"}).to_csv(path, index=False)
    return path


def test_the_command_writes_figures_report_and_pictures(runs_file, tmp_path, capsys):
    arguments = ["scaling-law", "--table", str(runs_file), "--names", "loss=val", "--law", "training", "iso_depth"]
    arguments += ["--hold-out", "tokens > 5e9", "--output", str(tmp_path / "out"), *QUICK]
    arguments += ["--predict", "once_parameters=5e7 recurrent_parameters=1e8 loops=16 tokens=2e9"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "phi = 0.4" in said
    assert "EXTRAPOLATED: loops" in said
    figures = json.loads((tmp_path / "out" / "scaling_law.json").read_text())
    assert figures["command"].startswith("python -m modeling_looped scaling-law --table")
    assert {"scipy", "pandas", "numpy", "modeling_looped"} <= set(figures["versions"])
    assert len(figures["source"]["sha256"]) == 64
    training, iso_depth = figures["fits"]
    assert (training["law"], iso_depth["law"]) == ("training", "iso_depth")
    phi = iso_depth["coefficients"]["phi"]
    assert phi["value"] == pytest.approx(ISO_DEPTH["phi"], abs=0.03)
    assert phi["interval"][0] < phi["value"] < phi["interval"][1]
    assert iso_depth["fitted"]["runs"] + iso_depth["held_out"]["runs"] == 116
    assert iso_depth["held_out"]["runs"] == 8  # 7.13e9 and 7.78e9, four loop counts each
    # the data are of the other law: a loop is not worth layers of its own
    assert training["held_out"]["rmse"] > 3 * iso_depth["held_out"]["rmse"]
    assert training["constraint"]["violated"]  # the sweep has many sizes, and Parcae's has one
    assert not iso_depth["constraint"]["violated"]
    assert iso_depth["predictions"][0]["outside"] == {"loops": 2.0}
    report = (tmp_path / "out" / "scaling_law.md").read_text()
    assert "| iso_depth | 6 |" in report
    assert "effective_depth: held, 20 in all 116 runs" in report
    for name in ("iso_depth_fit", "iso_depth_residuals", "training_fit", "training_residuals"):
        assert f"]({name}.png)" in report
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)


def test_errors_say_what_was_wrong_and_leave_nothing_behind(runs_file, tmp_path, capsys):
    output = tmp_path / "out"
    for more, message in (
        (["--law", "isodepth"], "law='isodepth' is unknown"),
        (["--law", "iso_depth", "--names", "loss=vall"], "has no column 'vall'; it has: once_parameters"),
        (["--law", "iso_depth"], "law='iso_depth' needs a column 'loss'"),
        (["--law", "iso_depth", "--names", "loss=val", "--predict", "loops"], "predict='loops': 'loops' must be"),
        (
            ["--law", "iso_depth", "--names", "loss=val", "--predict", "once_parameters=1e8 recurrent_parameters=1e8"],
            "predict: law='iso_depth' needs a column 'loops'",
        ),
    ):
        assert main(["scaling-law", "--table", str(runs_file), "--output", str(output), *QUICK, *more]) == 1
        assert f"scaling-law: {message}" in capsys.readouterr().err.replace(f"{runs_file} ", "")
        assert not output.exists()
    assert (
        main(["scaling-law", "--table", str(tmp_path / "none.csv"), "--law", "training", "--output", str(output)]) == 1
    )
    assert "none.csv" in capsys.readouterr().err
    for arguments in (["--law", "training", "--output", "x"], ["--table", "x.csv", "--output", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(["scaling-law", *arguments])


def test_laws_and_commands_are_listed_and_unknown_commands_named(capsys):
    assert main(["scaling-law", "--list"]) == 0
    assert "once_parameters, recurrent_parameters, loops, tokens" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "scaling-law" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["scaling-laws"]) == 2
    assert "there is no command 'scaling-laws' (did you mean 'scaling-law'?)" in capsys.readouterr().err


def test_tables_with_names_taken_or_without_rows_are_refused(tmp_path):
    measured(parcae_sweep(), "training", PARCAE_140M, 0.0).to_csv(tmp_path / "runs.tsv", index=False, sep="\t")
    assert len(read_table(tmp_path / "runs.tsv")) == 36
    with pytest.raises(ValueError, match="columns 'loss' and 'tokens': both would be called 'loss'"):
        read_table(tmp_path / "runs.tsv", {"loss": "tokens"})
    (tmp_path / "empty.csv").write_text("loss,tokens\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_table(tmp_path / "empty.csv")


def save_run(folder, model, *, losses, tokens=1000, **settings):
    """What a run leaves of its log and its settings."""
    folder.mkdir()
    history = [{"loss": 9.0, "step": 1}, *({f"eval_{name}_loss": loss, "step": 2} for name, loss in losses.items())]
    state = TrainerState(log_history=[{**entry, "num_input_tokens_seen": tokens} for entry in history])
    state.save_to_json(str(folder / "trainer_state.json"))
    student = {"name": "x", "config": model.config.to_diff_dict()}
    record = {"status": "finished", "tokens_seen": tokens, "student": student, **settings}
    (folder / "run.json").write_text(json.dumps(record, default=str))
    return folder


def test_run_folders_become_a_table(tmp_path):
    looped = tiny_model(num_loops=3, depth_sampling={"type": "uniform", "min_loops": 1, "max_loops": 4})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    stacked = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, **sizes))
    folders = [
        save_run(tmp_path / "looped", looped, losses={"docs": 2.5, "web": 3.5}),
        save_run(tmp_path / "stacked", stacked, losses={"docs": 2.25, "web": 3.25}, tokens=500),
    ]
    table = gather(folders, "docs").set_index("run")
    assert table["loss"].to_dict() == {"looped": 2.5, "stacked": 2.25}
    assert table["tokens"].to_dict() == {"looped": 1000.0, "stacked": 500.0}
    parts = parameter_counts(looped).parts
    row = table.loc["looped"]
    assert row["parameters"] == parameter_counts(looped).unique - parts["embedding"] - parts["head"]
    assert row["recurrent_parameters"] == parts["core"] + parts["loop"] > 0
    assert (row["loops"], row["trained_loops"]) == (3, pytest.approx(2.5))
    assert row["effective_depth"] == looped.config.num_hidden_layers
    ends = 2 * 32 * 16
    assert table.loc["stacked", "parameters"] == stacked.num_parameters() - ends
    assert table.loc["stacked", ["recurrent_parameters", "loops", "effective_depth"]].tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="has 2 evaluation losses, and one must be chosen: docs, web"):
        gather(folders)
    with pytest.raises(ValueError, match="2 evaluation losses called 'code': docs, web"):
        gather(folders, "code")
    unfinished = save_run(tmp_path / "unfinished", stacked, losses={"docs": 2.0}, status="running")
    with pytest.raises(ValueError, match=r"is not finished \(status 'running'\)"):
        gather([unfinished])
    (unfinished / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run.json that names its model"):
        gather([unfinished])


def test_the_test_time_curve_is_measured_fitted_and_gone_on_with(tmp_path, capsys):
    """`benchmarks/test_time_curve.py`, on a model that was never trained: the figures, not the law, are at issue."""
    spec = importlib.util.spec_from_file_location("curve", ROOT / "benchmarks" / "test_time_curve.py")
    curve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curve)
    model = tiny_model(vocab_size=300, num_loops=3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and then the other cat sat there too " * 4)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--length", "32"]
    arguments += ["--hold-out", "5", "6", "--output", str(tmp_path / "curve.json"), "--resamples", "4"]
    assert curve.main([*arguments, "--loops", "6"]) == 0
    first = json.loads((tmp_path / "curve.json").read_text())
    assert list(first["losses"]) == ["1", "2", "3", "4", "5", "6"]
    windows = text_windows(tiny_tokenizer(), (tmp_path / "text.txt").read_text(), length=32)
    assert first["losses"]["5"] == pytest.approx(mean_loss(model, windows, num_loops=5), rel=1e-6)
    plateau, decay, rate = (first["coefficients"][name] for name in ("L_inf", "Z", "z"))
    law = {loops: plateau + decay * math.exp(-rate * loops) for loops in (5, 6)}
    error = math.sqrt(sum((law[loops] - first["losses"][str(loops)]) ** 2 for loops in (5, 6)) / 2)
    nearest = math.sqrt(sum((first["losses"]["4"] - first["losses"][str(loops)]) ** 2 for loops in (5, 6)) / 2)
    assert first["held_out"]["rmse"] == pytest.approx(error)
    assert first["nearest_loop_rmse"] == pytest.approx(nearest)
    assert first["ratio_to_nearest_loop"] == pytest.approx(error / nearest)
    capsys.readouterr()
    assert curve.main([*arguments, "--loops", "7"]) == 0
    assert [line[:7] for line in capsys.readouterr().out.splitlines() if " loops: " in line] == ["7 loops"]
    assert curve.main([*arguments, "--loops", "8", "--tokens", "64"]) == 1
    assert "name another" in capsys.readouterr().err
    for more, message in (
        (["--loops", "5"], "hold_out=[6] must lie in 1..loops=5"),
        (["--loops", "6", "--hold-out", "4", "5", "6"], "leaves 3 loop counts"),
    ):
        assert curve.main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("sampling", ["poisson", "lognormal_poisson"])
def test_runs_of_sampled_depth_fit_the_training_law(sampling, tmp_path):
    """Their trained loops are a mean, no whole number; beside them lie losses at loops that were not trained."""
    folders = []
    for loops in (2, 4, 8):
        for tokens in (1000, 4000, 16000):
            model = tiny_model(num_loops=loops, depth_sampling=sampling)
            loss = 2.0 + 20.0 / loops**0.5 / 10 + 30.0 / tokens**0.5
            losses = {"docs": loss, "docs_loops_1": loss + 1.0}
            folders.append(save_run(tmp_path / f"{loops}-{tokens}", model, losses=losses, tokens=tokens))
    table = gather(folders, "docs")
    assert all(trained % 1 for trained in table["trained_loops"])
    options = {"restarts": 32, "polished": 2, "resamples": 0}
    assert fit_law("training", table, **options).fitted.runs == 9
    every = gather(folders, "docs", every_loop=True)
    with pytest.raises(ValueError, match=r"9 of 18 rows have other loops .* choose rows with where=") as refused:
        fit_law("training", every, **options)
    where = re.search("where='([^']*)'", str(refused.value))[1]
    assert fit_law("training", every, where=where, **options).fitted.runs == 9
