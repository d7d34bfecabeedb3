"""Reports: layer maps, distances to the teacher, run logs, pictures, and the program that writes them."""

import copy
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, tiny_model
from teachers import save_teacher, tiny_teacher
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer

from modeling_looped.accounting import parameter_counts, token_flops
from modeling_looped.conversion import retrofit, retrofit_checkpoint
from modeling_looped.conversion.compress import compress
from modeling_looped.conversion.layer_plan import shared_plan
from modeling_looped.conversion.manifest import retrofit_manifest
from modeling_looped.conversion.verification import mean_loss
from modeling_looped.reporting.costs import costs
from modeling_looped.reporting.distances import layer_errors, layer_states, loop_distances
from modeling_looped.reporting.layer_map import layer_map_of, read_manifest
from modeling_looped.reporting.report import measure, write_report
from modeling_looped.reporting.run_log import read_run

WINDOWS = [random_tokens(1, 9, seed=seed) for seed in (1, 2)]
PNG = b"\x89PNG\r\n\x1a\n"


def program(name: str):
    """A program of the folder `conversion/`, as a module."""
    path = Path(__file__).parents[1] / "conversion" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compressed(teacher, *, order="cycle", rank=0):
    plan = shared_plan(1, 2, 1, 2, order=order)
    model = compress(teacher, plan, rank=rank).model.eval()
    manifest = {"plan": json.loads(json.dumps(dataclasses.asdict(plan))), "dropped_layers": []}
    return model, layer_map_of(manifest, model.config)


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher("llama")


def test_layer_maps_say_which_teacher_layer_every_run_stands_for(teacher):
    looped = retrofit(teacher, 2, 3, 1, 2)
    layers = layer_map_of(retrofit_manifest(teacher, looped), looped.config)
    assert [layers.of(layer, loop) for layer, loop in ((0, 0), (2, 0), (2, 1), (4, 7), (5, 0))] == [0, 2, 2, 4, 5]
    _, layers = compressed(teacher)
    assert [layers.of(layer, loop) for layer, loop in ((0, 0), (1, 0), (1, 1), (2, 1), (1, 5), (3, 0))] == [
        *(0, 1, 3, 4, 3, 5)
    ]


def test_a_retrofit_at_one_loop_has_no_distance_and_its_layers_no_error(teacher):
    looped = retrofit(teacher, 2, 3, 1, 2).eval()
    layers = layer_map_of(retrofit_manifest(teacher, looped), looped.config)
    start, end = loop_distances(looped, teacher, layers, WINDOWS, num_loops=1)
    assert (start.layer, start.teacher_layer, end.layer, end.teacher_layer) == (None, 1, 4, 4)
    assert max(start.relative_l2, end.relative_l2) < 1e-5
    assert min(start.cosine, end.cosine) == pytest.approx(1.0, abs=1e-5)
    assert loop_distances(looped, teacher, layers, WINDOWS, num_loops=2)[-1].relative_l2 > 1e-3
    errors = layer_errors(looped, teacher, layers, WINDOWS)
    assert [(row.layer, row.loop) for row in errors] == [
        *((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (3, 1), (4, 1), (5, 0))
    ]
    assert max(row.of_update for row in errors) < 1e-4


@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_a_compression_at_full_rank_stays_at_its_teacher(teacher, order):
    model, layers = compressed(teacher, order=order, rank=48)
    distances = loop_distances(model, teacher, layers, WINDOWS)
    assert [row.teacher_layer for row in distances] == ([0, 2, 4] if order == "cycle" else [0, 1, 2, 3, 4])
    assert max(row.relative_l2 for row in distances) < 1e-4
    assert max(row.of_update for row in layer_errors(model, teacher, layers, WINDOWS)) < 1e-3


def test_layer_errors_are_those_of_the_merged_layer_in_the_teachers_place(teacher):
    model, layers = compressed(teacher)
    rows = {(row.layer, row.loop): row for row in layer_errors(model, teacher, layers, WINDOWS)}
    assert rows[0, 0].of_update < 1e-5  # kept as it is
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, parameter in changed.model.layers[3].named_parameters():
            if "norm" not in name:
                parameter.copy_((parameter + teacher.model.layers[1].get_parameter(name)) / 2)
    pairs = [(layer_states(changed, window), layer_states(teacher, window)) for window in WINDOWS]
    ours, theirs = (torch.cat([pair[side][4].flatten() for pair in pairs]) for side in (0, 1))
    before = torch.cat([pair[1][3].flatten() for pair in pairs])
    row = rows[1, 1]
    assert row.teacher_layer == 3
    assert row.of_output == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-4)
    assert row.of_update == pytest.approx(((ours - theirs).norm() / (theirs - before).norm()).item(), rel=1e-4)


def test_models_that_do_not_belong_together_are_refused(teacher):
    model, layers = compressed(teacher)
    with pytest.raises(ValueError, match="teacher layer 5, and this teacher has 0-3"):
        loop_distances(model, tiny_teacher("llama", num_hidden_layers=4), layers, WINDOWS)
    with pytest.raises(ValueError, match="hidden_size=64 must be the model's 32"):
        layer_errors(model, tiny_teacher("llama", hidden_size=64), layers, WINDOWS)
    with pytest.raises(ValueError, match="windows is empty"):
        layer_errors(model, teacher, layers, [])
    plan = json.loads(json.dumps(dataclasses.asdict(shared_plan(1, 2, 1, 2))))
    other = retrofit(teacher, 2, 3, 1, 2).config
    with pytest.raises(ValueError, match="maps 4 stored layers and the model has 6"):
        layer_map_of({"plan": plan}, other)
    with pytest.raises(ValueError, match="made by 'import'"):
        layer_map_of({"made_by": "import"}, model.config)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a stock Trainer leaves of four steps with two evaluation sets."""
    folder = tmp_path_factory.mktemp("run")
    rows = sentence_dataset()
    options = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    arguments = run_arguments(folder, include_num_input_tokens_seen="all", **options)
    trainer = Trainer(
        tiny_model(),
        arguments,
        train_dataset=rows,
        eval_dataset={"docs": rows, "english": rows},
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    trainer.train()
    (folder / "run.json").write_text(json.dumps({"learning_rate": 5e-5}))
    return folder, trainer.state


def test_a_trainers_log_is_read_as_curves_over_tokens(run_folder):
    folder, state = run_folder
    run = read_run(folder)  # from the last checkpoint: nothing else holds the state
    assert (run.axis, run.steps, run.settings) == ("tokens", 4, {"learning_rate": 5e-5})
    assert set(run.curves) == {"training", "docs", "english"}
    assert run.curves["training"].y == [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert run.curves["training"].x[-1] == state.num_input_tokens_seen
    assert run.curves["docs"].x == [run.curves["training"].x[1], run.curves["training"].x[3]]


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trainer_state\.json"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1}]}')
    with pytest.raises(ValueError, match="has no losses"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(ValueError, match="is not JSON"):
        read_run(tmp_path)


def test_a_report_holds_what_was_measured_with_pictures(teacher, run_folder, tmp_path):
    model, layers = compressed(teacher)
    lines = []
    report = measure(
        model,
        {"text": WINDOWS},
        loops=[2, 1],
        context=16,
        teacher=teacher,
        layers=layers,
        run=read_run(run_folder[0]),
        progress=lines.append,
    )
    assert report.losses == {"text": {loops: mean_loss(model, WINDOWS, num_loops=loops) for loops in (1, 2)}}
    assert report.teacher_losses == {"text": mean_loss(teacher, WINDOWS)}
    assert report.tokens == {"text": 18}
    two = report.costs[1]
    assert two == costs(model, 2, sequence_length=16)
    assert two.flops_per_token == token_flops(model, num_loops=2, sequence_length=16).forward
    assert (two.layers_run, two.kv_bytes) == (6, model.kv_cache_bytes(16, num_loops=2))
    assert two.effective_parameters == parameter_counts(model, 2).effective
    assert sum("loss" in line for line in lines) == 3

    path = write_report(report, model, tmp_path / "report", name="tiny", command="python report.py")
    text = path.read_text()
    pictures = {file.name for file in path.parent.glob("*.png")}
    assert pictures == {name.split(")")[0] for name in text.split("](")[1:]}
    assert len(pictures) == 4
    assert all(file.read_bytes().startswith(PNG) for file in path.parent.glob("*.png"))
    assert f"{report.losses['text'][2]:.3f}" in text
    figures = json.loads((path.parent / "report.json").read_text())
    assert figures["losses"]["text"]["2"] == report.losses["text"][2]
    assert len(figures["errors"]) == 6


def test_what_cannot_be_measured_is_refused_before_any_work(teacher):
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one text"):
        measure(model, {"text": []}, loops=[1])
    with pytest.raises(ValueError, match="num_loops=0"):
        measure(model, {"text": WINDOWS}, loops=[0])
    with pytest.raises(ValueError, match="loops is empty"):
        measure(model, {"text": WINDOWS}, loops=[])
    with pytest.raises(ValueError, match="teacher and layers go together"):
        measure(model, {"text": WINDOWS}, loops=[1], teacher=teacher)
    with pytest.raises(ValueError, match="in training mode"):
        measure(tiny_model().train(), {"text": WINDOWS}, loops=[1])


@pytest.fixture(scope="module")
def looped_folder(tmp_path_factory):
    """A retrofitted tiny checkpoint beside its teacher, and a text."""
    folder = tmp_path_factory.mktemp("looped")
    save_teacher(folder / "teacher")
    (folder / "text.md").write_text("the cat sat on the mat and then the other cat sat there too " * 3)
    retrofit_checkpoint(
        str(folder / "teacher"), folder / "model", prelude=2, core=2, coda=2, loops=2, text=folder / "text.md"
    )
    return folder


def test_the_programs_make_a_report_and_a_card(looped_folder, tmp_path, capsys):
    arguments = ["--model", looped_folder / "model", "--teacher", looped_folder / "teacher", "--context", 16]
    arguments += ["--text", looped_folder / "text.md", "--loops", 1, 2, "--output", tmp_path / "report"]
    assert program("report").main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "loss on text at 2 loops" in printed
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["distances"][0]["relative_l2"] < 1e-5
    assert read_manifest(looped_folder / "model")["core"] == 2

    arguments = ["--model", looped_folder / "model", "--report", tmp_path / "report", "--license", "apache-2.0"]
    arguments += ["--output", tmp_path / "card.md"]
    assert program("model_card").main(list(map(str, arguments))) == 0
    assert "| core | 2-3 | 2-3 | 2 |" in (tmp_path / "card.md").read_text()
    assert program("model_card").main(list(map(str, arguments))) == 1
    assert "pass --force" in capsys.readouterr().err

    # a healed model has its manifest where it began
    healed = shutil.copytree(looped_folder / "model", tmp_path / "healed")
    (healed / "start").mkdir()
    (healed / "looped_manifest.json").rename(healed / "start" / "looped_manifest.json")
    arguments = ["--model", healed, *arguments[2:-1], tmp_path / "healed.md"]
    assert program("model_card").main(list(map(str, arguments))) == 0
    card = (tmp_path / "healed.md").read_text()
    assert "SHA-256 of model.safetensors" in card
    assert "Which loop counts were trained was not recorded." in card


def test_the_program_says_what_is_missing(looped_folder, tmp_path, capsys):
    base = ["--model", str(looped_folder / "model"), "--output", str(tmp_path / "out")]
    for arguments, message in (
        (["--run", str(tmp_path)], "holds no trainer_state.json"),
        (["--text", str(tmp_path / "none.txt")], "No such file"),
        (["--teacher", str(looped_folder / "teacher"), "--manifest", str(tmp_path / "m.json")], "does not exist"),
        (["--context", "0"], "context=0"),
    ):
        assert program("report").main([*base, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
