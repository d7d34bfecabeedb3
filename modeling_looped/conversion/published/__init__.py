"""Published families of looped models: their configs and tensors, in both directions.

A family is one class in one file. To add one: derive from `PublishedFamily`, and list it in `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .albert import Albert
from .family import PublishedFamily
from .hrm import HrmText
from .huginn import Huginn
from .in_place import LoopedInPlace
from .mor import MixtureOfRecursions
from .nanbeige import Nanbeige
from .ouro import Ouro
from .parcae import Parcae
from .recursive import Recursive
from .source_config import SourceConfig
from .stacked import Stacked
from .universal import UniversalTransformer
from .universal_decoder import UniversalEncoderDecoder

#: Name -> family, in the order in which `auto` asks them: `stacked` takes every Llama that is nothing else.
PUBLISHED: dict[str, PublishedFamily] = {
    family.name: family
    for family in (
        Parcae(),
        Huginn(),
        Ouro(),
        Nanbeige(),
        MixtureOfRecursions(),
        LoopedInPlace(),
        Recursive(),
        HrmText(),
        Albert(),
        UniversalTransformer(),
        UniversalEncoderDecoder(),
        Stacked(),
    )
}


def published_family(name: str, config: Mapping[str, Any], names: Collection[str]) -> PublishedFamily:
    """The family called `name`; `auto`: the first that recognises the checkpoint.

    Args:
        name: of the family, or `auto`.
        config: the checkpoint's.
        names: names of its tensors.

    Raises:
        ValueError: if there is none; names those there are.
    """
    if name != "auto":
        if name not in PUBLISHED:
            raise ValueError(f"family={name!r} must be one of: auto, {', '.join(PUBLISHED)}.")
        return PUBLISHED[name]
    for family in PUBLISHED.values():
        if family.recognises(config, names):
            return family
    raise ValueError(
        f"no family recognises a checkpoint with model_type={config.get('model_type')!r} and "
        f"architectures={config.get('architectures')!r}; name one with --family: {', '.join(PUBLISHED)}."
    )


__all__ = ["PUBLISHED", "PublishedFamily", "SourceConfig", "published_family"]
