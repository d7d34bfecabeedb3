"""Dropping layers by what it costs: the loss of a teacher without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

#: Loss in nats per token of a teacher with these layers left out.
LossWithout = Callable[[Collection[int]], float]


@contextlib.contextmanager
def without_layers(teacher: PreTrainedModel, layers: Collection[int]) -> Iterator[None]:
    """Inside, these layers of a stacked model hand their input on; what is asked of the others stays theirs.

    They stay in their places, since a model may choose a mask by their index. Call it without a cache, which would
    wait for their keys and values.
    """
    stack: Any = teacher.get_submodule("model.layers")
    left_out = [stack[layer] for layer in set(layers)]
    for layer in left_out:
        layer.forward = handed_on  # on the module itself, before its class's
    try:
        yield
    finally:
        for layer in left_out:
            del layer.forward


def handed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer that is left out returns."""
    return hidden_states


def cheapest_drops(
    loss_without: LossWithout,
    num_layers: int,
    count: int,
    *,
    report: Callable[[str], object] = lambda line: None,
) -> list[int]:
    """`count` layers, dropped one by one: each time the one without which the loss is lowest.

    The first and the last layer stay. About `num_layers * count` losses are computed.

    Returns:
        the layers in order.
    """
    if not 1 <= count <= num_layers - 2:
        raise ValueError(
            f"count={count} must lie in 1..{num_layers - 2}: the first and the last of {num_layers} layers stay."
        )
    dropped: list[int] = []
    for _ in range(count):
        rest = [layer for layer in range(1, num_layers - 1) if layer not in dropped]
        loss, layer = min((loss_without([*dropped, layer]), layer) for layer in rest)
        dropped.append(layer)
        report(f"without layer {layer} too, {len(dropped)} of {count}: loss {loss:.3f} on the calibration text")
    return sorted(dropped)


__all__ = ["LossWithout", "cheapest_drops", "without_layers"]
