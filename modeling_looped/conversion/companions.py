"""Companions: what belongs to a checkpoint beside config and weights, brought along and repaired."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped.configuration_looped import FOREIGN_LOOP_NAMES

from .special_tokens import align_special_tokens

#: Files that tokenizers of Transformers are read from.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LICENCE_FILES = ("LICENSE*", "NOTICE*")
CODE_FILES = ("*.py",)
GENERATION_CONFIG = "generation_config.json"


def bring_companions(source: Path, target: Path, config: PreTrainedConfig) -> list[str]:
    """Copy tokenizer, generation config and licence from `source` to `target`, which has our config.json already.

    Where there is a tokenizer, it, the two configs and the chat template are made to agree on where a text ends; so
    `config` may change.

    Returns:
        one line per change.
    """
    copy_files(source, target, (*TOKENIZER_FILES, *LICENCE_FILES))
    lines: list[str] = []
    generation_config = read_generation_config(source, config, lines)
    if any((target / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(target)
        text_config: Any = config.get_text_config(decoder=True)  # of an encoder and a decoder, the decoder's
        lines += align_special_tokens(text_config, generation_config, tokenizer)
        tokenizer.save_pretrained(target)
        config.save_pretrained(target)
    else:
        lines.append("note: the checkpoint has no tokenizer")
    generation_config.save_pretrained(target)
    return lines


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files that there are, and return their names."""
    names = sorted({path.name for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def code_named(config: Mapping[str, Any]) -> list[str]:
    """The files of code that a config.json names in `auto_map` and that must lie beside it.

    Transformers' form is `module.Class`, or a list of them; `repository--module.Class` lies elsewhere on the Hub.
    """
    named = (config.get("auto_map") or {}).values()
    classes = [name for names in named for name in (names if isinstance(names, list) else [names]) if name]
    return sorted({f"{name.partition('.')[0]}.py" for name in classes if "--" not in name})


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder with our config.json, so that no code of the original's is asked for.

    Raises:
        ValueError: if its files cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"the checkpoint's tokenizer cannot be read: {error}. Leave its files out of the source folder to convert "
            "the model without it."
        ) from error


def read_generation_config(source: Path, config: PreTrainedConfig, lines: list[str]) -> GenerationConfig:
    """The checkpoint's generation config, or one with the config's special tokens.

    A loop count that it holds under the original's name becomes `num_loops`, with a line about it.
    """
    if not (source / GENERATION_CONFIG).is_file():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        return GenerationConfig(**{name: getattr(config, name, None) for name in tokens})
    generation_config = GenerationConfig.from_pretrained(source)
    for name in sorted(FOREIGN_LOOP_NAMES):
        value: Any = vars(generation_config).pop(name, None)
        if value is not None:
            generation_config.num_loops = value  # pyright: ignore[reportAttributeAccessIssue] (what `generate` reads)
            lines.append(f"generation config: {name} {value} -> num_loops {value}")
    return generation_config


__all__ = [
    "CODE_FILES",
    "GENERATION_CONFIG",
    "LICENCE_FILES",
    "TOKENIZER_FILES",
    "bring_companions",
    "code_named",
    "copy_files",
]
