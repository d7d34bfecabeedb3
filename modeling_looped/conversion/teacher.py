"""Teachers: where a source checkpoint lies, what exactly it is, and how it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .companions import LICENCE_FILES
from .stored_tensors import opened_safetensors

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", *LICENCE_FILES)


@dataclasses.dataclass(frozen=True)
class TeacherFiles:
    """A source checkpoint on this machine.

    Attributes:
        name: the folder or Hub id that the user gave.
        folder: where its files are.
        revision: commit of a Hub repository; `None` for a folder.
        gguf_file: name of the GGUF file in `folder` that holds weights, config and tokenizer; `None`: it is a folder
            as Transformers writes them.
    """

    name: str
    folder: Path
    revision: str | None = None
    gguf_file: str | None = None

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The config, read once: in a GGUF file it stands beside the vocabulary, which takes seconds to parse."""
        return AutoConfig.from_pretrained(self.folder, **self._gguf)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template."""
        return AutoTokenizer.from_pretrained(self.folder, **self._gguf)

    def model(self, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> PreTrainedModel:
        """The model with plain weights; those of a GGUF file are unpacked.

        Args:
            dtype: of the weights; `auto`: as stored (float32 where the file is packed).
            device: where the model goes.

        Raises:
            ValueError: if the files lack a weight, which Transformers would draw at random, or hold one that the model
                does not read, or if one of them is cut short; names them.
        """
        unpack = {"quantization_config": GgufConfig(dequantize=True)} if self.gguf_file else {}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, config=self.config, dtype=dtype, output_loading_info=True, **self._gguf, **unpack
            )
        except SafetensorError as error:  # it does not say which file
            for path in sorted(self.folder.glob("*.safetensors")):
                opened_safetensors(path)
            raise ValueError(f"the weights in teacher={self.name!r} cannot be read: {error}.") from error
        model, loading = loaded
        problems = {kind: loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(problems.values()):
            listed = "; ".join(
                f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in problems.items() if keys
            )
            raise ValueError(
                f"the weights in teacher={self.name!r} are not those of a {type(model).__name__}: {listed}."
            )
        return model.to(device)

    def provenance(self) -> dict[str, Any]:
        """Name, revision and SHA-256 of every file that was read, for the manifest."""
        patterns = (self.gguf_file,) if self.gguf_file else (*TEXT_FILES, *weight_patterns(self.folder))
        files = sorted({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})
        return {
            "name": self.name,
            "revision": self.revision,
            "gguf_file": self.gguf_file,
            "sha256": {path.name: sha256(path) for path in files},
        }

    @property
    def _gguf(self) -> dict[str, str]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_teacher(
    name: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    field: str = "teacher",
    further: tuple[str, ...] = (),
) -> TeacherFiles:
    """The files of a teacher: a folder, or a repository on the Hub, which is downloaded if it is not in the cache.

    Args:
        name: path of a folder, or Hub id.
        gguf_file: name of a GGUF file inside it.
        revision: branch, tag or commit of a Hub repository.
        field: what the user calls it, for messages.
        further: patterns of files that are wanted too, if there are any.

    Raises:
        ValueError: if it is neither, or lacks the file; says what was looked for.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} names a commit on the Hub, and {field}={name!r} is a folder.")
        folder, commit = Path(name), None
    else:
        folder = download(name, gguf_file, revision, field, further)
        commit = folder.name  # a snapshot's folder is called like its commit
    if gguf_file is not None and not (folder / gguf_file).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ValueError(f"gguf_file={gguf_file!r} is not in {field}={name!r}; GGUF files there: {there}.")
    if gguf_file is None and not (folder / "config.json").is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
        hint = f" Name one of its GGUF files with gguf_file: {there}." if there else ""
        raise ValueError(f"{field}={name!r} has no config.json.{hint}")
    return TeacherFiles(name, folder, commit, gguf_file)


def download(
    name: str, gguf_file: str | None, revision: str | None, field: str, further: tuple[str, ...] = ()
) -> Path:
    """The snapshot folder of a Hub repository, with the files that a teacher needs and no others."""
    wanted = [*TEXT_FILES, *further]
    try:
        if gguf_file is not None:
            return Path(snapshot_download(name, revision=revision, allow_patterns=[gguf_file, *LICENCE_FILES]))
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted, "*.bin", "model.pt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{field}={name!r} is neither a folder nor a checkpoint that the Hub gives: {error}"
        ) from error
    return folder


def weight_patterns(folder: Path) -> tuple[str, ...]:
    """Patterns of the weight files that Transformers reads in `folder`."""
    return ("*.safetensors",) if any(folder.glob("*.safetensors")) else ("*.bin",)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["TeacherFiles", "find_teacher", "sha256"]
