"""Activations: those that Transformers knows by name, and those of published looped models that it does not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN


class HalfSquaredReLU(nn.Module):
    """0.5 * relu(x)^2, the activation of Parcae's MLP (arXiv 2604.12946)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * F.relu(x).square()


OWN_ACTIVATIONS: dict[str, type[nn.Module]] = {"half_relu2": HalfSquaredReLU}

#: Values of `config.hidden_act`.
ACTIVATION_NAMES = (*OWN_ACTIVATIONS, *ACT2FN)


def build_activation(name: str) -> nn.Module:
    """The activation called `name`."""
    return OWN_ACTIVATIONS[name]() if name in OWN_ACTIVATIONS else ACT2FN[name]


__all__ = ["ACTIVATION_NAMES", "build_activation"]
