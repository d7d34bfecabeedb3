"""Shard writer: a checkpoint in Transformers' layout, written while its tensors are made, one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class ShardWriter:
    """Collects tensors until a shard is full, writes it and lets them go.

    Args:
        folder: where the files go.
        max_bytes: size from which a shard is written; a tensor larger than that gets a shard of its own.
        report: is called with a line just before each shard is written, when it is at its largest.

    Example:

    ```python
    >>> writer = ShardWriter(folder, 5_000_000_000)
    >>> for name, tensor in tensors:
    ...     writer.add(name, tensor)
    >>> writer.finish()
    ```
    """

    def __init__(self, folder: Path, max_bytes: int, report: Callable[[str], object] = lambda line: None):
        self.folder = folder
        self.max_bytes = max_bytes
        self.report = report
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one more tensor."""
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and give the files their final names; the index too, if there are several."""
        if self._shard or not self._written:
            self._flush()
        count = len(self._written)
        if count == 1:
            self._temporary(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._written):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        number = len(self._written)
        self.report(f"   shard {number + 1}: {len(self._shard)} tensors, {self._shard_bytes / 1e6:.1f} MB")
        save_file(self._shard, self._temporary(number), metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._total_bytes += self._shard_bytes
        self._shard, self._shard_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"  # the final name says how many there are


__all__ = ["ShardWriter"]
