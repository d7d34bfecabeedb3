"""A teacher's distributions on disk: computed once, cut to their largest entries, read back block by block.

n blocks, S tokens in a block, k entries kept.

Training then needs no teacher in memory, and no time for its forwards from the second run on. What is left of the
vocabulary is kept as one more entry, its mass (see `losses.over_buckets`), so that none is lost or invented.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers.modeling_utils import PreTrainedModel

from .data import PackedBlocks
from .losses import TopK

#: Says what the folder holds, and of which teacher and data.
DESCRIPTION = "targets.json"

#: Its files.
FILES = "targets-*.safetensors"

#: Blocks in one file; a file is the unit in which an interrupted computation goes on.
BLOCKS_PER_FILE = 64


def compute_targets(
    load_teacher: Callable[[], PreTrainedModel],
    blocks: PackedBlocks,
    folder: Path,
    *,
    teacher: Mapping[str, Any],
    top_k: int,
    temperature: float = 1.0,
    batch_size: int = 4,
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Fill `folder` with the teacher's distributions over the next token, for all positions of all blocks.

    Files that an earlier call finished stay; a file that it was writing when it stopped does not exist.

    Args:
        load_teacher: loads the teacher; called only if a file is missing.
        blocks: the tokens.
        folder: where the files go.
        teacher: what identifies the teacher, as JSON can hold it.
        top_k: k.
        temperature: by which logits are divided before they are cut; training must use the same.
        batch_size: blocks in one forward.
        report: receives progress, line by line.

    Raises:
        ValueError: if the folder holds targets of another teacher, other data or other settings, or if k is not
            smaller than the vocabulary.
    """
    description = describe(blocks, teacher, top_k, temperature)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(FILES)):  # else nothing was computed for whatever the folder was begun with
        check_description(folder, description)
    model = None
    total = -(-len(blocks) // BLOCKS_PER_FILE)
    for number in range(total):
        file = file_of(folder, number)
        if file.is_file():
            continue
        if model is None:
            model = load_teacher().requires_grad_(False).eval()
            if top_k >= model.config.vocab_size:
                raise ValueError(f"top_k={top_k} must be less than the vocabulary of {model.config.vocab_size}.")
            text = json.dumps(description, indent=2) + "\n"
            write_whole(folder / DESCRIPTION, lambda place, text=text: place.write_text(text, encoding="utf-8"))
        rows = range(number * BLOCKS_PER_FILE, min((number + 1) * BLOCKS_PER_FILE, len(blocks)))
        parts = []
        for start in range(rows.start, rows.stop, batch_size):
            batch = [blocks[row]["input_ids"] for row in range(start, min(start + batch_size, rows.stop))]
            with torch.no_grad():
                logits = model(torch.stack(batch).to(model.device), use_cache=False).logits
            parts += [cut(row, top_k, temperature) for row in logits]  # one at a time: float32 logits are large
        tensors = {
            "indices": torch.stack([part.indices for part in parts]),
            "log_probs": torch.stack([part.log_probs for part in parts]),
        }
        write_whole(file, lambda place, tensors=tensors: save_file(tensors, place))
        report(f"teacher's distributions: {rows.stop}/{len(blocks)} blocks")


def cut(logits: Tensor, top_k: int, temperature: float = 1.0) -> TopK:
    """The k largest entries of softmax(logits / temperature) and the mass of the others.

    Args:
        logits: [S, V].
        top_k: k, below V.
        temperature: see above.

    Returns:
        indices int32 [S, k], and log-probabilities float16 [S, k + 1].
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    values, indices = log_probs.topk(top_k, dim=-1)
    tail = log_probs.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    lowest = torch.finfo(torch.float16).min  # a mass that float16 cannot hold stays a number
    return TopK(indices.int().cpu(), torch.cat((values, tail), dim=-1).clamp(min=lowest).half().cpu())


class TargetBlocks(Dataset):
    """Packed blocks, each with the teacher's distributions (`teacher_indices`, `teacher_log_probs`).

    Args:
        blocks: the tokens.
        folder: what `compute_targets` filled.
        teacher, top_k, temperature: as they were there.

    Raises:
        ValueError: if the folder is incomplete, or of another teacher, other data or other settings.
    """

    def __init__(
        self, blocks: PackedBlocks, folder: Path, *, teacher: Mapping[str, Any], top_k: int, temperature: float = 1.0
    ):
        check_description(folder, describe(blocks, teacher, top_k, temperature))
        missing = [
            number for number in range(-(-len(blocks) // BLOCKS_PER_FILE)) if not file_of(folder, number).is_file()
        ]
        if missing:
            raise ValueError(f"teacher_targets={str(folder)!r} lacks {len(missing)} files: compute them first.")
        self.blocks = blocks
        self.folder = folder

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = divmod(index, BLOCKS_PER_FILE)
        with safe_open(file_of(self.folder, number), framework="pt") as file:
            indices, log_probs = (file.get_slice(name)[row] for name in ("indices", "log_probs"))
        return {**self.blocks[index], "teacher_indices": indices, "teacher_log_probs": log_probs}


def describe(blocks: PackedBlocks, teacher: Mapping[str, Any], top_k: int, temperature: float) -> dict[str, Any]:
    """What a folder of targets depends on."""
    return {
        "teacher": json.loads(json.dumps(teacher)),
        "data": blocks.fingerprint,
        "blocks": len(blocks),
        "top_k": top_k,
        "temperature": temperature,
    }


def check_description(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless `folder` holds what is wanted; names what differs."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"teacher_targets={str(folder)!r} holds no {DESCRIPTION}: compute the targets first.")
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{name}: {found.get(name)} there, {value} here" for name, value in wanted.items() if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"teacher_targets={str(folder)!r} were computed for something else ({'; '.join(differing)}): choose "
            "another folder."
        )


def file_of(folder: Path, number: int) -> Path:
    """File number `number` of a folder of targets."""
    return folder / f"targets-{number:05}.safetensors"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, and rename it when it is complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    unfinished.replace(path)


__all__ = ["TargetBlocks", "compute_targets", "cut"]
