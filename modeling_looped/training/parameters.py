"""Parameters of a student: what each one is, which of them train, and which optimiser takes it.

Works for any causal language model of Transformers, looped or not, with or without PEFT: what decides is the module
that owns a parameter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.loop_adapter import LoopLoRA
from modeling_looped.registry import SelfInitialised

#: Names for `trainable`; anything else is a regular expression.
TRAINABLE = ("all", "adapters", "shared")

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Parameter(NamedTuple):
    """One parameter and what it is.

    Attributes:
        name: as in `named_parameters`.
        value: the parameter.
        role: `matrix` (weight of a linear map inside a layer), `experts` (such weights of several experts in one
            tensor), `embedding` (token embeddings and head), `low_rank` (factors of loop adapters and of PEFT's),
            `loop` (what else the loop system owns: injection, bridge, update and its gates, conditioning, halting,
            readout), `norm`, or `other` (biases, gates and routers, all that is left).
        layer: stored layer it belongs to; `None`: none.
    """

    name: str
    value: nn.Parameter
    role: str
    layer: int | None


def classify(model: nn.Module) -> list[Parameter]:
    """Every parameter of `model`, once, in the order of `named_parameters`."""
    found = []
    owners = dict(model.named_modules())
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    are_named_so = any(LAYER.search(name) for name in owners)
    for name, value in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        index = index_in_name(name) if are_named_so else index_in_list(name, owners)
        role = "embedding" if owners[owner] is head else role_of(name, owners[owner], kind, value, index)
        found.append(Parameter(name, value, role, index))
    return found


def index_in_name(name: str) -> int | None:
    """Layer of a parameter whose name holds `layers.<index>`; `None`: it is in none."""
    layer = LAYER.search(name)
    return int(layer[1]) if layer else None


def index_in_list(name: str, modules: dict[str, nn.Module]) -> int | None:
    """Layer of a parameter in a model whose list of layers has another name than `layers`, such as GPT-2's `h`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and isinstance(modules[".".join(parts[:place])], nn.ModuleList):
            return int(part)
    return None


def role_of(name: str, owner: nn.Module, kind: str, value: nn.Parameter, layer: int | None) -> str:
    """The role of a parameter called `kind` in the module `owner`; see `Parameter`."""
    if "lora_" in name or (isinstance(owner, LoopLoRA) and kind in ("A", "B")):
        return "low_rank"
    if isinstance(owner, SelfInitialised):
        return "loop"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if isinstance(owner, nn.Embedding) or "lm_head" in name:
        return "embedding"
    if layer is None:
        return "other"
    if value.ndim == 3:
        return "experts"
    linear = isinstance(owner, (nn.Linear, Conv1D)) and kind == "weight" and value.ndim == 2
    # a gate with a few outputs is no hidden matrix: orthogonalising its gradient would make every head's step as large
    return "matrix" if linear and not name.endswith("gate.weight") else "other"


def decays(parameter: Parameter) -> bool:
    """Whether weight decay applies: to matrices, those of experts, embeddings and low-rank factors, and nothing else.

    The loop system's own parameters do not decay, even those that are matrices: `A_log` and `dt_bias` would drift to
    a fixed decay of their own, gates to one half, bridges and update scales away from the identity that they start at.
    Nor do norms, one row per loop or not, nor biases.
    """
    return parameter.role in ("matrix", "experts", "embedding", "low_rank")


def select_trainable(model: nn.Module, trainable: str) -> list[str]:
    """Freeze all parameters of `model` but those that `trainable` names; what is frozen already stays so.

    Args:
        model: the student.
        trainable: `all`; `adapters`: loop adapters, bridges, injection, update gates and all norms; `shared`: the
            layers of the core, which several loops use, without their adapters; or a regular expression, which must be
            found in a parameter's name.

    Returns:
        the names of the parameters that train.

    Raises:
        ValueError: if that leaves nothing to train; says what there is.
    """
    parameters = classify(model)
    if trainable == "shared":
        config = getattr(model, "config", None)
        core = config.is_core_layer if isinstance(config, LoopedConfig) else lambda layer: False
        wanted = {p.name for p in parameters if p.layer is not None and core(p.layer) and p.role != "low_rank"}
    elif trainable == "adapters":
        wanted = {p.name for p in parameters if p.role in ("low_rank", "loop", "norm")}
    elif trainable == "all":
        wanted = {p.name for p in parameters}
    else:
        try:
            pattern = re.compile(trainable)
        except re.error as error:
            raise ValueError(
                f"trainable={trainable!r} is neither one of {', '.join(TRAINABLE)} nor a regular expression: {error}."
            ) from error
        wanted = {p.name for p in parameters if pattern.search(p.name)}
    trained = [p.name for p in parameters if p.name in wanted and p.value.requires_grad]
    if not trained:
        counts = ", ".join(f"{count} {role}" for role, count in Counter(p.role for p in parameters).items())
        examples = ", ".join(p.name for p in parameters[:: max(1, len(parameters) // 4)][:4])
        raise ValueError(
            f"trainable={trainable!r} leaves no parameter to train. The model has {counts} parameters, for example "
            f"{examples}; choose one of {', '.join(TRAINABLE)}, or a regular expression that is found in a name."
        )
    for parameter in parameters:
        if parameter.name not in wanted:
            parameter.value.requires_grad_(False)
    return trained


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    muon: bool,
    muon_learning_rate: float | None = None,
    muon_weight_decay: float | None = None,
    adapter_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of an optimiser that hold every trainable parameter exactly once.

    Args:
        model: the student.
        learning_rate: of everything without a rate of its own.
        weight_decay: of what decays, see `decays`.
        muon: whether hidden matrices go to Muon instead of AdamW; those of experts in one tensor, which Muon does not
            take, stay with it.
        muon_learning_rate: of those.
        muon_weight_decay: of those; `None`: `weight_decay`.
        adapter_learning_rate: of low-rank factors and of the loop system's own parameters.
        embedding_learning_rate: of token embeddings and head.

    Returns:
        dicts with `params`, `lr`, `weight_decay`, `algorithm` (`muon` or `adamw`), and `name`.

    Raises:
        ValueError: if nothing is trainable, or if `muon` finds no hidden matrix.
    """
    rates = {
        "matrix": muon_learning_rate if muon else None,
        "embedding": embedding_learning_rate,
        "low_rank": adapter_learning_rate,
        "loop": adapter_learning_rate,
    }
    groups: dict[str, dict[str, Any]] = {}
    parameters = classify(model)
    if muon and all(parameter.role != "matrix" for parameter in parameters):
        raise ValueError(
            f"muon=True (optim_recipe='muon'): {type(model).__name__} has no hidden matrix that Muon could take, no "
            "linear map in a list of layers. Use optim_recipe='adamw'."
        )
    for parameter in parameters:
        if not parameter.value.requires_grad:
            continue
        own_rate = rates.get(parameter.role)
        to_muon = muon and parameter.role == "matrix"
        decay = muon_weight_decay if to_muon and muon_weight_decay is not None else weight_decay
        group = groups.setdefault(
            parameter.role,
            {
                "name": parameter.role,
                "params": [],
                "lr": learning_rate if own_rate is None else own_rate,
                "weight_decay": decay if decays(parameter) else 0.0,
                "algorithm": "muon" if to_muon else "adamw",
            },
        )
        group["params"].append(parameter.value)
    if not groups:
        raise ValueError("the model has no trainable parameter: nothing could be optimised.")
    return list(groups.values())


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars."""
    return sum(parameter.numel() for parameter in parameters)


__all__ = ["TRAINABLE", "Parameter", "classify", "count", "decays", "parameter_groups", "select_trainable"]
