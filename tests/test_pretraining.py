"""`python -m modeling_looped train`: what a run leaves behind, going on after a kill, and what is refused."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from killing import killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped.__main__ import COMMANDS
from modeling_looped.__main__ import main as command_line
from modeling_looped.accounting import token_flops
from modeling_looped.scaling.runs import gather
from modeling_looped.training.data import Source, packed_blocks
from modeling_looped.training.fresh_model import build_config, check_config, config_values, fresh_model
from modeling_looped.training.pretraining import PretrainingConfig, PretrainingRun
from modeling_looped.training.recipe import parse_recipe

pytest_plugins = ("pretraining_place",)

ROOT = Path(__file__).parent.parent

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}


def train(place, output, *more):
    return command_line(["train", "--recipe", str(place / "recipe.yaml"), "--output_dir", str(output), *more])


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run from the recipe to its folder."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(place, output) == 0
    return output


@pytest.fixture(scope="module")
def record(finished):
    return json.loads((finished / "run.json").read_text())


def test_a_run_leaves_its_record(finished, record):
    assert record["status"] == "finished"
    assert record["steps"] == 16
    assert record["tokens_seen"] == record["data"]["tokens"] == 1024
    assert record["tokens_per_second"] > 0
    assert record["recipe"]["muon_weight_decay"] == 0.2
    assert record["model"]["vocab_size"] == record["tokenizer"]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(finished)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    log = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert losses[0] == pytest.approx(math.log(record["tokenizer"]["tokens"]), rel=0.05)
    counted = next(entry["total_flos"] for entry in log if "total_flos" in entry)
    # exactly what was drawn: tests/test_accounting.py
    least, most = (
        1024 * token_flops(model, num_loops=loops, sequence_length=16, shallowest=1).training
        for loops in (1, model.config.max_trained_loops)
    )
    assert least < counted < most


def test_evaluation_is_the_mean_over_all_tokens_at_every_loop_count(place, finished, record):
    """Against a plain computation, block by block; the sets fill no whole number of batches."""
    metrics = record["metrics"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    blocks = torch.from_numpy(packed_blocks(Source(str(place / "valid.txt")), tokenizer, 16).blocks).long()
    assert len(blocks) % 7
    text = (place / "valid.txt").read_text(encoding="utf-8")
    # what the blocks leave out: the first token of each, and the end of the text
    rest = tokenizer.decode(tokenizer(text)["input_ids"][blocks.numel() :])
    heads = "".join(tokenizer.decode([block[0]]) for block in blocks)
    size = len(text.encode()) - len(rest.encode()) - len(heads.encode())
    assert metrics["eval_valid_bytes"] == pytest.approx(size, rel=0.05)  # a block may begin inside a character
    assert metrics["eval_valid_tokens"] == blocks[:, 1:].numel()
    for prefix, loops in (("eval_valid", 3), ("eval_valid_loops_1", 1), ("eval_valid_loops_5", 5)):
        with torch.no_grad():
            logits = model(blocks, num_loops=loops).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="sum").item()
        assert metrics[f"{prefix}_loss"] == pytest.approx(total / blocks[:, 1:].numel(), rel=1e-5)
        nats = metrics[f"{prefix}_nats_per_byte"]
        assert nats * metrics["eval_valid_bytes"] == pytest.approx(total, rel=1e-5)
        assert metrics[f"{prefix}_bits_per_byte"] == pytest.approx(nats / math.log(2))
    assert "eval_valid_loops_3_loss" not in metrics  # it is eval_valid_loss


@pytest.mark.parametrize("batch", ["7", "100000"])
def test_dropping_last_batches_is_of_training_alone(batch, place, tmp_path):
    """Else nats per byte would be those of some blocks divided by the bytes of all."""
    found = []
    for drop in ("true", "false"):
        more = ["--max_steps", "1", "--dataloader_drop_last", drop, "--per_device_eval_batch_size", batch]
        assert train(place, tmp_path / drop, *more) == 0
        metrics = json.loads((tmp_path / drop / "run.json").read_text())["metrics"]
        found.append({name: metrics[name] for name in ("eval_valid_loss", "eval_valid_nats_per_byte")})
    assert found[0] == found[1]


def test_a_run_is_a_row_of_a_scaling_table_or_one_per_loop_count(finished, record):
    (row,) = gather([finished]).to_dict("records")
    assert (row["loss"], row["tokens"], row["loops"]) == (record["metrics"]["eval_valid_loss"], 1024, 3)
    table = gather([finished], "valid", every_loop=True).set_index("loops")
    assert sorted(table.index) == [1, 3, 5]
    assert table.loc[5, "loss"] == record["metrics"]["eval_valid_loops_5_loss"]
    assert (table.loc[5, "effective_depth"], table.loc[3, "effective_depth"]) == (7, 5)
    assert table["trained_loops"].nunique() == table["parameters"].nunique() == 1


@pytest.mark.slow
def test_the_folder_loads_alone_in_a_new_process(finished, tmp_path):
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; f = sys.argv[1]; "
        "m, t = M.from_pretrained(f, trust_remote_code=True), T.from_pretrained(f, trust_remote_code=True); "
        "ids = t('the cat sat', return_tensors='pt'); "
        "print(m.generate(**ids, max_new_tokens=4, do_sample=False)[0].tolist())"
    )
    # from a folder without the package, whose remote code must do
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(finished)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    ids = tokenizer("the cat sat", return_tensors="pt")
    assert json.loads(result.stdout) == model.generate(**ids, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.parametrize("more", [[], ["--max_steps", "7"], ["--dataset_streaming", "true"]], ids=" ".join)
def test_the_same_command_again_changes_nothing(more, place, tmp_path):
    """A rate that does not end at 0 would show another step in the weights."""
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    del recipe["cooldown_steps"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "lr_scheduler_type": "constant"}))
    assert train(tmp_path, tmp_path, *more) == 0
    weights, record = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "run.json").read_text())
    assert record["metrics"]["train_loss"] > 0
    assert train(tmp_path, tmp_path, *more) == 0
    after, again = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "run.json").read_text())
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    times = {"finished": None, "metrics": {**record["metrics"], **timings(again["metrics"])}}
    assert {**again, "finished": None} == {**record, **times}
    assert len(list(tmp_path.glob("checkpoint-*"))) == -(-record["steps"] // 4)


def timings(metrics: dict) -> dict:
    """Those that say how fast something was evaluated."""
    return {name: value for name, value in metrics.items() if name.endswith(("_runtime", "_per_second"))}


def test_a_stream_that_begins_again_goes_on_bit_exactly(place, tmp_path):
    lines = (place / "train.jsonl").read_text().splitlines(keepends=True)[:10]
    (tmp_path / "short.jsonl").write_text("".join(lines))
    assert sum(len(json.loads(line)["text"].encode()) + 1 for line in lines) < 20 * 64  # the steps before the kill
    more = [
        "--dataset_name",
        str(tmp_path / "short.jsonl"),
        "--dataset_streaming",
        "true",
        "--max_train_tokens",
        "2048",
    ]
    assert train(place, tmp_path / "straight", *more) == 0
    killed(lambda: train(place, tmp_path / "killed", *more), "step 26/", 0.0)
    assert train(place, tmp_path / "killed", *more) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_finished_model_is_not_written_over_by_another_run(place, tmp_path, capsys):
    more = ["--save_strategy", "no", "--max_steps", "2"]
    assert train(place, tmp_path, *more) == 0
    assert train(place, tmp_path, *more, "--model_config", '{"num_loops": 4}') == 1
    assert "holds the finished model of a run with another `model`" in capsys.readouterr().err
    assert train(place, tmp_path, *more) == 0


@pytest.mark.parametrize("streaming", [False, True], ids=["blocks", "stream"])
def test_killed_at_any_moment_it_goes_on_bit_exactly(streaming, place, finished, tmp_path):
    """kill -9 at moments of chance, in the middle of writing among them; the result is that of a run left alone."""
    more = ["--dataset_streaming", "True"] if streaming else []
    straight = tmp_path / "straight" if streaming else finished
    if streaming:
        assert train(place, straight, *more) == 0
    draw = random.Random(streaming)
    for step in (4, 12):  # a checkpoint is being written when these are reported
        killed(lambda: train(place, tmp_path / "killed", *more), f"step {step}/", draw.uniform(0.0, 0.04))
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert train(place, tmp_path / "killed", *more) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "killed"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    logs = [json.loads((folder / "trainer_state.json").read_text()) for folder in (straight, tmp_path / "killed")]
    losses = [[entry["loss"] for entry in log["log_history"] if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]


def test_a_stacked_baseline_trains_with_the_same_program(place, tmp_path):
    more = ["--model", json.dumps(LLAMA), "--max_train_tokens", "128"]
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    del recipe["eval_num_loops"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train(tmp_path, tmp_path / "llama", *more) == 0
    record = json.loads((tmp_path / "llama" / "run.json").read_text())
    assert record["model"]["model_type"] == "llama"
    assert record["metrics"]["eval_valid_bits_per_byte"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.eos_token_id == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--learning_rat", "1"], "no option is called 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--model", '{"hidden_sise": 8}'], "model: no option is called 'hidden_sise' (did you mean 'hidden_size'?)"),
        (["--model", '{"model_type": "lama"}'], "no model_type='lama'; did you mean 'llama'?"),
        (["--model", "no/where.json"], "model='no/where.json' must be a JSON file, a folder that holds"),
        (["--model_config", '{"num_loops": 0}'], "num_loops=0"),
        (["--model_config", '{"vocab_size": 100}'], "vocab_size=100 is less than the"),
        (["--model_config", '{"eos_token_id": 7}'], "eos_token_id=7 is not the tokenizer's, which is 0"),
        (["--model_config", '{"is_causal": false}'], "is_causal=False is an encoder"),
        (["--model", json.dumps(LLAMA)], "eval_num_loops=[1, 3, 5]: a model of type 'llama' without a core"),
        (["--eval_num_loops", "1", "0"], "eval_num_loops=[1, 0] must be different numbers of at least 1"),
        (["--max_length", "65"], "max_length=65 is more than the model's max_position_embeddings=64"),
        (["--attn_implementation", "quick"], "attn_implementation='quick': Specified"),
        (["--tokenizer_vocab_size", "100"], "tokenizer_vocab_size=100 must be at least 258"),
        (["--tokenizer_name_or_path", "x"], "tokenizer_name_or_path='x' names one that exists: leave one out"),
        (["--dataset_name", "missing.jsonl"], "'missing.jsonl' does not exist"),
        (["--dataset_name", "EMPTY"], "there is no text to train a tokenizer on"),
        (["--optim", "adafactor"], "optim='adafactor' needs optim_recipe='trainer', not 'muon'"),
        (["--optim_args", "a=1"], "optim_args='a=1' needs optim_recipe='trainer'"),
        (["--muon_learning_rate_scale", "rms"], "muon_learning_rate_scale='rms' must be one of: match_rms_adamw"),
    ],
)
def test_what_cannot_work_is_named(wrong, message, place, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    wrong = [str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in wrong]
    assert train(place, tmp_path / "out", *wrong) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": None}, "max_length=None must be given"),
        ({"max_length": [3]}, "max_length=[3] must be an integer"),
        ({"max_length": 16.5}, "max_length=16.5 must be an integer"),
        ({"max_train_tokens": "many"}, "max_train_tokens='many' must be an integer"),
        ({"learning_rate": True}, "learning_rate=True must be a number"),
        ({"telemetry": "maybe"}, "telemetry='maybe' must be true or false"),
        ({"telemetry": 3}, "telemetry=3 must be true or false"),
        ({"eval_num_loops": [1, "x"]}, "eval_num_loops=[1, 'x'] must be an integer"),
        ({"dataset_text_field": ["text"]}, "dataset_text_field=['text'] must be text"),
        ({"learning-rat": 1}, "no option is called 'learning-rat' (did you mean 'learning_rate'?)"),
        ({"learning-rate": 1}, "has 'learning_rate' twice"),
    ],
)
def test_values_of_a_recipe_that_its_fields_do_not_take_are_named(values, message, place, tmp_path, capsys):
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **values}))
    assert train(tmp_path, tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_values_of_a_recipe_become_what_their_fields_hold(place, tmp_path):
    recipe = {
        "model": {"hidden_size": 32},
        "dataset_name": "text.jsonl",
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "max-train-tokens": "1e6",
        "max_length": 64.0,
        "learning_rate": "3e-4",
        "eval_num_loops": 4,
        "dataset_streaming": "false",
        "telemetry": "yes",
        "eval_strategy": False,
        "weight_decay": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run, args = parse_recipe(["--recipe", str(tmp_path / "recipe.yaml")], (PretrainingRun, PretrainingConfig))
    assert (run.max_train_tokens, run.max_length, run.dataset_streaming) == (1_000_000, 64, False)
    assert isinstance(run.max_length, int)
    assert (args.learning_rate, args.eval_num_loops, args.telemetry, args.weight_decay) == (3e-4, [4], True, 1)
    assert args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--max_train_tokens", "512"], "holds checkpoints of a run with another `data`"),
        (["--model_config", '{"num_loops": 4}'], "holds checkpoints of a run with another `model`"),
        (["--tokenizer_vocab_size", "280"], "was trained with vocab_size=272 (here 280)"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(other, message, place, finished, capsys):
    assert train(place, finished, *other) == 1
    assert message in capsys.readouterr().err


def test_the_command_line_names_its_commands(capsys):
    assert command_line(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert command_line([]) == 2
    assert command_line(["trian"]) == 2
    assert "there is no command 'trian' (did you mean 'train'?)" in capsys.readouterr().err


RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "configuration" / "recipes").glob("*.yaml"))
    if "model" in yaml.safe_load(path.read_text())
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_reads_and_makes_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    run, args = parse_recipe(["--recipe", str(RECIPES[name]), *more], (PretrainingRun, PretrainingConfig))
    values = config_values(run.model, run.model_config)
    config = build_config({"vocab_size": run.tokenizer_vocab_size, **values})
    check_config(config, run.max_length)
    assert args.scheduler_kwargs(1000)["num_decay_steps"] == 500
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() > 1e6


def test_the_tiny_recipes_have_equally_many_parameters_and_train_alike():
    sizes, others = [], []
    for name in ("parcae_tiny", "llama_tiny"):
        recipe = yaml.safe_load(RECIPES[name].read_text())
        values = {**config_values(recipe.pop("model")), "vocab_size": recipe["tokenizer_vocab_size"]}
        sizes.append(fresh_model(build_config(values), 0).num_parameters())
        for field in ("eval_num_loops", "telemetry", "explosion_guard"):  # of what has loops; they only watch
            recipe.pop(field, None)
        others.append(recipe)
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert others[0] == others[1]


def test_the_seed_decides_the_weights(record):
    config = build_config(config_values(record["recipe"]["model"]) | {"vocab_size": 300})
    one, same, other = (fresh_model(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    assert not torch.equal(other["model.embed_tokens.weight"], one["model.embed_tokens.weight"])


@pytest.mark.parametrize("fields", [{"hidden_size": 32, "num_attention_heads": 2}, LLAMA], ids=["looped", "llama"])
def test_the_attention_can_be_chosen(fields):
    ids = torch.arange(24).reshape(2, 12)
    models = [fresh_model(build_config(config_values(fields)), 0, name).eval() for name in ("eager", "sdpa")]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    one, other = (model(ids).logits for model in models)
    torch.testing.assert_close(one, other)
