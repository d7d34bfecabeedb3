"""The tokenizer of a model that is trained from scratch: one that exists, or one trained on the run's own text."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .data import BATCH, Source, batches

#: Ends a document and begins a text, as in GPT-2; fills up a batch.
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"

#: What the tokenizer in a folder was trained on, beside it.
TRAINED_ON = "trained_on.json"

#: The bytes and the two special tokens.
SMALLEST = 256 + 2


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's kind) with at most `vocab_size` tokens; the same for the same text.

    It has a token for every byte, so no text is unknown to it, and none is changed: decoding gives back what was
    encoded. A text with too few pairs of tokens that occur twice makes fewer than `vocab_size`.

    Args:
        texts: documents.
        vocab_size: tokens, at least 258: bytes, end of text and padding.
        max_length: tokens of the longest text that the model is for.

    Raises:
        ValueError: for a smaller `vocab_size`, or if there is no text.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"tokenizer_vocab_size={vocab_size} must be at least {SMALLEST}: the bytes and two specials.")
    first = next(texts, None)
    if first is None:
        raise ValueError("there is no text to train a tokenizer on.")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(batches(itertools.chain([first], texts), BATCH), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # no model of this kind takes token types
    )


def trained_tokenizer(
    folder: Path,
    source: Source,
    *,
    vocab_size: int,
    max_length: int,
    max_characters: int,
    report: Callable[[str], object] = lambda line: None,
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; if there is none yet, it is trained on `source` and put there, whole or not at all.

    Args:
        folder: place of the tokenizer.
        source: documents, of which the first ones are read.
        vocab_size, max_length: as in `train_tokenizer`.
        max_characters: about how much text is read.
        report: receives what is done.

    Raises:
        ValueError: if a tokenizer is there that was trained on other text or otherwise, or cannot be trained.
    """
    settings: Any = {
        "source": {"path": source.path, "config": source.config, "split": source.split, "field": source.text_field},
        "vocab_size": vocab_size,
        "max_length": max_length,
        "max_characters": max_characters,
        "seed": source.seed,
    }
    if (folder / TRAINED_ON).is_file():
        earlier = json.loads((folder / TRAINED_ON).read_text(encoding="utf-8"))
        if earlier != settings:
            changed = [name for name in settings if earlier.get(name) != settings[name]]
            raise ValueError(
                f"{str(folder)!r} holds a tokenizer that was trained with "
                f"{', '.join(f'{name}={earlier.get(name)!r} (here {settings[name]!r})' for name in changed)}. Choose "
                "another output_dir, or remove it."
            )
        return AutoTokenizer.from_pretrained(folder)
    report(f"training a tokenizer of {vocab_size:,} tokens")
    tokenizer = train_tokenizer(beginning(source, max_characters), vocab_size, max_length)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    (unfinished / TRAINED_ON).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    # from its files, as a resumed run has it
    return AutoTokenizer.from_pretrained(folder)


def beginning(source: Source, max_characters: int) -> Iterator[str]:
    """The first documents of `source`, the last of them cut off at `max_characters` characters."""
    left = max_characters
    for text in source.documents():
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


__all__ = ["END_OF_TEXT", "PADDING", "train_tokenizer", "trained_tokenizer"]
