"""Source config: the config of a published checkpoint, read field by field so that nothing in it goes unnoticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

#: Fields that say nothing about the function of a model's weights.
HARMLESS = frozenset(
    {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_encoder_decoder", "tie_word_embeddings"}
    | GenerationConfig._get_default_generation_params().keys()
    | {
        "_attn_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "attn_implementation",
        "initializer_range",
        "is_decoder",
        "model_type",
        "name",
        "name_or_path",
        "output_attentions",
        "pretraining_tp",
        "pruned_heads",
        "tie_encoder_decoder",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
    }
)

_REQUIRED: Any = object()


class SourceConfig:
    """A published config whose every field is read, known to be harmless, or refused.

    Problems are collected, so that one run names them all.

    Args:
        family: the family's name, for messages.
        values: what `config.json` holds.
    """

    def __init__(self, family: str, values: Mapping[str, Any]):
        self.family = family
        self.values = values
        self._known: set[str] = set()
        self._problems: list[str] = []

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field; `default` where there is none or it is `None`. Without a default it must be there."""
        self._known.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            self._problems.append(f"{name} is missing")
            return None
        return default

    def supported(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The value of a field of which only some values can be expressed."""
        value = self.take(name, default)
        if value not in allowed:
            self.refuse(name, f"supported: {', '.join(map(repr, allowed))}")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change nothing about the function: of training, or of parts that are switched off."""
        self._known.update(names)

    def refuse(self, name: str, because: str) -> None:
        """Note that the value of a field cannot be expressed."""
        self._problems.append(f"{name}={self.values.get(name)!r} ({because})")

    def problem(self, text: str) -> None:
        """Note what else stands in the way."""
        self._problems.append(text)

    def special_tokens(self) -> dict[str, Any]:
        """The ids of the special tokens, as our config has them; some configs write -1 for "there is none"."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        self.ignore(*names)
        found = {name: self.values.get(name) for name in names}
        return {name: None if value == -1 else value for name, value in found.items()}

    def rope(self, theta: float) -> dict[str, Any]:
        """Rotary parameters, in whichever of Transformers' notations; `theta` where no base is given."""
        self.ignore("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
        parameters = dict(self.values.get("rope_scaling") or {}) | dict(self.values.get("rope_parameters") or {})
        kind = parameters.pop("type", None)
        parameters.setdefault("rope_type", kind or "default")
        parameters.setdefault("rope_theta", self.values.get("rope_theta") or theta)
        if (self.values.get("partial_rotary_factor") or 1.0) != 1.0:
            self.refuse("partial_rotary_factor", "supported: 1")
        return parameters

    def labels(self) -> dict[str, Any]:
        """Names and kind of the classes of a classifier, if the config has them."""
        given = {name: self.take(name, None) for name in ("id2label", "label2id", "problem_type")}
        return {name: value for name, value in given.items() if value is not None}

    def finish(self) -> None:
        """Raise ValueError if there is anything in the config that would be lost."""
        unknown = [
            f"{name}={value!r} (not a field that is known; --set {name}=null if it changes nothing)"
            for name, value in self.values.items()
            if name not in self._known and name not in HARMLESS and value not in (None, False, [], {})
        ]
        if self.values.get("quantization_config"):
            unknown.append("quantization_config (only plain weights can be converted)")
        if self._problems or unknown:
            raise ValueError(
                f"this {self.family} checkpoint cannot be converted: {'; '.join([*self._problems, *unknown])}."
            )


__all__ = ["SourceConfig"]
