"""From a teacher's files to a looped checkpoint: written whole after its checks, or not at all."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers import assert_close, random_tokens
from safetensors.torch import load_file, save_file
from teachers import save_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped.conversion import ConversionError, find_teacher, retrofit_checkpoint

ROOT = Path(__file__).parents[1]
SPLIT = {"prelude": 2, "core": 3, "coda": 1, "loops": 4}
TEXT = "The cat sat on the mat. The other cat sat there too, and then the first one left. " * 3


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "teacher"
    save_teacher(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_the_folder_holds_a_model_that_is_the_teacher_at_one_loop(teacher_folder, text, tmp_path):
    output = tmp_path / "new" / "looped"
    made = retrofit_checkpoint(str(teacher_folder), output, text=text, **SPLIT)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    looped = AutoModelForCausalLM.from_pretrained(output)
    tokens = random_tokens(vocab_size=300)
    assert looped.config.num_loops == 4
    assert looped.config.num_hidden_layers == 2 + 3 * 4 + 1
    assert_close(looped(tokens, num_loops=1).logits, teacher(tokens).logits)
    assert all(torch.equal(tensor, made.model.state_dict()[key]) for key, tensor in looped.state_dict().items())
    assert looped.generation_config.eos_token_id == looped.config.eos_token_id == 2
    stored = load_file(output / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == teacher.num_parameters()  # the core is there once
    assert (output / "modeling_looped.py").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["looped"]


def test_tokenizer_and_chat_template_come_along(teacher_folder, text, tmp_path):
    retrofit_checkpoint(str(teacher_folder), tmp_path / "looped", text=text, **SPLIT)
    before, after = AutoTokenizer.from_pretrained(teacher_folder), AutoTokenizer.from_pretrained(tmp_path / "looped")
    turns = [{"role": "user", "content": "Where is the cat?"}]
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.apply_chat_template(turns, add_generation_prompt=True) == before.apply_chat_template(
        turns, add_generation_prompt=True
    )


def test_the_teachers_licence_comes_along(teacher_folder, text, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    (teacher / "LICENSE.txt").write_text("the teacher's", encoding="utf-8")
    (teacher / "NOTICE").write_text("whose it is", encoding="utf-8")
    made = retrofit_checkpoint(str(teacher), tmp_path / "looped", text=text, **SPLIT)
    assert (tmp_path / "looped" / "LICENSE.txt").read_text(encoding="utf-8") == "the teacher's"
    assert (tmp_path / "looped" / "NOTICE").read_text(encoding="utf-8") == "whose it is"
    assert made.manifest["source"]["sha256"].keys() >= {"LICENSE.txt", "NOTICE"}


def test_the_manifest_says_what_was_done(teacher_folder, text, tmp_path):
    output = tmp_path / "looped"
    made = retrofit_checkpoint(str(teacher_folder), output, text=text, command="retrofit.py ...", **SPLIT)
    manifest = json.loads((output / "looped_manifest.json").read_text())
    assert manifest == json.loads(json.dumps(made.manifest))

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    source = manifest["source"]
    assert source["name"] == str(teacher_folder)
    assert source["sha256"]["model.safetensors"] == digest(teacher_folder / "model.safetensors")
    assert source["sha256"].keys() >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert manifest["sha256"]["model.safetensors"] == digest(output / "model.safetensors")
    assert manifest["teacher"] == {"model_type": "llama", "layers": 6, "parameters": 65696, "dtype": "float32"}
    assert manifest["layers"][1] == {"teacher_layer": 1, "part": "prelude", "slots": [1]}
    assert manifest["layers"][3] == {"teacher_layer": 3, "part": "core", "slots": [3, 6, 9, 12]}
    assert manifest["layers"][5] == {"teacher_layer": 5, "part": "coda", "slots": [14]}
    assert manifest["weights"]["renamed"] == {
        "model.layers.{layer}.post_attention_layernorm.weight": "model.layers.{layer}.pre_feedforward_layernorm.weight"
    }
    equality = manifest["checks"]["equals_teacher_at_num_loops_1"]
    assert equality["max_difference"] <= equality["tolerance"]
    assert len(equality["hidden_states"]) == 7
    assert manifest["checks"]["loss_by_num_loops"].keys() == {"1", "2", "4"}
    assert manifest["checks"]["text"]["sha256"] == digest(text)
    assert manifest["versions"].keys() >= {"python", "torch", "transformers", "modeling_looped"}
    assert manifest["command"] == "retrofit.py ..."
    assert manifest["trained_loops"] == 1


def test_progress_ends_in_a_table_of_losses(teacher_folder, text, tmp_path):
    lines: list[str] = []
    made = retrofit_checkpoint(
        str(teacher_folder), tmp_path / "looped", text=text, report=lines.append, **{**SPLIT, "loops": 3}
    )
    checks = made.manifest["checks"]
    header = next(number for number, line in enumerate(lines) if "layers run" in line)
    table = [line.split() for line in lines[header + 1 : header + 6]]
    teacher_loss = checks["equals_teacher_at_num_loops_1"]["teacher_loss"]
    assert table[0] == ["teacher", "6", f"{teacher_loss:.3f}"]
    for row, loops in zip(table[1:], (1, 2, 3, 4), strict=True):
        loss = checks["loss_by_num_loops"][loops]
        assert row == [str(loops), str(3 + 3 * loops), f"{loss:.3f}", f"{loss - teacher_loss:+.3f}"]
    assert any("largest difference of two logits" in line for line in lines)
    assert lines[-1].endswith("done")


def test_sixteen_bit_weights_stay_sixteen_bit_and_are_checked_in_float32(text, tmp_path):
    save_teacher(tmp_path / "teacher", "llama-tied", dtype=torch.bfloat16)
    made = retrofit_checkpoint(str(tmp_path / "teacher"), tmp_path / "looped", text=text, **SPLIT)
    looped = AutoModelForCausalLM.from_pretrained(tmp_path / "looped")
    assert looped.dtype == torch.bfloat16
    assert made.manifest["checks"]["equals_teacher_at_num_loops_1"]["max_difference"] < 1e-4


def test_a_difference_above_the_tolerance_leaves_nothing_behind(teacher_folder, text, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match="more than the tolerance of 1e-12; nothing was written"):
        retrofit_checkpoint(str(teacher_folder), tmp_path / "looped", text=text, tolerance=1e-12, **SPLIT)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_already_there_survives_unless_it_may_be_replaced(teacher_folder, text, tmp_path):
    output = tmp_path / "looped"
    retrofit_checkpoint(str(teacher_folder), output, text=text, **SPLIT)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty: choose another folder, or pass --force"):
        retrofit_checkpoint(str(teacher_folder), output, text=text, **SPLIT)
    with pytest.raises(ConversionError):
        retrofit_checkpoint(str(teacher_folder), output, text=text, overwrite=True, tolerance=1e-12, **SPLIT)
    assert (output / "notes.txt").is_file()
    retrofit_checkpoint(str(teacher_folder), output, text=text, overwrite=True, **{**SPLIT, "loops": 2})
    assert not (output / "notes.txt").exists()
    assert AutoModelForCausalLM.from_pretrained(output).config.num_loops == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["looped", "text.txt"]


def test_a_folder_that_no_conversion_made_is_not_replaced_even_by_force(teacher_folder, text):
    with pytest.raises(ValueError, match="not the result of a conversion"):
        retrofit_checkpoint(str(teacher_folder), text.parent, text=text, overwrite=True, **SPLIT)
    with pytest.raises(ValueError, match="is a file"):
        retrofit_checkpoint(str(teacher_folder), text, text=text, overwrite=True, **SPLIT)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"core": 9}, "must be the teacher's 6 layers"),
        ({"loops": 0}, "num_loops=0 must be an integer of at least 1"),
        ({"text": Path("no-such-text.txt")}, "no-such-text.txt"),
        ({"device": "cuda:7"}, "device='cuda:7' cannot be used here"),
        ({"gguf_file": "weights.gguf"}, "gguf_file='weights.gguf' is not in teacher=.*GGUF files there: none"),
        ({"revision": "main"}, "revision='main' names a commit on the Hub"),
        ({"teacher": "no/such-teacher"}, "teacher='no/such-teacher' is neither a folder nor a checkpoint"),
        ({"teacher": "no such teacher"}, "teacher='no such teacher' is neither a folder nor a checkpoint"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_weight_is_read(wrong, named, teacher_folder, text, tmp_path):
    config_only = tmp_path / "teacher"
    config_only.mkdir()
    shutil.copy(teacher_folder / "config.json", config_only)
    arguments = {"teacher": str(config_only), "output": tmp_path / "looped", "text": text, **SPLIT, **wrong}
    with pytest.raises((ValueError, OSError), match=named):
        retrofit_checkpoint(**arguments)
    assert not (tmp_path / "looped").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda state: state.pop("model.layers.3.mlp.up_proj.weight"),
            r"missing_keys: model\.layers\.3\.mlp\.up_proj",
        ),
        (lambda state: state.update({"model.extra.weight": torch.ones(2)}), r"unexpected_keys: model\.extra\.weight"),
    ],
    ids=["missing", "unexpected"],
)
def test_files_that_are_not_the_teachers_weights_are_refused_by_their_keys(
    change, named, teacher_folder, text, tmp_path
):
    damaged = tmp_path / "teacher"
    shutil.copytree(teacher_folder, damaged)
    state = load_file(damaged / "model.safetensors")
    change(state)
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=named):
        retrofit_checkpoint(str(damaged), tmp_path / "looped", text=text, **SPLIT)
    assert not (tmp_path / "looped").exists()


def test_a_file_of_weights_that_is_cut_short_is_named(program, teacher_folder, text, tmp_path, capsys):
    damaged = tmp_path / "teacher"
    shutil.copytree(teacher_folder, damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert program.main(options(damaged, tmp_path / "looped", text)) == 1
    assert f"retrofit.py: {file} is not a whole safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "looped").exists()


def test_an_unsupported_teacher_is_refused_before_any_weight_is_read(tmp_path, text):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(ValueError, match="model_type='gpt_oss' is not a supported family"):
        retrofit_checkpoint(str(tmp_path), tmp_path / "looped", text=text, **SPLIT)


def test_a_folder_without_a_config_is_refused_with_its_gguf_files(tmp_path):
    (tmp_path / "weights.Q4.gguf").touch()
    with pytest.raises(ValueError, match=r"has no config\.json\. Name one of .* with gguf_file: weights\.Q4\.gguf"):
        find_teacher(str(tmp_path))


def test_a_teacher_in_the_hub_cache_is_found_by_its_id_and_recorded_by_its_commit(
    teacher_folder, text, tmp_path, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(teacher_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = retrofit_checkpoint("someone/tiny", tmp_path / "looped", text=text, **SPLIT)
    assert made.manifest["source"]["name"] == "someone/tiny"
    assert made.manifest["source"]["revision"] == commit
    teacher, tokens = AutoModelForCausalLM.from_pretrained(teacher_folder), random_tokens()
    assert_close(made.model(tokens, num_loops=1).logits, teacher(tokens).logits)


@pytest.fixture(scope="module")
def program():
    """The script `conversion/retrofit.py` as a module."""
    spec = importlib.util.spec_from_file_location("retrofit_program", ROOT / "conversion" / "retrofit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(teacher: Path, output: Path, text: Path, **changes: object) -> list[str]:
    """A command line for `conversion/retrofit.py`."""
    values = {"teacher": teacher, "output": output, "text": text, **SPLIT, **changes}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_the_program_ends_with_a_message_and_status_1(program, teacher_folder, text, tmp_path, capsys):
    for change, message in (
        ({"prelude": 5}, "prelude=5 + core=3 + coda=1 must be"),
        ({"tolerance": 1e-12}, "at num_loops=1"),
    ):
        assert program.main(options(teacher_folder, tmp_path / "looped", text, **change)) == 1
        assert f"retrofit.py: {message}" in capsys.readouterr().err
    assert not (tmp_path / "looped").exists()


@pytest.mark.parametrize(
    "change", [{"tolerance": "0"}, {"loops": "two"}, {"dtype": "int8"}, {"speed": "high"}], ids=str
)
def test_options_that_make_no_sense_end_with_the_usage_and_status_2(
    program, teacher_folder, text, tmp_path, capsys, change
):
    with pytest.raises(SystemExit) as stopped:
        program.main(options(teacher_folder, tmp_path / "looped", text, **change))
    assert stopped.value.code == 2
    assert f"--{next(iter(change))}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_writes_a_checkpoint_and_records_itself(teacher_folder, text, tmp_path):
    command = [sys.executable, str(ROOT / "conversion" / "retrofit.py")]
    done = subprocess.run(
        [*command, *options(teacher_folder, Path("looped"), text)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "largest difference of two logits" in done.stdout
    recorded = json.loads((tmp_path / "looped" / "looped_manifest.json").read_text())["command"]
    assert recorded.startswith("python conversion/retrofit.py --teacher ")
    assert recorded.endswith("--prelude 2 --core 3 --coda 1 --loops 4")
