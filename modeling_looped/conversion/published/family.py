"""Published families: what the importer and the exporter must know of each architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.tensor_map import Link, Names, TensorMap, Unread, rename
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.rotary import LoopedRotaryEmbedding

from .source_config import SourceConfig

#: Shape of every tensor of a published checkpoint.
Shapes = Mapping[str, torch.Size]


class PublishedFamily(ABC):
    """Abstract family of published checkpoints."""

    #: What `--family` calls it.
    name: str
    #: The class that its checkpoints become, unless their config says otherwise.
    model_class: type[PreTrainedModel] = LoopedForCausalLM

    def model_class_for(self, config: Mapping[str, Any]) -> type[PreTrainedModel]:
        """The class that a checkpoint with this config becomes."""
        return self.model_class

    @abstractmethod
    def recognises(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Whether a checkpoint with this config and tensors of these names is one of the family."""

    def config_of(self, fields: Mapping[str, Any]) -> PreTrainedConfig:
        """The config with `fields`, those that are `None` left at their defaults.

        Raises:
            ValueError: for a combination of options that our model does not have.
        """
        return looped_config(self, fields)

    @abstractmethod
    def fields(self, config: SourceConfig, shapes: Shapes) -> dict[str, Any]:
        """The fields of `LoopedConfig` that say what `config` says (of another one, if `config_of` makes that); notes
        what cannot be said.

        Args:
            config: of the checkpoint. `finish` is called by whoever called this.
            shapes: of its tensors, where the config alone does not tell what they are.
        """

    @abstractmethod
    def tensor_map(
        self, config: Mapping[str, Any], looped: Any, ours: Collection[str], published: Collection[str]
    ) -> TensorMap:
        """Between the tensors of the checkpoint and those of our model.

        Args:
            config: the checkpoint's.
            looped: ours, made from `fields` by `config_of`.
            ours: names of the tensors that our model stores.
            published: names of the checkpoint's tensors, where the config alone does not tell what they are.
        """


def looped_config(family: PublishedFamily, fields: Mapping[str, Any]) -> LoopedConfig:
    """The `LoopedConfig` with `fields`, those that are `None` left at their defaults.

    Raises:
        ValueError: for a combination of options that our model does not have.
    """
    try:
        return LoopedConfig(**{field: value for field, value in fields.items() if value is not None})
    except StrictDataclassError as error:  # not a ValueError, and its text repeats the class's name
        raise ValueError(f"this {family.name} checkpoint cannot be converted: {error.__cause__ or error}") from error


def llama_fields(config: SourceConfig, *, theta: float = 10000.0) -> dict[str, Any]:
    """The fields that a config shares with Llama's.

    Args:
        config: of the checkpoint.
        theta: the family's default base of rotary embeddings.
    """
    heads = config.take("num_attention_heads")
    return {
        "vocab_size": config.take("vocab_size"),
        "hidden_size": config.take("hidden_size"),
        "intermediate_size": config.take("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.take("num_key_value_heads", heads),
        "head_dim": config.take("head_dim", None),
        "hidden_act": config.take("hidden_act", "silu"),
        "attention_dropout": config.take("attention_dropout", 0.0),
        "max_position_embeddings": config.take("max_position_embeddings", 2048),
        "rope_parameters": config.rope(theta),
        "rms_norm_eps": config.take("rms_norm_eps", 1e-6),
        "initializer_range": config.take("initializer_range", 0.02),
        "tie_word_embeddings": config.take("tie_word_embeddings", False),
        **config.special_tokens(),
    }


#: A core that runs on its own output: no prelude comes in again.
IN_PLACE = {"injection": "none", "state_init": "input", "prelude_norm": False}

#: Our name of a Llama layer's second norm -> Llama's.
LLAMA_NORMS = {"pre_feedforward_layernorm": "post_attention_layernorm"}


def copied(names: Iterable[str], parts: Mapping[str, str], *, tied: bool = False) -> list[Link]:
    """Links of tensors whose names are ours but for some parts.

    Args:
        names: our names.
        parts: part of our name between dots -> what it is called there.
        tied: whether the head is the embedding matrix.
    """
    return [
        rename(embedding_names(".".join(parts.get(part, part) for part in name.split(".")), tied=tied), name)
        for name in names
    ]


def embedding_names(name: str, *, tied: bool) -> Names:
    """The names that a tensor may go by: the embedding matrix, where it is tied, may be there as the head as well."""
    return (name, "lm_head.weight") if tied and name == "model.embed_tokens.weight" else (name,)


def rotary_tables(looped: LoopedConfig, names: Iterable[str]) -> list[Unread]:
    """Inverse frequencies that older code stored, which follow from the config."""

    def expected() -> Tensor:
        return LoopedRotaryEmbedding(looped).inv_freq

    return [
        Unread(name, "inverse frequencies of the rotary embedding", expected)
        for name in names
        if name.endswith("rotary_emb.inv_freq")
    ]


def layer_prefixes(config: LoopedConfig, prelude: str, core: str, coda: str) -> list[str]:
    """What each stored layer is called in a checkpoint that numbers prelude, core and coda separately."""
    counts = (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers)
    return [
        f"{part}.{index}" for part, count in zip((prelude, core, coda), counts, strict=True) for index in range(count)
    ]


__all__ = [
    "IN_PLACE",
    "LLAMA_NORMS",
    "PublishedFamily",
    "Shapes",
    "copied",
    "embedding_names",
    "layer_prefixes",
    "llama_fields",
    "looped_config",
    "rotary_tables",
]
