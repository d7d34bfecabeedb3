"""Costs by loop count, as rows and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers.modeling_utils import PreTrainedModel

from modeling_looped.accounting import kv_cache_bytes, layout_of, looped_config, parameter_counts, token_flops

from .memory import inference_memory


class Costs(NamedTuple):
    """What a loop count costs.

    Attributes:
        num_loops: T.
        layers_run: the effective depth.
        effective_parameters: of a stack of that depth without sharing.
        flops_per_token, training_flops_per_token: at the context's length.
        kv_bytes_per_token: of the first token of a context, in the model's dtype; 0 for an encoder.
        kv_bytes: of the whole context.
        inference_bytes: estimate for reading the context: weights, keys and values, intermediate results.
    """

    num_loops: int
    layers_run: int
    effective_parameters: int
    flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int
    kv_bytes: int
    inference_bytes: int


def costs(model: PreTrainedModel, num_loops: int, *, sequence_length: int) -> Costs:
    """The costs of `num_loops` loops at a context of `sequence_length` tokens; the model may be on the meta device."""
    config = looped_config(model)
    flops = token_flops(model, num_loops=num_loops, sequence_length=sequence_length)
    lengths = (1, sequence_length)
    first, whole = (
        kv_cache_bytes(config, length, num_loops=num_loops, dtype=model.dtype) if config.is_causal else 0
        for length in lengths
    )
    return Costs(
        num_loops,
        layout_of(config, num_loops).num_invocations,
        parameter_counts(model, num_loops).effective,
        flops.forward,
        flops.training,
        first,
        whole,
        inference_memory(model, sequence_length=sequence_length, num_loops=num_loops).total,
    )


def costs_table(rows: Iterable[Costs]) -> str:
    """The costs as a Markdown table."""
    header = (
        "loops",
        "layers run",
        "effective parameters, M",
        "GFLOPs per token",
        "training GFLOPs per token",
        "KV bytes per token",
        "KV MiB of the context",
        "inference MiB (estimate)",
    )
    lines = [
        (
            row.num_loops,
            row.layers_run,
            f"{row.effective_parameters / 1e6:.1f}",
            f"{row.flops_per_token / 1e9:.3g}",
            f"{row.training_flops_per_token / 1e9:.3g}",
            f"{row.kv_bytes_per_token:,}",
            f"{row.kv_bytes / 2**20:.1f}",
            f"{row.inference_bytes / 2**20:.0f}",
        )
        for row in rows
    ]
    return markdown_table(header, lines)


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


__all__ = ["Costs", "costs", "costs_table", "markdown_table"]
