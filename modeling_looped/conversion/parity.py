"""Parity: does the converted model compute what the original did, on the original's own recorded outputs?

B batch, S tokens, D hidden size, T loops.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .verification import ConversionError, max_difference

#: Largest difference of two fp32 logits, of models of any family, that counts as equal.
PARITY_TOLERANCE = 1e-4


class Parity(NamedTuple):
    """Largest absolute differences of fp32 logits or states.

    Attributes:
        original: recorded output -> difference from ours.
        padding: side of the padding -> difference between a padded row's logits and those of the row alone, both ours.
        original_padding: side of the padding -> difference between the original's padded logits and ours; large where
            the original ignores the attention mask.
    """

    original: dict[str, float]
    padding: dict[str, float]
    original_padding: dict[str, float]


@torch.no_grad()
def compare_with_recording(model: PreTrainedModel, recording: Mapping[str, Tensor]) -> Parity:
    """Run `model` (float32) on what the original was run on.

    Args:
        model: the converted model.
        recording: `input_ids` [B, S] and `logits` [B, S, V] of the original; where it has them `initial_state`
            [B, S, D], `loop_states` [T, B, S, D], and `left` and `right` padded cases (`left.input_ids`,
            `left.attention_mask`, `left.logits`), and a case with a bidirectional prefix (`prefix.token_type_ids`,
            `prefix.logits`). For an encoder and a decoder, `decoder_input_ids` [B, S'] too, and `logits` [B, S', V].
    """
    tokens, start = recording["input_ids"], recording.get("initial_state")
    states = "loop_states" in recording
    more: dict[str, Any] = {"output_loop_hidden_states": True} if states else {}
    if "decoder_input_ids" in recording:
        more["decoder_input_ids"] = recording["decoder_input_ids"]
    output = run(model, tokens, start, **more)
    original = {"logits": max_difference(output.logits, recording["logits"])}
    if states:
        ours = torch.stack(output.loop_hidden_states[1:])
        original["loop_states"] = max_difference(ours, recording["loop_states"])
    if "prefix.logits" in recording:
        prefixed = run(model, tokens, start, token_type_ids=recording["prefix.token_type_ids"])
        original["prefix"] = max_difference(prefixed.logits, recording["prefix.logits"])
    padding, original_padding = {}, {}
    for side in ("left", "right"):
        if f"{side}.input_ids" in recording:
            tokens, mask = recording[f"{side}.input_ids"], recording[f"{side}.attention_mask"].bool()
            logits = run(model, tokens, start, attention_mask=mask.long()).logits
            alone = [
                run_row(model, row, valid, start, index)
                for index, (row, valid) in enumerate(zip(tokens, mask, strict=True))
            ]
            padding[side] = max_difference(logits[mask], torch.cat(alone))
            original_padding[side] = max_difference(logits[mask], recording[f"{side}.logits"][mask])
    return Parity(original, padding, original_padding)


def run(model: PreTrainedModel, tokens: Tensor, initial_state: Tensor | None, **kwargs: Any) -> Any:
    """The model's output, from the given state before the first loop if there is one."""
    if initial_state is not None:
        kwargs["initial_state"] = initial_state
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    return model(tokens, **kwargs)


def run_row(model: PreTrainedModel, row: Tensor, valid: Tensor, initial_state: Tensor | None, index: int) -> Tensor:
    """Logits [n, V] of the n valid tokens of one row [S] alone, from their part of the initial state [B, S, D]."""
    start = None if initial_state is None else initial_state[index : index + 1, valid]
    return run(model, row[valid].unsqueeze(0), start).logits[0]


def refuse_disparity(parity: Parity, tolerance: float) -> None:
    """Raise ConversionError if anything differs by more than `tolerance`; names what, with all the figures."""
    figures = parity.original | {f"{side} padding": value for side, value in parity.padding.items()}
    if all(value <= tolerance for value in figures.values()):
        return
    listed = ", ".join(f"{name} {value:.2e}" for name, value in figures.items())
    raise ConversionError(
        f"the converted model is not what the original was: largest differences {listed}, and the tolerance is "
        f"{tolerance:.0e}; nothing was written."
    )


__all__ = ["PARITY_TOLERANCE", "Parity", "compare_with_recording", "refuse_disparity"]
