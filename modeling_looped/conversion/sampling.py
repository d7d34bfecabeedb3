"""Text that a teacher writes itself: for calibration and distillation where its own training text is not at hand.

A model's samples cover what it knows in the proportions in which it knows it, while a text of one kind teaches the
student that kind and lets it forget the rest (data-free distillation as in LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: How every line of a file of samples begins.
BEGINNING = b'{"text": '


def start_token(tokenizer: Any, start: str | None) -> int:
    """Id of the token that every sample begins with.

    Args:
        start: a token of the vocabulary; `None`: the tokenizer's beginning or else end of a text.

    Raises:
        ValueError: if there is no such token; names what is allowed.
    """
    if start is None:
        found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if found is None:
            raise ValueError("start is missing: the tokenizer has neither a bos_token nor an eos_token.")
        return found
    ids = tokenizer.encode(start, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"start={start!r} must be one token of the vocabulary; it is {len(ids)}.")
    return ids[0]


def sample_text(
    model: Any,
    tokenizer: Any,
    output: Path,
    *,
    tokens: int,
    max_length: int = 256,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    start: str | None = None,
    seed: int = 0,
    made_by: str | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> int:
    """Write samples of `model` to a JSON-lines file with the column `text`; goes on where an earlier call stopped.

    Every batch has a seed of its own, so a run that was stopped gives what an undisturbed one gives.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer.
        output: file to write; a line per sample: `text`, `tokens`, `batch`, and the `settings` of the draws.
        tokens: how many to write at least.
        max_length: tokens of a sample, its start token excluded; one that ends itself is shorter.
        batch_size: samples drawn at a time.
        temperature: of the softmax.
        top_p: probability mass that is sampled from.
        start: token that every sample begins with; it is not part of the text. `None`: see `start_token`.
        seed: of the draws.
        made_by: what tells this model from others, such as a hash of its files; kept with every sample.
        progress: gets a line per batch.

    Returns:
        the number of tokens in the file.

    Raises:
        ValueError: for a value that is not possible, or another one than the file was begun with; names it and what is
            allowed. For a file that holds anything but samples.
    """
    for name, value, least in (("tokens", tokens, 1), ("max_length", max_length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be above 0.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must lie in (0, 1].")
    if not model.can_generate():
        raise ValueError(f"a {type(model).__name__} does not generate.")
    first = start_token(tokenizer, start)
    ends = {first, tokenizer.eos_token_id} - {None}
    settings = {"start": first, "max_length": max_length, "batch_size": batch_size, "seed": seed}
    settings |= {"temperature": temperature, "top_p": top_p, "made_by": made_by}
    batch, written, size = whole_batches(output, settings)
    if written >= tokens:
        progress(f"{output} has {written:,} tokens already")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        file.truncate(size)  # what a killed writer left of its last batch
        while written < tokens:
            torch.manual_seed(seed + batch)
            prompt = torch.full((batch_size, 1), first, device=model.device)
            drawn = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                max_new_tokens=max_length,
                eos_token_id=sorted(ends),
                pad_token_id=first,
            )
            for row in drawn[:, 1:].tolist():
                length = next((place for place, token in enumerate(row) if token in ends), len(row))
                text = tokenizer.decode(row[:length], skip_special_tokens=True)
                file.write(json.dumps({"text": text, "tokens": length, "batch": batch, "settings": settings}) + "\n")
                written += length
            file.flush()
            batch += 1
            progress(f"{written:,} of {tokens:,} tokens")
    return written


def whole_batches(file: Path, settings: dict[str, Any]) -> tuple[int, int, int]:
    """How many batches of `file` were written to their end, their tokens, and their bytes, with which the file begins.

    Raises:
        ValueError: if they were drawn with other settings, or if it holds something else.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    rows: list[tuple[int, int]] = []
    for line in lines:
        row = sample_in(line)
        if row is None and line.startswith(BEGINNING) and not line.endswith(b"\n"):
            break  # at which the writer was killed
        if row is None:
            raise ValueError(f"output={str(file)!r} exists and holds something other than samples: name another file.")
        began = row["settings"]
        for name, value in settings.items():
            if began.get(name) != value:
                raise ValueError(
                    f"{name}={value} must be {began.get(name)}, with which {file} was begun, or the file another."
                )
        rows.append((row["tokens"], len(line)))
    batches = len(rows) // settings["batch_size"]
    whole = rows[: batches * settings["batch_size"]]
    return batches, sum(tokens for tokens, _ in whole), sum(size for _, size in whole)


def sample_in(line: bytes) -> dict[str, Any] | None:
    """The sample that a line of the file holds; `None`: it holds no whole one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"text", "tokens", "settings"} <= row.keys() else None


__all__ = ["sample_text", "start_token"]
