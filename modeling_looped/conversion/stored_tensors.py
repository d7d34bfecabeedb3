"""Stored tensors: the weights in a checkpoint folder, read one at a time.

Transformers' two layouts are known, as one file or as shards with an index: `model.safetensors` and, of files that
torch wrote, `pytorch_model.bin` or `model.pt`. Nothing is read before it is asked for: the files are memory-mapped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Names of the weight files, in the order in which they are looked for; each may also be an index of shards.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

#: Types that a model's plain weights have; others are packed or quantised.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StoredTensors:
    """The tensors of a checkpoint folder.

    Args:
        folder: where the files are.

    Attributes:
        files: name of each weight file -> names of its tensors.

    Raises:
        ValueError: if there are no weights in a known layout, a file is cut short, or an index and its files disagree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.weight_file, file_names, indexed = weight_files(folder)
        self._open: dict[str, Any] = {}
        self.files: dict[str, list[str]] = {}
        self._file_of: dict[str, str] = {}
        for file_name in file_names:
            self.files[file_name] = list(self._opened(file_name).keys())
            for name in self.files[file_name]:
                if name in self._file_of:
                    raise ValueError(f"{name} is in both {self._file_of[name]} and {file_name} of {folder}.")
                self._file_of[name] = file_name
        misplaced = [name for name, file_name in indexed.items() if self._file_of.get(name) != file_name]
        if misplaced:
            raise ValueError(f"the index in {folder} names tensors that its files lack: {', '.join(misplaced[:20])}.")

    @property
    def is_safetensors(self) -> bool:
        """Whether the files are safetensors; else torch wrote them."""
        return self.weight_file.endswith(".safetensors")

    @property
    def index_metadata(self) -> dict[str, Any] | None:
        """What the index of the shards says beside where the tensors are; `None` without an index."""
        index = self.folder / f"{self.weight_file}.index.json"
        return json.loads(index.read_text(encoding="utf-8")).get("metadata", {}) if index.is_file() else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @functools.cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor."""
        return {name: torch.Size(self._description(name)[0]) for name in self}

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor."""
        return {name: self._description(name)[1] for name in self}

    def read(self, name: str) -> Tensor:
        """Tensor `name`, on the CPU."""
        opened = self._opened(self._file_of[name])
        return opened[name] if isinstance(opened, Mapping) else opened.get_tensor(name)

    def _description(self, name: str) -> tuple[list[int], torch.dtype]:
        opened = self._opened(self._file_of[name])
        if isinstance(opened, Mapping):
            return list(opened[name].shape), opened[name].dtype
        part = opened.get_slice(name)
        if part.get_dtype() not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of type {part.get_dtype()}; known are {', '.join(SAFETENSORS_DTYPES)}.")
        return part.get_shape(), SAFETENSORS_DTYPES[part.get_dtype()]

    def _opened(self, file_name: str) -> Any:
        """A file of safetensors, or the state dict in a file of torch's."""
        if file_name not in self._open:
            self._open[file_name] = self._mapped(self.folder / file_name)
        return self._open[file_name]

    def _mapped(self, path: Path) -> Any:
        if self.is_safetensors:
            return opened_safetensors(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path} is not a whole file of weights that torch wrote: {error}") from error
        foreign = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
        if foreign:
            raise ValueError(f"{path} is no flat state dict: these are not tensors: {', '.join(foreign[:20])}.")
        return state


def opened_safetensors(path: Path) -> Any:
    """A safetensors file, memory-mapped.

    Raises:
        ValueError: if it is something else, or a part of one; names it.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}. Was its download cut short, or does it stand for a "
            "file of Git LFS that was not fetched?"
        ) from error


def weight_files(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """The layout of the weights in `folder`: its name among WEIGHT_FILES, the files there are, and what the index says
    (the file of each tensor; empty without one).
    """
    for weight_file in WEIGHT_FILES:
        index = folder / f"{weight_file}.index.json"
        if index.is_file():
            indexed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return weight_file, sorted(set(indexed.values())), indexed
        if (folder / weight_file).is_file():
            return weight_file, [weight_file], {}
    raise ValueError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}, nor an index of one of them.")


__all__ = ["PLAIN_DTYPES", "StoredTensors", "opened_safetensors"]
