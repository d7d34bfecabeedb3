"""Calibration: what a teacher's layers do on a little text, for choosing layers and for weighing errors of weights.

B batch, S tokens, D hidden size, N layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .layer_drops import LossWithout, without_layers
from .verification import mean_loss

#: Projections that read the same input share its statistics: the first stands for all.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Calibration(NamedTuple):
    """Statistics of a teacher on calibration text.

    Attributes:
        similarity: mean cosine of the hidden states before layer i and before layer j, [N + 1, N + 1] (the last row
            and column: after the last layer).
        moments: mean of x x^T over the inputs x of a projection, [in, in] in float32, by layer and projection.
        tokens: number of tokens seen.
        loss_without: loss on the same text with some layers left out; the teacher runs over it when it is called.
    """

    similarity: Tensor
    moments: dict[tuple[int, str], Tensor]
    tokens: int
    loss_without: LossWithout | None = None

    def moment(self, layer: int, projection: str) -> Tensor:
        """Second moment of the input of `projection` in teacher layer `layer`."""
        return self.moments[layer, SAME_INPUT.get(projection, projection)]

    @property
    def layers(self) -> set[int]:
        """The layers whose projections' inputs were measured."""
        return {layer for layer, _ in self.moments}

    @property
    def angular_distance(self) -> Tensor:
        """arccos(similarity) / pi, [N + 1, N + 1], in [0, 1]: 0 for the same direction (Gromov et al., 2403.17887)."""
        return torch.arccos(self.similarity.clamp(-1.0, 1.0)) / torch.pi

    @property
    def block_influence(self) -> Tensor:
        """1 - cosine of each layer's input and output, [N]: how much it turns the state (ShortGPT, 2403.03853)."""
        return 1.0 - self.similarity.diagonal(offset=1)


@torch.no_grad()
def calibrate(
    teacher: PreTrainedModel, windows: Iterable[Tensor], *, layers: Collection[int] | None = None
) -> Calibration:
    """Run `teacher` over `windows` of token ids [B, S].

    Args:
        teacher: a stacked causal language model.
        windows: calibration text.
        layers: teacher layers whose projections' inputs are measured; `None`: all, `()`: none.
    """
    windows = list(windows)
    stack: Any = teacher.get_submodule("model.layers")
    wanted = range(len(stack)) if layers is None else sorted(layers)
    sums: dict[tuple[int, str], Tensor] = {}
    seen = 0
    cosines = torch.zeros(len(stack) + 1, len(stack) + 1, dtype=torch.float64)
    last: dict[str, Tensor] = {}
    handles = [stack[-1].register_forward_hook(lambda module, args, output: last.update(output=first_of(output)))]
    for layer in wanted:
        for name, module in stack[layer].named_modules():
            projection = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and projection not in SAME_INPUT:
                handles.append(module.register_forward_pre_hook(adder(sums, (layer, projection))))
    try:
        for window in windows:
            output = teacher(window.to(teacher.device), output_hidden_states=True, use_cache=False)
            states = [*output.hidden_states[:-1], last["output"]]  # not the final norm's, which Transformers gives
            directions = F.normalize(torch.stack(states).flatten(1, 2).float(), dim=-1)  # [N + 1, B * S, D]
            cosines += torch.einsum("isd,jsd->ij", directions, directions).double().cpu()
            seen += window.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("windows is empty: calibration needs text.")
    rows = [row[None] for window in windows for row in window]

    def loss_without(layers: Collection[int]) -> float:
        with without_layers(teacher, layers):
            return mean_loss(teacher, rows)

    moments = {key: total / seen for key, total in sums.items()}
    return Calibration((cosines / seen).float(), moments, seen, loss_without)


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def adder(sums: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    """A hook that adds x x^T of a projection's inputs."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        moment = rows.T @ rows
        sums[key] = sums[key] + moment if key in sums else moment

    return hook


__all__ = ["Calibration", "calibrate"]
