"""`conversion/distill.py`: recipes, data, what a run leaves behind, and going on after being killed at any moment."""

import json
import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from killing import killed
from safetensors.torch import load_file, save_file
from teachers import tiny_tokenizer
from transformers import AutoModelForCausalLM

from modeling_looped.conversion.teacher import find_teacher
from modeling_looped.scaling.runs import gather
from modeling_looped.training.config import DistillationConfig
from modeling_looped.training.data import PackedStream, Source, packed, packed_blocks
from modeling_looped.training.recipe import RunConfig, changed_values, parse_recipe
from modeling_looped.training.run import load_student

ROOT = Path(__file__).parent.parent

#: What a distillation run reads its options into.
CONFIGS = (RunConfig, DistillationConfig)

pytest_plugins = ("distillation_place",)


def arguments(place, output, *more):
    return ["--recipe", str(place / "recipe.yaml"), "--output_dir", str(output), *more]


def distill(place, output, *more):
    import distill

    return distill.main(arguments(place, output, *more))


@pytest.fixture(scope="module")
def finished(place):
    """A run from the recipe to its folder."""
    assert distill(place, place / "run") == 0
    return place / "run"


def test_a_run_leaves_the_healed_model_and_its_record(place, finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["recipe"]["optim_recipe"] == "muon"
    assert record["tokens_seen"] == record["data"]["tokens"] == 1024
    assert record["steps"] == 16
    assert record["parameters"]["student"] == record["parameters"]["trainable"]
    teacher = load_file(place / "teacher" / "model.safetensors")
    assert record["parameters"]["teacher"] == sum(tensor.numel() for tensor in teacher.values())
    assert record["tokens_per_second"] > 0
    assert "model.safetensors" in record["teacher"]["sha256"]
    state = json.loads((finished / "trainer_state.json").read_text())
    losses = [(entry["num_input_tokens_seen"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert losses[0][0] == 128
    assert losses[-1][1] < losses[0][1]
    healed = AutoModelForCausalLM.from_pretrained(finished)
    start = AutoModelForCausalLM.from_pretrained(finished / "start")
    assert not torch.equal(healed.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert record["metrics"]["eval_valid_kl"] > 0
    # every loop's work, not six times the stored parameters
    length = record["data"]["max_length"]
    counted = healed.training_flops_per_token(sequence_length=length) * 1024
    assert record["metrics"]["total_flos"] == counted


def test_a_finished_run_is_a_row_of_a_scaling_table(finished):
    record = json.loads((finished / "run.json").read_text())
    (row,) = gather([finished]).to_dict("records")
    assert (row["tokens"], row["loops"], row["trained_loops"]) == (1024.0, 2, 2.0)
    assert row["loss"] == record["metrics"]["eval_valid_loss"]
    assert 0 < row["recurrent_parameters"] < row["parameters"] < record["parameters"]["student"]


def test_the_same_command_again_changes_nothing(place, finished):
    before = load_file(finished / "model.safetensors")
    assert distill(place, finished) == 0
    after = load_file(finished / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_start_that_is_fitted_reads_the_beginning_of_the_training_text(place, tmp_path):
    options = {"prelude": 1, "core": 2, "coda": 1, "loops": 2, "merge": "first", "rank": 2, "adapter": "fitted"}
    options |= {"text": str(place / "valid.txt"), "calibration-tokens": 256}
    student = json.dumps({"program": "compress", "options": options})
    assert distill(place, tmp_path / "run", "--student", student, "--max_train_tokens", "128") == 0
    manifest = json.loads((tmp_path / "run" / "start" / "looped_manifest.json").read_text())
    assert manifest["settings"]["adapter"] == "fitted"
    assert 0 < manifest["calibration"]["tokens"] <= 256
    texts = [json.loads(line)["text"] for line in (place / "train.jsonl").read_text().splitlines()]
    read = (tmp_path / "run" / "calibration.txt").read_text().split("\n\n")
    assert sorted(read) == sorted(texts)


@pytest.mark.parametrize("streaming", [False, True], ids=["blocks", "stream"])
def test_killed_at_any_moment_it_goes_on_bit_exactly(streaming, place, finished, tmp_path):
    """kill -9 at moments of chance, in the middle of writing among them; the result is that of a run left alone."""
    more = ["--dataset_streaming", "True"] if streaming else []
    straight = tmp_path / "straight" if streaming else finished
    if streaming:
        assert distill(place, straight, *more) == 0
    draw = random.Random(streaming)
    for step in (4, 12):  # a checkpoint is being written when these are reported
        killed(lambda: distill(place, tmp_path / "killed", *more), f"step {step}/", draw.uniform(0.0, 0.04))
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert distill(place, tmp_path / "killed", *more) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "killed"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    moments = [
        torch.load(folder / "checkpoint-16" / "optimizer.pt", weights_only=True)["state"]
        for folder in (straight, tmp_path / "killed")
    ]
    for index, state in moments[0].items():
        assert all(torch.equal(value, moments[1][index][key]) for key, value in state.items())


def other_student(place, **options):
    student = yaml.safe_load((place / "recipe.yaml").read_text())["student"]
    return json.dumps({**student, "options": {**student["options"], **options}})


def test_another_run_in_the_same_folder_is_refused(place, finished, tmp_path, capsys):
    record, weights = (finished / "run.json").read_bytes(), (finished / "model.safetensors").read_bytes()
    copied = shutil.copytree(finished / "start", tmp_path / "start")
    zeroed = {name: tensor * 0 for name, tensor in load_file(copied / "model.safetensors").items()}
    save_file(zeroed, copied / "model.safetensors", {"format": "pt"})
    for more, message in (
        (["--max_train_tokens", "512"], "holds checkpoints of a run with another `data`"),
        (["--temperature", "3.0"], "holds checkpoints of a run with another `objective`"),
        (["--student", str(copied)], "holds checkpoints of a run with another `start`"),
        (["--student_config", '{"num_loops": 3}'], "holds checkpoints of a run with another `start`"),
        (["--student", other_student(place, gate=0.2)], "is not the one in"),
    ):
        assert distill(place, finished, *more) == 1, more
        assert message in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == record
    assert (finished / "model.safetensors").read_bytes() == weights


def test_the_recipe_of_a_finished_run_stays_in_its_record(place, finished):
    before = json.loads((finished / "run.json").read_text())
    assert distill(place, finished, "--learning_rate", "1e-4") == 0  # nothing is left to train with it
    assert json.loads((finished / "run.json").read_text())["recipe"] == before["recipe"]


def test_a_teacher_with_other_tokens_is_refused(place, finished, tmp_path, capsys):
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    more = ["--student", str(finished / "start"), "--teacher_model_name_or_path", str(tmp_path / "teacher")]
    assert distill(place, tmp_path / "out", *more) == 1
    assert "has another tokenizer than the student" in capsys.readouterr().err


def test_the_student_is_made_of_the_teachers_revision(place, tmp_path):
    import compress
    import distill as program

    more = ["--teacher_model_revision", "abc123", "--teacher_gguf_file", "a.gguf"]
    run, args = parse_recipe(arguments(place, tmp_path, *more), CONFIGS)
    options = compress.parse(program.command_line(program.options_of(run, args, tmp_path / "start")))
    assert (options.revision, options.gguf_file, options.teacher) == ("abc123", "a.gguf", str(place / "teacher"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--learning_rat", "1"], "no option is called 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--beta", "2"], "beta=2.0 must lie strictly between"),
        (["--dataset_name", "missing.jsonl"], "'missing.jsonl' does not exist"),
        (["--student_config", "{x"], "student_config='{x' is not JSON"),
        (["--student_config", '{"num_loop": 2}'], "called 'num_loop' (did you mean 'num_loops'?)"),
        (["--student_config", '{"num_loops": 0}'], "num_loops=0 must be"),
        (["--student_config", '{"backprop_loops": 2, "injection": "none"}'], "injection="),
        (["--student", '{"program": "merge", "options": {}}'], "program='merge' must be one of: compress, retrofit"),
        (["--dataset_streaming", "True", "--teacher_targets", "x"], "leave one of the two out"),
        (["--dataset_text_field", "body"], "no text_field='body'; its columns: text"),
        (["--max_length", "100000"], "does not fill one block of 100000 tokens"),
        (["--student_attn_implementation", "quick"], "student_attn_implementation='quick': Specified"),
        (["--student", "nowhere/at/all"], "student='nowhere/at/all' is neither a folder nor"),
    ],
)
def test_what_cannot_work_is_named(wrong, message, place, finished, tmp_path, capsys):
    more = [] if "--student" in wrong else ["--student", str(finished / "start")]
    assert distill(place, tmp_path / "out", *more, *wrong) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_of_the_student_can_be_chosen(name, finished):
    start = str(finished / "start")
    run = RunConfig(student=start, student_attn_implementation=name, student_config={"num_loops": 3}, dataset_name="x")
    student = load_student(find_teacher(start), run)
    assert (student.config._attn_implementation, student.config.num_loops) == (name, 3)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(place):
    run, args = parse_recipe(
        arguments(place, place / "x", "--learning_rate", "1e-4", "--student_config", '{"a": 1}'), CONFIGS
    )
    assert args.learning_rate == 1e-4
    assert args.save_steps == 4
    assert args.num_train_epochs == 1.0
    assert run.student_config == {"a": 1}
    assert parse_recipe(arguments(place, place / "x"), CONFIGS)[1].learning_rate == 5e-3
    (place / "typo.yaml").write_text("max_lenght: 3\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: no option is called 'max_lenght' \(did you mean 'max_length'"):
        parse_recipe(["--recipe", str(place / "typo.yaml")], CONFIGS)


def test_a_record_names_what_differs_from_the_defaults_and_nothing_else(tmp_path):
    given = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "data_seed": 0,
        "accelerator_config": {"even_batches": False},
    }
    args = DistillationConfig(**given, hub_token="secret")
    changed = changed_values(args)
    assert changed.items() >= given.items()
    assert changed.keys() - given.keys() <= {"report_to", "dataloader_pin_memory"}  # what this machine makes of them


RECIPES = [
    path
    for path in sorted((ROOT / "configuration" / "recipes").glob("*.yaml"))
    if "student" in yaml.safe_load(path.read_text())  # the others are of pretraining
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads(recipe, tmp_path):
    import compress
    import distill as program
    import retrofit

    run, _ = parse_recipe(["--recipe", str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true"], CONFIGS)
    options = program.command_line({"teacher": "x", "output": "y", **run.student["options"]})
    {"compress": compress.parse, "retrofit": retrofit.parse}[run.student["program"]](options)


def test_blocks_hold_the_documents_one_after_the_other():
    tokenizer = tiny_tokenizer()
    texts = ["the cat", "sat on", "the mat and then the other cat"] * 30
    blocks = list(packed(texts, tokenizer, 8))
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert np.concatenate(blocks).tolist() == stream[: len(stream) // 8 * 8]
    assert len(list(packed(texts, tokenizer, 8, max_tokens=35))) == 4


def test_every_form_of_text_gives_the_same_blocks_streamed_or_not(place):
    tokenizer = tiny_tokenizer()
    from datasets import load_dataset

    load_dataset("json", data_files=str(place / "train.jsonl"), split="train").to_parquet(place / "train.parquet")
    blocks = packed_blocks(Source(str(place / "train.jsonl")), tokenizer, 16)
    assert packed_blocks(Source(str(place / "train.parquet")), tokenizer, 16).fingerprint == blocks.fingerprint
    assert packed_blocks(Source(str(place / "train.jsonl"), seed=1), tokenizer, 16).fingerprint != blocks.fingerprint
    stream = PackedStream(Source(str(place / "train.jsonl"), streaming=True), tokenizer, 16)
    streamed = np.stack([row["input_ids"].numpy() for row in islice(stream, len(blocks))])
    assert np.array_equal(streamed, blocks.blocks)
    assert len(packed_blocks(Source(str(place / "valid.txt")), tokenizer, 16)) > 1


def test_a_stream_begins_again_in_another_order_and_leaves_nothing_out(tmp_path):
    tokenizer = tiny_tokenizer()
    documents = ["the cat sat", "on the mat", "and then", "the other cat sat there too"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    size = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
    stream = PackedStream(Source(str(tmp_path / "text.jsonl"), streaming=True, seed=3), tokenizer, 8)
    tokens = np.concatenate([row["input_ids"].numpy() for row in islice(stream, 4 * size // 8)])
    passes = [tokenizer.decode(tokens[i * size : (i + 1) * size]).split(tokenizer.eos_token) for i in range(4)]
    assert all(sorted(found) == sorted([*documents, ""]) for found in passes)
    assert any(found != passes[0] for found in passes)
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    assert not list(PackedStream(Source(str(tmp_path / "empty.jsonl"), streaming=True), tokenizer, 8))
