"""Text for training: documents from the Hub or from files, packed into blocks of a fixed length.

n blocks, S tokens in a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DownloadConfig, load_dataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

#: File endings that are read, and the loader of `datasets` that reads them.
LOADERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}

#: Documents that are tokenised together.
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        path: file, folder of files, or Hub id.
        config: configuration of a Hub data set.
        split: its split; files have only `train`.
        text_field: column that holds the text; a text file is one document.
        streaming: whether documents are read as they are needed, without a copy in memory or in the cache.
        seed: documents are shuffled with it (with streaming, within a buffer); `None`: they stay in order.
    """

    path: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = False
    seed: int | None = None

    @classmethod
    def of(cls, value: str | dict[str, Any], **defaults: Any) -> Source:
        """From a path, or a mapping with some of the attributes.

        Raises:
            ValueError: for keys that do not exist.
        """
        given = {"path": value} if isinstance(value, str) else dict(value)
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown or "path" not in given:
            raise ValueError(f"the data set {given} must have a `path`, and besides only: {', '.join(names[1:])}.")
        return cls(**{**defaults, **given})

    def documents(self) -> Iterator[str]:
        """The texts that are not empty.

        Raises:
            ValueError: if nothing can be read there, or the column does not exist.
        """
        rows = self._rows()
        if self.seed is not None:
            rows = rows.shuffle(seed=self.seed, **({"buffer_size": 1000} if self.streaming else {}))
        for row in rows:
            text = row.get(self.text_field)
            if text is None:
                raise ValueError(
                    f"{self.path}: a row has no text_field={self.text_field!r}; its columns: {', '.join(row)}."
                )
            if text.strip():
                yield text

    def beginning(self, characters: int) -> list[str]:
        """The first documents, until they have more than so many characters together."""
        found, length = [], 0
        for document in self.documents():
            found.append(document)
            length += len(document)
            if length > characters:
                break
        return found

    def _rows(self) -> Any:
        place = Path(self.path).expanduser()
        if not place.exists():
            if place.suffix in LOADERS:
                raise ValueError(f"the data file {self.path!r} does not exist.")
            return load_dataset(
                self.path,
                self.config,
                split=self.split,
                streaming=self.streaming,
                download_config=DownloadConfig(max_retries=3),
            )
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in inside if file.suffix in LOADERS and file.is_file()]
        kinds = {LOADERS[file.suffix] for file in files}
        if len(kinds) != 1:
            found = f"files of several kinds: {', '.join(sorted(kinds))}" if kinds else "no such file"
            raise ValueError(
                f"{self.path!r} must be a file, or a folder of files, of one kind of {', '.join(LOADERS)}; it has "
                f"{found}."
            )
        kind = kinds.pop()
        options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
        names = [str(file) for file in files]
        options |= {"data_files": names, "split": "train", "streaming": self.streaming}
        return load_dataset(kind, **options)


class PackedBlocks(Dataset):
    """Blocks of equal length in memory.

    Args:
        blocks: token ids, int32 [n, S].
        target_bytes: UTF-8 bytes of the text that the blocks' tokens stand for, without the first of each block, which
            nothing predicts; `None`: they were not counted.
    """

    def __init__(self, blocks: np.ndarray, target_bytes: int | None = None):
        self.blocks = blocks
        self.target_bytes = target_bytes

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.blocks.size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids and their arrangement."""
        digest = hashlib.sha256(json.dumps(self.blocks.shape).encode())
        digest.update(np.ascontiguousarray(self.blocks).astype("<i4").tobytes())
        return digest.hexdigest()


class PackedStream(IterableDataset):
    """Blocks of equal length without an end, tokenised as they are asked for.

    The documents come again and again, each time in another order if `source` has a seed, and blocks go on over the
    seam: a run of any length is one pass, which a resumed `Trainer` can skip the beginning of.

    Args:
        source: the documents.
        tokenizer: makes tokens of them.
        length: S.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, length: int):
        self.source = source
        self.tokenizer = tokenizer
        self.length = length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for block in packed(self._documents(), self.tokenizer, self.length):
            yield {"input_ids": torch.from_numpy(block.astype(np.int64))}

    def _documents(self) -> Iterator[str]:
        seed = self.source.seed
        for turn in itertools.count():
            source = self.source if seed is None else dataclasses.replace(self.source, seed=seed + turn)
            document = None
            for document in source.documents():
                yield document
            if document is None:  # nothing, and so for ever
                return

    @property
    def fingerprint(self) -> str:
        """SHA-256 of where the documents come from and how they are cut, not of the text, which is not known yet."""
        described = {**dataclasses.asdict(self.source), "length": self.length}
        probe = self.tokenizer("A probe of the tokenizer: 1234, naïve.")["input_ids"]
        return hashlib.sha256(json.dumps([described, probe]).encode()).hexdigest()


def packed(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Blocks of `length` tokens, int32: documents one after the other, each closed by the end-of-text token.

    A document may begin in one block and end in the next; attention does not stop at its ends. What does not fill a
    last block is left out.

    Raises:
        ValueError: if the tokenizer has no end-of-text token.
    """
    eos = end_of_text(tokenizer)
    encoded = (
        np.asarray([[*ids, eos]], dtype=np.int32)
        for batch in batches(texts, BATCH)
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    )
    return (block[0] for block in cut(encoded, length, max_tokens))


def packed_with_bytes(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """As `packed`, and below each token the bytes of text that it stands for, int32 [2, length].

    Raises:
        ValueError: if the tokenizer has no end-of-text token.
        NotImplementedError: if it is written in Python alone, and cannot say where its tokens end in the text.
    """
    eos = end_of_text(tokenizer)

    def columns() -> Iterator[np.ndarray]:
        for batch in batches(texts, BATCH):
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            for text, ids, spans in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                yield np.asarray([[*ids, eos], [*token_bytes(text, [end for _, end in spans]), 0]], dtype=np.int32)

    return cut(columns(), length, max_tokens)


def token_bytes(text: str, ends: Sequence[int]) -> np.ndarray:
    """UTF-8 bytes of `text` that each of its tokens stands for; they add up to the whole text.

    Args:
        text: a document.
        ends: where each token ends, in characters. A token that is a part of a character gets it whole, or nothing.
    """
    if not len(ends):
        return np.zeros(0, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    before = np.concatenate(([0], np.cumsum(widths)))
    last = np.maximum.accumulate(np.asarray(ends))
    last[-1] = len(text)  # what a tokenizer drops at the end
    return np.diff(before[last], prepend=0)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that separates documents; raises ValueError if there is none."""
    token: Any = tokenizer.eos_token_id
    if token is None:
        raise ValueError("the tokenizer has no eos_token, which separates documents in a block.")
    return token


def cut(documents: Iterable[np.ndarray], length: int, max_tokens: int | None) -> Iterator[np.ndarray]:
    """Documents [rows, tokens], one after the other, in blocks [rows, length], at most `max_tokens` tokens of them."""
    limit = None if max_tokens is None else max_tokens // length
    blocks, waiting, tokens = 0, [], 0
    for document in documents:
        waiting.append(document)
        tokens += document.shape[1]
        if tokens < length:
            continue
        joined = np.concatenate(waiting, axis=1)
        for start in range(0, tokens - length + 1, length):
            if blocks == limit:
                return
            blocks += 1
            yield joined[:, start : start + length]
        waiting = [joined[:, tokens - tokens % length :]]
        tokens %= length


def batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` items; the last may be shorter."""
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def packed_blocks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_tokens: int | None = None,
    *,
    count_bytes: bool = False,
) -> PackedBlocks:
    """All blocks of `source`, or the first `max_tokens` tokens of them.

    Args:
        source, tokenizer, length, max_tokens: as in `packed`.
        count_bytes: whether to count the bytes of the text too, where the tokenizer can tell them.

    Raises:
        ValueError: if its text does not fill one block.
    """
    counts = count_bytes and tokenizer.is_fast
    pack = packed_with_bytes if counts else packed
    blocks = list(pack(source.documents(), tokenizer, length, max_tokens))
    if not blocks:
        asked = "" if max_tokens is None else f" (of at most {max_tokens} tokens that were asked for)"
        raise ValueError(f"{source.path!r} does not fill one block of {length} tokens{asked}.")
    if not counts:
        return PackedBlocks(np.stack(blocks))
    ids, widths = np.stack(blocks, axis=1)
    return PackedBlocks(np.ascontiguousarray(ids), int(widths[:, 1:].sum()))


def collate_packed(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of packed blocks: all columns stacked, and the tokens themselves as labels."""
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    return {**batch, "labels": batch["input_ids"].clone()}


__all__ = ["PackedBlocks", "PackedStream", "Source", "collate_packed", "packed", "packed_blocks"]
