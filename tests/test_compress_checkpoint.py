"""`conversion/compress.py`: every way of naming the layers, what it writes, and what it refuses before any work."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from helpers import assert_close, random_tokens
from teachers import save_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped.conversion import text_windows
from modeling_looped.conversion.calibration import calibrate
from modeling_looped.conversion.compress import compress
from modeling_looped.conversion.compress_checkpoint import beginning
from modeling_looped.conversion.layer_plan import shared_plan

PROGRAM = Path(__file__).parents[1] / "conversion" / "compress.py"
TEXT = "The cat sat on the mat. The other cat sat there too, and then the first one left. " * 3
CALIBRATION = "Then the dog came, and the cats sat on the roof until the dog had gone home again. " * 3


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("compress_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    save_teacher(folder / "teacher")
    (folder / "teacher" / "LICENSE").write_text("the teacher's", encoding="utf-8")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "calibration.txt").write_text(CALIBRATION, encoding="utf-8")
    return folder


def arguments(files: Path, output: Path, *more: str) -> list[str]:
    paths = ["--teacher", str(files / "teacher"), "--text", str(files / "text.txt"), "--output", str(output)]
    return [*paths, "--loops", "2", *more]


def calibrated(files: Path) -> list[str]:
    return ["--calibration", str(files / "calibration.txt")]


SIZES = ("--prelude", "1", "--core", "2", "--coda", "1")


@pytest.mark.parametrize(("adapter", "merge", "loops"), [("weighted_svd", "least_squares", 2), ("fitted", "first", 1)])
def test_at_full_rank_the_written_folder_is_the_teacher(main, files, tmp_path, capsys, adapter, merge, loops):
    options = [*SIZES, "--rank", "32", "--adapter", adapter, "--merge", merge, *calibrated(files)]
    assert main(arguments(files, tmp_path / "out", *options)) == 0
    teacher = AutoModelForCausalLM.from_pretrained(files / "teacher")
    looped = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = random_tokens(vocab_size=300)
    # a regression sees the rounding of both models' states
    assert_close(looped(tokens).logits, teacher(tokens).logits, atol=5e-4 if adapter == "fitted" else 1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    manifest = json.loads((tmp_path / "out" / "looped_manifest.json").read_text(encoding="utf-8"))
    assert manifest["plan"] == {"prelude": [0], "core": [[1, 3], [2, 4]], "coda": [5], "order": "cycle"}
    assert manifest["calibration"]["file"] == "calibration.txt"
    assert manifest["checks"]["loss_by_num_loops"]["2"] == pytest.approx(manifest["checks"]["teacher_loss"], abs=1e-4)
    assert len(manifest["initial_errors"]) == 2 * loops * 7
    assert "core 0: 1 | 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ((*SIZES, "--order", "sequence"), {"prelude": [0], "core": [[1, 2], [3, 4]], "coda": [5]}),
        (
            ("--keep", "0-1,4-5", "--loop", "1,4", "--gate", "0.1"),
            {"prelude": [0], "core": [[1, 1], [4, 4]], "coda": [5]},
        ),
    ],
)
def test_layers_are_named_by_sizes_or_one_by_one(main, files, tmp_path, options, plan):
    assert main(arguments(files, tmp_path / "out", *options)) == 0
    manifest = json.loads((tmp_path / "out" / "looped_manifest.json").read_text(encoding="utf-8"))
    assert {part: manifest["plan"][part] for part in plan} == plan
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.loop_update["type"] == ("gated" if "--gate" in options else "replace")
    assert model(random_tokens(vocab_size=300)).logits.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [("--find", "middle"), *(("--find", way, "--dropped", "2", "--looped", "2") for way in ("drop", "cheapest"))],
)
def test_layers_are_found_from_activations(main, files, tmp_path, options):
    assert main(arguments(files, tmp_path / "out", *options, *calibrated(files))) == 0
    manifest = json.loads((tmp_path / "out" / "looped_manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["dropped_layers"]) == (2 if "--dropped" in options else 0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_loops == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say which layers share in one way"),
        ((*SIZES, "--find", "middle"), "say which layers share in one way"),
        (("--prelude", "1"), "--prelude, --core and --coda go together"),
        (("--prelude", "2", "--core", "2", "--coda", "1"), "must be the teacher's 6 layers; nearest with 2 loops: "),
        (("--keep", "0-5"), "--keep needs --loop"),
        (("--keep", "0-9", "--loop", "1"), "layers [6, 7, 8, 9] are not in the teacher"),
        (("--find", "middle"), "--find middle needs --calibration"),
        ((*SIZES, "--merge", "least_squares"), "pass a calibration"),
        ((*SIZES, "--rank", "2", "--adapter", "fitted"), "adapter='fitted' needs calibration_text"),
        (("--find", "drop", "--dropped", "2", "--calibration", "missing.txt"), "--find drop needs --dropped N"),
        ((*SIZES, "--loop", "1,4"), "--loop 1,4 goes with --keep only"),
        ((*SIZES, "--dropped", "2"), "--dropped 2 goes with --find drop or --find cheapest only"),
        ((*SIZES, "--looped", "2"), "--looped 2 goes with --find drop or --find cheapest only"),
        (("--find", "middle", "--loops", "0", "--calibration", "missing.txt"), "--loops 0 must be at least 1"),
        ((*SIZES, "--adapter", "weighted_svd"), "adapter='weighted_svd' has no effect with rank=0"),
        ((*SIZES, "--adapter", "fitted"), "adapter='fitted' has no effect with rank=0"),
        (
            ("--keep", "0-5", "--loop", "1", "--order", "sequence"),
            "--order sequence goes with --prelude --core --coda",
        ),
        (("--find", "drop", "--dropped", "2", "--looped", "2", "--order", "sequence"), "--order sequence goes with"),
        (("--find", "cheapest", "--dropped", "2", "--looped", "2", "--order", "sequence"), "--order sequence goes"),
        ((*SIZES, "--calibration-tokens", "0"), "calibration_tokens=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_is_written(main, files, tmp_path, capsys, options, message):
    assert main(arguments(files, tmp_path / "out", *options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FIND = ("--find", "cheapest", "--dropped", "2", "--looped", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "2", "--adapter", "fitted", "--align", "neurons"), "alignment='neurons' must be 'none' with"),
        (("--gate", "2"), "loop_update: type 'gated': initial_gate=2.0 must lie strictly between 0 and 1"),
        (("--rank", "-1"), "rank=-1 must be at least 0"),
        (("--merge", "least_squares"), "merge='least_squares', adapter='svd': pass a calibration"),
        (("--rank", "2", "--adapter", "weighted_svd"), "merge='average', adapter='weighted_svd': pass a calibration"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused_before_any_weight_is_read(
    main, files, tmp_path, capsys, options, message
):
    config_only = tmp_path / "teacher"
    config_only.mkdir()
    shutil.copy(files / "teacher" / "config.json", config_only)
    how = SIZES if "pass a calibration" in message else (*FIND, *calibrated(files))
    assert main(arguments(files, tmp_path / "out", *how, *options, "--teacher", str(config_only))) == 1
    assert message in capsys.readouterr().err


def test_the_held_out_text_cannot_be_the_calibration(main, files, tmp_path, capsys):
    options = [*SIZES, "--calibration", str(files / "text.txt")]
    assert main(arguments(files, tmp_path / "out", *options)) == 1
    assert "is the held-out text" in capsys.readouterr().err


def test_the_teachers_licence_comes_along(main, files, tmp_path):
    assert main(arguments(files, tmp_path / "out", *SIZES)) == 0
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "the teacher's"


def test_of_a_long_text_only_the_beginning_is_read_and_calibrates_as_the_whole_would(main, files, tmp_path):
    """The windows of a text are about equal, so that they depend on its length; those of a very long one are full."""
    whole = "".join(f"Cat {number} sat on the mat. " for number in range(20_000))
    long = tmp_path / "long.txt"
    long.write_text(whole, encoding="utf-8")
    seen = beginning(long, 600)
    assert len(seen) == 12 * 600
    assert whole.startswith(seen)
    assert len(beginning(long, 1)) == 12 * 512

    teacher = AutoModelForCausalLM.from_pretrained(files / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    windows = text_windows(tokenizer, whole, length=256)[:2]
    calibration = calibrate(teacher, windows)
    expected = compress(teacher, shared_plan(1, 2, 1, 2), merge="least_squares", calibration=calibration).model
    options = [*SIZES, "--merge", "least_squares", "--calibration", str(long), "--calibration-tokens", "600"]
    assert main(arguments(files, tmp_path / "out", *options)) == 0
    looped = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = random_tokens(vocab_size=300)
    assert_close(looped(tokens).logits, expected(tokens).logits)
    manifest = json.loads((tmp_path / "out" / "looped_manifest.json").read_text(encoding="utf-8"))
    assert manifest["calibration"]["tokens"] == sum(window.numel() for window in windows) == 512


def test_the_held_out_text_cannot_be_the_calibration_even_where_only_its_beginning_is_read(
    main, files, tmp_path, capsys
):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30, encoding="utf-8")
    options = [*SIZES, "--text", str(text), "--calibration", str(text), "--calibration-tokens", "10"]
    assert main(arguments(files, tmp_path / "out", *options)) == 1
    assert "is the held-out text" in capsys.readouterr().err


def test_an_earlier_result_is_replaced_only_when_told(main, files, tmp_path, capsys):
    assert main(arguments(files, tmp_path / "out", *SIZES)) == 0
    assert main(arguments(files, tmp_path / "out", *SIZES)) == 1
    assert "pass --force" in capsys.readouterr().err
    assert main(arguments(files, tmp_path / "out", *SIZES, "--rank", "2", "--force")) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.loop_adapter["rank"] == 2
