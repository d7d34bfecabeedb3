"""What the training tests share: a tokenizer, sentences, and arguments of a small run on the CPU."""

import string
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, TrainingArguments

#: Every character is a token; with the three special ones they fill `tiny_config`'s vocabulary of 97.
CHARACTERS = " \n" + (string.ascii_letters + string.digits + string.punctuation)[:92]

SENTENCES = [
    "The cat sat on the mat.",
    "A loop runs the same layers again.",
    "Two and two make four.",
    "Rain fell.",
    "Nobody saw the ship leave the harbour.",
    "Seven times seven is 49.",
    "Tea, please.",
    "The last one is short.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer by characters: pad 0, bos 1, eos 2, as in `tiny_config`; encode(a + b) = encode(a) + encode(b)."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def sentence_dataset() -> Dataset:
    """The sentences as token ids, of unequal lengths."""
    tokenizer = tiny_tokenizer()
    return Dataset.from_list([{"input_ids": tokenizer(sentence)["input_ids"]} for sentence in SENTENCES])


def run_arguments(output_dir: Path, cls: type = TrainingArguments, **overrides: Any) -> TrainingArguments:
    """Arguments of a run of a few steps; everything that is not about size or place keeps its default."""
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(output_dir=str(output_dir), **{**settings, **overrides})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
