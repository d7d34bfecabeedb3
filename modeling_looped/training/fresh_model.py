"""A model with random weights from what a recipe says of it."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, set_seed
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped.configuration_looped import LoopedConfig

from .recipe import check_names

#: Ids that a model's config and its tokenizer both hold.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_values(model: str | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a model's config that a recipe names, `model_type` among them.

    Args:
        model: JSON file, folder with a `config.json`, or fields.
        changes: fields that replace those.

    Raises:
        ValueError: if there is no such file, or the model's type or a field does not exist.
    """
    values = dict(read_config(model) if isinstance(model, str) else model)
    values.update(changes or {})
    kind = values.setdefault("model_type", LoopedConfig.model_type)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
        raise ValueError(
            f"model: Transformers has no model_type={kind!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    known = set(CONFIG_MAPPING[kind]().to_dict()) | set(getattr(CONFIG_MAPPING[kind], "attribute_map", {}))
    check_names(values, {*known, "architectures", "auto_map"}, "model")
    return values


def read_config(path: str) -> dict[str, Any]:
    """The JSON in a file, or in `config.json` of a folder."""
    place = Path(path).expanduser()
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ValueError(
            f"model={path!r} must be a JSON file, a folder that holds a config.json, or a mapping of fields (on a "
            "command line: JSON)."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"model: {file} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"model: {file} must hold the fields of a config.")
    return values


def build_config(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The config of these fields; with a tokenizer, its size and token ids fill in those that are not named.

    Raises:
        ValueError: for fields that make no sense, or contradict the tokenizer.
    """
    given = {name: value for name, value in values.items() if name not in ("model_type", "transformers_version")}
    if tokenizer is not None:
        size = given.setdefault("vocab_size", len(tokenizer))
        if size < len(tokenizer):
            raise ValueError(
                f"model: vocab_size={size} is less than the {len(tokenizer)} tokens of the tokenizer: the others "
                "would have no embedding."
            )
        for name in TOKEN_IDS:
            theirs = getattr(tokenizer, name)
            if given.get(name) is not None and given[name] != theirs:
                raise ValueError(
                    f"model: {name}={given[name]} is not the tokenizer's, which is {theirs}. Leave it out, or set it "
                    "to null."
                )
            given[name] = theirs
    try:
        return CONFIG_MAPPING[values["model_type"]](**given)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model: {error}") from error


def check_config(config: PreTrainedConfig, block_length: int) -> None:
    """Raise ValueError for a model that cannot be trained on blocks of `block_length` tokens to predict the next."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_length > longest:
        raise ValueError(
            f"max_length={block_length} is more than the model's max_position_embeddings={longest}: make blocks "
            "shorter, or the model for longer texts."
        )
    if getattr(config, "is_causal", True) is False:
        raise ValueError("model: is_causal=False is an encoder, which does not predict the next token.")


def check_attention(
    config: PreTrainedConfig, attn_implementation: str | None, field: str = "attn_implementation"
) -> None:
    """Raise ValueError, with the name of `field`, for an attention that the model of `config` cannot have here."""
    if attn_implementation is None:
        return
    try:
        with torch.device("meta"):  # Transformers decides in the model's constructor; this one costs no memory
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attn_implementation)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{field}={attn_implementation!r}: {error}") from error


def fresh_model(config: PreTrainedConfig, seed: int, attn_implementation: str | None = None) -> PreTrainedModel:
    """The causal language model of `config` in fp32, its weights drawn with `seed`: the same in every process.

    Args:
        config: of the model.
        seed: of its weights.
        attn_implementation: one of Transformers' names; `None`: its own choice.

    Raises:
        ValueError: if Transformers has no model for this config, or no such attention.
    """
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)


__all__ = ["build_config", "check_attention", "check_config", "config_values", "fresh_model"]
