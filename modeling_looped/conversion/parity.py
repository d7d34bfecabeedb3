"""Parity: does the converted model compute what the original did, on the original's own recorded outputs?

B batch, S tokens, D hidden size, T loops, V vocabulary (of a classifier, its labels).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.modeling_looped import (
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
)

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


def read_recording(file: Path) -> dict[str, Tensor]:
    """The tensors of a recording, for `compare_with_recording`.

    Raises:
        ValueError: if it is no safetensors file, or lacks what every recording has.
    """
    try:
        recording = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"recording={str(file)!r} is not a whole safetensors file: {error}.") from error
    require(recording, ("input_ids", "logits"))
    return recording


def check_recording(
    recording: Mapping[str, Tensor], model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> None:
    """Check that a model of this class and config can be compared with the recording, before there is one.

    Raises:
        ValueError: for tensors that are missing or of another shape, and token ids that have no embedding; names them.
    """
    if issubclass(model_class, LoopedForQuestionAnswering):
        raise ValueError(f"the recording holds logits, and a {model_class.__name__} has none to compare with them.")
    reader: Any = config.encoder if config.is_encoder_decoder else config
    writer: Any = config.decoder if config.is_encoder_decoder else config
    vocabularies = {"input_ids": reader.vocab_size}
    if config.is_encoder_decoder:
        vocabularies["decoder_input_ids"] = writer.vocab_size
    padded = [side for side in ("left", "right") if f"{side}.input_ids" in recording]
    vocabularies |= {f"{side}.input_ids": reader.vocab_size for side in padded}
    require(recording, list(vocabularies))
    for name, vocabulary in vocabularies.items():
        tokens = recording[name]
        numbers = tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point()
        if not numbers or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(
                f"the recording's {name}, {tokens.dtype} {list(tokens.shape)}, must be token ids [B, S] in "
                f"0..{vocabulary - 1}, the vocabulary of the config."
            )

    classifies = issubclass(model_class, LoopedForSequenceClassification | LoopedForTokenClassification)
    width = writer.num_labels if classifies else writer.vocab_size
    read = recording["input_ids"].shape
    written = recording["decoder_input_ids"].shape if config.is_encoder_decoder else read
    pools = issubclass(model_class, LoopedForSequenceClassification)
    shapes = {"logits": (written[0], width) if pools else (*written, width)}
    for side in padded:
        shape = recording[f"{side}.input_ids"].shape
        shapes |= {f"{side}.attention_mask": shape, f"{side}.logits": (*shape, width)}
    if "prefix.logits" in recording:
        shapes |= {"prefix.token_type_ids": read, "prefix.logits": (*read, width)}
    require(recording, list(shapes))
    for name, shape in shapes.items():
        refuse_shape(name, recording[name], shape)


def require(recording: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if the recording lacks one of these tensors; names those it has."""
    missing = [name for name in names if name not in recording]
    if missing:
        raise ValueError(f"the recording lacks {', '.join(missing)}; it holds {', '.join(recording) or 'nothing'}.")


def refuse_shape(name: str, recorded: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for a recorded tensor of another shape than the model's."""
    if tuple(recorded.shape) != tuple(shape):
        raise ValueError(f"the recording's {name} is {list(recorded.shape)}, and the model makes it {list(shape)}.")


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
        # else a recording of one loop would be compared with each of ours
        refuse_shape("loop_states", recording["loop_states"], ours.shape)
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


__all__ = [
    "PARITY_TOLERANCE",
    "Parity",
    "check_recording",
    "compare_with_recording",
    "read_recording",
    "refuse_disparity",
]
