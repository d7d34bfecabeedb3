"""Alignment: the neurons and heads of one layer, brought into the order in which they are most like another layer's.

A layer computes the same whatever the order of its MLP's neurons, of its key-value groups, and of the query heads in a
group. Two layers trained apart have no order in common, so an average of them mixes unlike parts unless one is
permuted first (Git Re-Basin, arXiv 2209.04836; here between layers of one model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

#: Weights of one layer under our names without the layer's prefix, such as `mlp.up_proj.weight`.
Layer = Mapping[str, Tensor]

ALIGNMENTS = ("none", "neurons", "neurons_and_heads")


class Aligned(NamedTuple):
    """A layer with its parts in another order: the same function.

    Attributes:
        weights: of the layer.
        inputs: projection whose inputs were reordered with them -> the permutation.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def permuted(self, projection: str, moment: Tensor) -> Tensor:
        """The second moment [in, in] of the projection's input, in the new order."""
        order = self.inputs.get(projection)
        return moment if order is None else moment[order][:, order]


def unaligned(layer: Layer) -> Aligned:
    """A layer as it is."""
    return Aligned(dict(layer), {})


def align(layer: Layer, reference: Layer, *, what: str, head_dim: int, groups: int) -> Aligned:
    """`layer` with its parts in the order of `reference`'s.

    Args:
        layer, reference: weights of two layers of equal shape.
        what: one of `ALIGNMENTS`.
        head_dim: channels of a head.
        groups: query heads per key-value head.
    """
    if what not in ALIGNMENTS:
        raise ValueError(f"align={what!r} must be one of: {', '.join(ALIGNMENTS)}.")
    aligned = unaligned(layer)
    if what == "none":
        return aligned
    order = best_order(neurons(layer), neurons(reference))
    aligned.weights.update(with_neurons(layer, order))
    aligned.inputs["down_proj"] = order
    if what == "neurons_and_heads":
        query_rows, key_rows = head_order(layer, reference, head_dim=head_dim, groups=groups)
        aligned.weights.update(with_heads(layer, query_rows, key_rows))
        aligned.inputs["o_proj"] = query_rows
    return aligned


def best_order(parts: Tensor, reference: Tensor) -> Tensor:
    """The permutation p that maximises the sum of the inner products of `parts[p[i]]` and `reference[i]`, [n, d]."""
    _, order = linear_sum_assignment((reference @ parts.T).numpy(force=True), maximize=True)
    return torch.as_tensor(order, device=parts.device)


def neurons(layer: Layer) -> Tensor:
    """Everything that belongs to each MLP neuron, one row each."""
    rows = [tensor.float().view(len(tensor), -1) for name, tensor in sorted(layer.items()) if is_neuron_row(name)]
    return torch.cat([*rows, layer["mlp.down_proj.weight"].float().T], dim=1)


def with_neurons(layer: Layer, order: Tensor) -> dict[str, Tensor]:
    """The MLP with its neurons in `order`."""
    changed = {name: tensor[order] for name, tensor in layer.items() if is_neuron_row(name)}
    return changed | {"mlp.down_proj.weight": layer["mlp.down_proj.weight"][:, order]}


def is_neuron_row(name: str) -> bool:
    """Whether a tensor has one row per MLP neuron."""
    return name.startswith(("mlp.gate_proj.", "mlp.up_proj."))


def head_order(layer: Layer, reference: Layer, *, head_dim: int, groups: int) -> tuple[Tensor, Tensor]:
    """Permutations of the query channels and of the key-value channels that match `reference` best.

    Key-value groups move as a whole, with their query heads, and query heads move inside their group.
    """

    def queries(source: Layer) -> Tensor:
        """[key-value heads, query heads of each, features]."""
        q = source["self_attn.q_proj.weight"].float()
        o = source["self_attn.o_proj.weight"].float().T
        heads = len(q) // head_dim
        return torch.cat([q.view(heads, -1), o.reshape(heads, -1)], dim=1).unflatten(0, (-1, groups))

    def keys(source: Layer) -> Tensor:
        """[key-value heads, features]."""
        k, v = (source[f"self_attn.{name}_proj.weight"].float() for name in "kv")
        return torch.cat([k.view(len(k) // head_dim, -1), v.view(len(v) // head_dim, -1)], dim=1)

    ours, theirs = queries(layer), queries(reference)
    indices = range(len(ours))
    inner = [[best_order(ours[i], theirs[j]) for i in indices] for j in indices]
    gain = keys(reference) @ keys(layer).T
    for j in indices:
        for i in indices:
            gain[j, i] += (ours[i][inner[j][i]] * theirs[j]).sum()
    _, chosen = linear_sum_assignment(gain.numpy(force=True), maximize=True)
    device = gain.device
    key_heads = torch.as_tensor(chosen, device=device)
    query_heads = torch.cat([i * groups + inner[j][i] for j, i in enumerate(chosen.tolist())])
    channels = torch.arange(head_dim, device=device)
    query_rows, key_rows = ((heads[:, None] * head_dim + channels).flatten() for heads in (query_heads, key_heads))
    return query_rows, key_rows


def with_heads(layer: Layer, query_rows: Tensor, key_rows: Tensor) -> dict[str, Tensor]:
    """The attention with its channels in these orders.

    A rotary embedding treats all heads alike, and a norm per head has one weight for all, so neither stands in the
    way; a norm over all heads' channels travels with them.
    """
    o = layer["self_attn.o_proj.weight"]
    changed = {"self_attn.o_proj.weight": o[:, query_rows]}
    for name, tensor in layer.items():
        for part, rows in (("q", query_rows), ("k", key_rows), ("v", key_rows)):
            if name.startswith(f"self_attn.{part}_") and len(tensor) == len(rows):
                changed[name] = tensor[rows]
    return changed


__all__ = ["ALIGNMENTS", "Aligned", "align", "unaligned"]
