"""Text sampled from a teacher: what is in the file, going on after a stop, what is refused, and who reads it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import save_teacher, tiny_teacher, tiny_tokenizer

from modeling_looped.conversion.compress_checkpoint import beginning
from modeling_looped.conversion.sampling import sample_text

PROGRAM = Path(__file__).parents[1] / "conversion" / "sample_text.py"
SMALL: dict[str, Any] = {"max_length": 12, "batch_size": 4, "start": "<|start|>", "seed": 3}


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("sample_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher("llama", vocab_size=300).eval()


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_file_holds_what_generate_draws(teacher, tmp_path):
    tokenizer, file = tiny_tokenizer(), tmp_path / "samples.jsonl"
    written = sample_text(teacher, tokenizer, file, tokens=60, **SMALL)
    rows = rows_of(file)
    assert written == sum(row["tokens"] for row in rows) >= 60
    assert written - 60 < 4 * 12
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    torch.manual_seed(3 + 1)  # the second batch's seed
    prompt = torch.full((4, 1), start)
    drawn = teacher.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        max_new_tokens=12,
        eos_token_id=[start, end],
        pad_token_id=start,
    )
    for row, tokens in zip(rows[4:8], torch.as_tensor(drawn)[:, 1:].tolist(), strict=True):
        kept = tokens[: row["tokens"]]
        assert not {start, end} & set(kept)
        assert row["text"] == tokenizer.decode(kept, skip_special_tokens=True)


def test_a_stopped_run_goes_on_to_the_same_file(teacher, tmp_path):
    tokenizer, whole, stopped = tiny_tokenizer(), tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    sample_text(teacher, tokenizer, whole, tokens=100, **SMALL)
    text = whole.read_text(encoding="utf-8")
    stopped.write_text("".join(text.splitlines(keepends=True)[:6]) + '{"text": "cut of', encoding="utf-8")
    sample_text(teacher, tokenizer, stopped, tokens=100, **SMALL)
    assert stopped.read_text(encoding="utf-8") == text
    before = stopped.stat().st_size
    assert sample_text(teacher, tokenizer, stopped, tokens=10, **SMALL) >= 100  # there is enough already
    assert stopped.stat().st_size == before


def test_a_file_that_was_begun_with_other_settings_is_left_as_it_is(teacher, tmp_path):
    file = tmp_path / "samples.jsonl"
    sample_text(teacher, tiny_tokenizer(), file, tokens=10, **{**SMALL, "temperature": 0.5})
    before = file.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"temperature=0.75 must be 0.5, with which .*samples.jsonl was begun"):
        sample_text(teacher, tiny_tokenizer(), file, tokens=100, **{**SMALL, "temperature": 0.75})
    assert file.read_text(encoding="utf-8") == before


def test_a_file_of_another_model_is_left_as_it_is(main, tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    options = ["--output", str(file), "--max-length", "8", "--batch-size", "4", "--tokens"]
    for name, family in {"one": "llama", "other": "llama-tied"}.items():
        save_teacher(tmp_path / name, family)
    assert main(["--model", str(tmp_path / "one"), *options, "20"]) == 0
    before = file.read_bytes()
    assert main(["--model", str(tmp_path / "other"), *options, "40"]) == 1
    assert "made_by=" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main(["--model", str(tmp_path / "one"), *options, "20"]) == 0
    assert "tokens already" in capsys.readouterr().out
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["# Notes\n", '["a", "b"]\n', '{"text": "a"}\n', '{"text": "a"}\n# b', "no end"])
def test_a_file_that_holds_something_else_is_left_as_it_is(teacher, tmp_path, text):
    file = tmp_path / "notes.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"output='.*notes.md' exists and holds something other than samples"):
        sample_text(teacher, tiny_tokenizer(), file, tokens=10, **SMALL)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"start": "the cat sat"}, "start='the cat sat' must be one token"),
    ],
)
def test_refusals(teacher, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        sample_text(teacher, tiny_tokenizer(), tmp_path / "samples.jsonl", **{"tokens": 10, **SMALL, **given})
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_tokenizer_without_beginning_or_end_needs_a_start(teacher, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="start is missing"):
        sample_text(teacher, tokenizer, tmp_path / "samples.jsonl", tokens=10)


def test_the_program_writes_what_calibration_reads(main, tmp_path, capsys):
    save_teacher(tmp_path / "teacher")
    file = tmp_path / "deep" / "samples.jsonl"
    options = ["--model", str(tmp_path / "teacher"), "--output", str(file), "--max-length", "8", "--batch-size", "4"]
    assert main([*options, "--tokens", "40"]) == 0
    assert "of 40 tokens" in capsys.readouterr().out
    texts = [row["text"] for row in rows_of(file) if row["text"].strip()]
    assert beginning(file, 1000) == "\n\n".join(texts)
    assert len(beginning(file, 1)) < len(beginning(file, 1000))
    assert main([*options, "--tokens", "40", "--start", "no such token"]) == 1
    assert "start='no such token'" in capsys.readouterr().err
