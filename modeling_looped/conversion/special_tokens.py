"""Special tokens: one answer to where a text begins and ends, wherever it is asked.

Config, generation config, tokenizer and chat template each say which token ends a text. Where they disagree,
generation does not stop, or training masks the wrong label; so a conversion brings them together before it saves.
"""

from __future__ import annotations

from jinja2.exceptions import TemplateError
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def align_special_tokens(
    config: PreTrainedConfig, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Make config, generation config, tokenizer and chat template agree on bos, eos and pad; changes them in place.

    The tokenizer decides, as it is what makes the ids. Every token that anything ends a text with ends generation, the
    chat template's end of a turn among them. A pad token that only the configs know is given to the tokenizer.

    Returns:
        one line per change, and one for what is consistent but unwise.

    Raises:
        ValueError: for an id that the model has no embedding for, or a chat template that cannot be rendered.
    """
    bos = settled("bos_token_id", config, generation_config, tokenizer)
    pad = settled("pad_token_id", config, generation_config, tokenizer)
    ends = configured_ids("eos_token_id", config, generation_config)
    eos = list(dict.fromkeys([*ends, *ids(tokenizer.eos_token_id), *end_of_turn(tokenizer)]))
    for token in (*bos, *eos, *pad):
        if token >= config.vocab_size:
            raise ValueError(
                f"special token id {token} must be below vocab_size={config.vocab_size}: mend the teacher."
            )

    lines = []
    if pad and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad[0])
        lines.append(f"tokenizer: pad_token None -> {tokenizer.pad_token!r} (as in the config)")
    for where, target in (("config", config), ("generation config", generation_config)):
        for name, wanted in (("bos_token_id", bos), ("eos_token_id", eos), ("pad_token_id", pad)):
            value = wanted if len(wanted) > 1 else wanted[0] if wanted else None
            if getattr(target, name) != value:
                lines.append(f"{where}: {name} {getattr(target, name)} -> {value}")
                setattr(target, name, value)
    if set(pad) & set(eos):
        lines.append(
            f"note: {tokenizer.pad_token!r} both pads and ends a text: training that masks padding by its id would "
            "mask the end too"
        )
    return lines


def settled(
    name: str, config: PreTrainedConfig, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The id of a token there is one of: the tokenizer's, or else the configured one; empty: there is none."""
    return ids(getattr(tokenizer, name)) or configured_ids(name, config, generation_config)


def configured_ids(name: str, config: PreTrainedConfig, generation_config: GenerationConfig) -> list[int]:
    """What `generate` goes by: the generation config, then the config. Some configs write -1 for "there is none"."""
    found = ids(getattr(generation_config, name)) or ids(getattr(config, name))
    return [token for token in found if token >= 0]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template puts behind an assistant's message; empty: no template, or no token.

    Raises:
        ValueError: for a template that cannot be rendered.
    """
    if not tokenizer.chat_template:
        return []
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat_template cannot write a question and its answer: {type(error).__name__}: {error}. "
            "Mend it, or leave it out of the source folder to convert the model without it."
        ) from error
    _, _, behind = text.rpartition(answer)
    tokens = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids
    return [token for token in tokens[:1] if token in tokenizer.all_special_ids]


def ids(value: object) -> list[int]:
    """Token ids as a list, whichever way they are written."""
    if isinstance(value, list | tuple):
        return [token for token in value if isinstance(token, int)]
    return [value] if isinstance(value, int) else []


__all__ = ["align_special_tokens", "end_of_turn"]
