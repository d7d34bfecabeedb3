"""`telemetry` and `explosion_guard` in recipes: what they log, that they change nothing, and how a run ends."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from modeling_looped.__main__ import main
from modeling_looped.training.pretraining import PretrainingConfig

pytest_plugins = ("pretraining_place",)


def train(place, output, *more):
    return main(["train", "--recipe", str(place / "recipe.yaml"), "--output_dir", str(output), *more])


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_watching_logs_the_loop_and_changes_nothing(place, tmp_path):
    few = ("--max_train_tokens", "512")
    assert train(place, tmp_path / "plain", *few) == 0
    watched = ("--telemetry", "true", "--explosion_guard", "true", *few)
    assert train(place, tmp_path / "watched", *watched) == 0
    entries = [entry for entry in log_of(tmp_path / "watched") if "loss" in entry]
    assert entries
    assert all(0.0 < entry["loop/spectral_radius"] < 1.0 and entry["loop/state_norm_1"] > 0.0 for entry in entries)
    plain = [entry["loss"] for entry in log_of(tmp_path / "plain") if "loss" in entry]
    assert [entry["loss"] for entry in entries] == plain
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(first[name].equal(second[name]) for name in first)


def test_an_explosion_ends_the_program_with_the_last_good_checkpoint(place, tmp_path, capsys):
    guard = ("--explosion_guard", "true", "--save_steps", "1", "--learning_rate", "300.0", "--optim_recipe", "adamw")
    assert train(place, tmp_path / "run", *guard, "--warmup_steps", "2") == 1  # the first step changes nothing
    said = capsys.readouterr().err
    assert "The run stops before more is lost" in said
    assert "The last good checkpoint is" in said
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("field", ["telemetry", "explosion_guard"])
def test_a_model_without_loops_cannot_be_watched(field, place, tmp_path, capsys):
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
    }
    recipe = yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8")) | {"model": llama, field: True}
    del recipe["eval_num_loops"]
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", "--recipe", str(tmp_path / "llama.yaml"), "--output_dir", str(tmp_path / "run")]) == 1
    assert f"{field}=True: LlamaForCausalLM holds no looped model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("telemetry_steps", 0, "telemetry_steps=0 must be None"),
        ("max_state_norm", 0.0, "max_state_norm=0.0 must be above 0"),
    ],
)
def test_values_that_make_no_sense(field, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PretrainingConfig(output_dir=str(tmp_path), use_cpu=True, **{field: value})
