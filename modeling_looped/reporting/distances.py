"""Distances to the teacher: where the loops lead away from it, and what each shared layer alone is off.

B batch, S tokens, D hidden size, N layers of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.accounting import layout_of, looped_config
from modeling_looped.conversion.calibration import first_of

from .layer_map import LayerMap


class BoundaryDistance(NamedTuple):
    """The state at a loop's end, against the teacher's hidden state after the layer that it stands for.

    Attributes:
        layer: last stored layer of the loop; `None`: the state before the first loop.
        loop: from 0; -1 before the first.
        teacher_layer: the teacher layer whose output it is compared with (-1: the embeddings).
        relative_l2: norm of the difference over the norm of the teacher's state, over all tokens.
        cosine: mean over the tokens.
    """

    layer: int | None
    loop: int
    teacher_layer: int
    relative_l2: float
    cosine: float


class LayerError(NamedTuple):
    """A layer's output, given what enters the teacher's layer that it stands for.

    Attributes:
        layer, loop: stored layer and loop, from 0.
        teacher_layer: what it stands for there.
        of_output: norm of the difference of the two outputs over the norm of the teacher's.
        of_update: the same over the norm of what the teacher's layer adds to its input; 1: no better than a layer that
            does nothing.
    """

    layer: int
    loop: int
    teacher_layer: int
    of_output: float
    of_update: float


class Sums:
    """Sums over tokens, of which relative differences and cosines are made."""

    def __init__(self) -> None:
        self.difference = self.state = self.update = self.cosine = 0.0
        self.tokens = 0

    def add(self, ours: Tensor, theirs: Tensor, before: Tensor | None = None) -> None:
        """States [B, S, D]; `before` is what entered the teacher's layer."""
        ours, theirs = ours.float(), theirs.float().to(ours.device)
        self.difference += (ours - theirs).square().sum().item()
        self.state += theirs.square().sum().item()
        self.cosine += F.cosine_similarity(ours, theirs, dim=-1).sum().item()
        self.tokens += ours[..., 0].numel()
        if before is not None:
            self.update += (theirs - before.float().to(theirs.device)).square().sum().item()

    def relative(self, scale: float) -> float:
        """Norm of the difference over the root of `scale`."""
        return (self.difference / scale) ** 0.5 if scale > 0 else float("inf")


@torch.no_grad()
def loop_distances(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: LayerMap,
    windows: Sequence[Tensor],
    *,
    num_loops: int | None = None,
) -> list[BoundaryDistance]:
    """How far the state is from the teacher at each boundary of a loop, both reading the same text.

    Args:
        model: the looped model.
        teacher: the checkpoint it was made from.
        layers: from the conversion's manifest.
        windows: token ids [1, S].
        num_loops: loops to run; `None`: the config's.

    Raises:
        ValueError: for models that do not belong together, and for no text.
    """
    config = looped_config(model)
    check_pair(model, teacher, layers, windows)
    layout = layout_of(config, num_loops)
    first = layers.of(config.num_prelude_layers, 0)
    places: list[tuple[int | None, int, int]] = [(None, -1, first - 1)]
    ends = [(turn.layers[-1], turn.loop) for turn in layout.turns() if turn.ends_loop]
    places += [(layer, loop, layers.of(layer, loop)) for layer, loop in ends]
    sums = [Sums() for _ in places]
    for window in windows:
        theirs = layer_states(teacher, window)
        output = model(
            window.to(model.device), num_loops=layout.loops, output_loop_hidden_states=True, use_cache=False
        )
        for place, total, state in zip(places, sums, output.loop_hidden_states, strict=True):
            total.add(state, theirs[place[2] + 1])
    return [
        BoundaryDistance(*place, total.relative(total.state), total.cosine / total.tokens)
        for place, total in zip(places, sums, strict=True)
    ]


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: LayerMap,
    windows: Sequence[Tensor],
    *,
    num_loops: int | None = None,
) -> list[LayerError]:
    """What every run of every layer is off by itself: it is given what enters the teacher's layer in its place.

    So errors do not add up from layer to layer, and the row of a bad layer stands out. Arguments and errors as in
    `loop_distances`. Rows are in the order of execution.
    """
    check_pair(model, teacher, layers, windows)
    layout = layout_of(looped_config(model), num_loops)
    runs = [layout.invocation(index) for index in range(layout.num_invocations)]
    sums = {(run.layer, run.loop): Sums() for run in runs}
    for window in windows:
        theirs = layer_states(teacher, window)
        with layers_fed(model, theirs, layers, sums):
            model(window.to(model.device), num_loops=layout.loops, use_cache=False)
    rows = []
    for run in runs:
        total = sums[run.layer, run.loop]
        stands_for = layers.of(run.layer, run.loop)
        rows.append(LayerError(*run, stands_for, total.relative(total.state), total.relative(total.update)))
    return rows


@contextmanager
def layers_fed(
    model: PreTrainedModel, theirs: Sequence[Tensor], layers: LayerMap, sums: dict[tuple[int, int], Sums]
) -> Iterator[None]:
    """Within, every layer of `model` reads the teacher's state in place of its own, and its output adds to `sums`."""

    def feed(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, slot, loop = args[:3]
        return (theirs[layers.of(module.layer, loop)].to(hidden_states), slot, loop, *args[3:])

    def compare(module: Any, args: tuple[Any, ...], output: Any) -> None:
        stands_for = layers.of(module.layer, args[2])
        sums[module.layer, args[2]].add(first_of(output), theirs[stands_for + 1], theirs[stands_for])

    stack: Any = model.base_model.get_submodule("layers")
    handles = [layer.register_forward_pre_hook(feed) for layer in stack]
    handles += [layer.register_forward_hook(compare) for layer in stack]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_states(teacher: PreTrainedModel, window: Tensor) -> list[Tensor]:
    """What enters each layer of a stacked model and what leaves the last, N + 1 states [B, S, D], no norm applied."""
    stack: Any = teacher.get_submodule("model.layers")
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    handles = [stack[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [
        layer.register_forward_hook(lambda module, args, output: states.append(first_of(output))) for layer in stack
    ]
    try:
        teacher(window.to(teacher.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def check_pair(model: PreTrainedModel, teacher: PreTrainedModel, layers: LayerMap, windows: Sequence[Tensor]) -> None:
    """Raise ValueError unless the two models can be compared by this map."""
    config, stock = looped_config(model), teacher.config
    if config.num_core_layers == 0:
        raise ValueError("num_core_layers=0: without a core there are no loops to compare.")
    if not windows:
        raise ValueError("windows is empty: a distance needs text.")
    for field, ours in (("hidden_size", config.state_size), ("vocab_size", config.vocab_size)):
        if getattr(stock, field) != ours:
            raise ValueError(f"the teacher's {field}={getattr(stock, field)} must be the model's {ours}.")
    highest = max(layer for group in layers.teacher_layers for layer in group)
    if highest >= stock.num_hidden_layers:
        raise ValueError(
            f"the manifest names teacher layer {highest}, and this teacher has 0-{stock.num_hidden_layers - 1}: it is "
            "another one than the model was made from."
        )


__all__ = ["BoundaryDistance", "LayerError", "layer_errors", "layer_states", "loop_distances"]
