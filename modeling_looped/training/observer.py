"""Watching the loop of a model in training: its states as they pass, without a change to the model.

Every loop ends with a call of the model's halting rule (the rule `none` included), outside of what checkpointing of
activations recomputes. A hook on that call sees the state before and after the loop, once per loop and forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainingArguments

from modeling_looped.halting import Step


class Place(NamedTuple):
    """Where in a model a loop is.

    Attributes:
        model: name of the looped model within what is trained; empty where it is the only one.
        group: which group of core layers, from 0 (`core_group_size`).
        loop: from 1.
    """

    model: str
    group: int
    loop: int

    def key(self, prefix: str, quantity: str) -> str:
        """Name of a quantity of this loop in the logs."""
        group = f"_group_{self.group + 1}" if self.group else ""
        return f"{prefix}/{self.model + '_' if self.model else ''}{quantity}{group}_{self.loop}"


def looped_models(model: nn.Module) -> dict[str, Any]:
    """The looped base models with a core inside of `model`, however it is wrapped, by a short name.

    Raises:
        ValueError: if there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "config", None), "model_type", None) == "looped" and "halting" in module._modules
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no looped model with a core (num_core_layers above 0): there is no loop to "
            "watch."
        )
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    return {name.partition(".")[0]: module for name, module in found.items()}  # encoder and decoder


def watch_loops(model: str, base: Any, see: Callable[[Place, Step], None]) -> RemovableHandle:
    """Call `see` after every loop of a looped base model, until the handle that is returned is removed."""
    group = -1

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal group
        _, step, loop_idx, is_last = arguments
        group += loop_idx == 0
        see(Place(model, group, loop_idx + 1), step)
        if is_last:
            group = -1

    return base.halting.register_forward_pre_hook(hook)


def token_norms(state: Tensor) -> Tensor:
    """L2 norm of every token's state, all its residual streams together: [B, S, D] or [B, S, n, D] -> fp32 [B, S]."""
    return torch.linalg.vector_norm(state.detach().flatten(2), dim=-1, dtype=torch.float32)


def is_compiled_whole(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether `torch.compile` traces the whole model, where a hook that comes later is not seen."""
    return bool(
        args.torch_compile
        or any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


__all__ = ["Place", "evaluating", "is_compiled_whole", "looped_models", "token_norms", "watch_loops"]
