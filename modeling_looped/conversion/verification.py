"""Verification: is the converted model the teacher at one loop, and what does it lose at more?

B batch, S tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

#: Largest difference of two logits that counts as equal. In SmolLM2-135M, whose logits reach 40, the order of fp32
#: operations makes one of 6e-5, one element of one norm that is 1 % off makes 2e-3, and the keys of one layer in
#: another rotary layout make 6.5.
TOLERANCE = 1e-3

#: General English (fiction, explanations, a letter, a recipe), written for this project and under its licence, so no
#: teacher has seen it.
HELD_OUT_TEXT = Path(__file__).with_name("held_out_text.md")


class ConversionError(RuntimeError):
    """A converted model is not the function that it should be."""


class Comparison(NamedTuple):
    """A teacher and a looped model on the same tokens.

    Attributes:
        max_difference: largest absolute difference of two logits.
        max_logit: largest absolute logit of the teacher, the scale to read it against.
        hidden_states: largest absolute difference of the input of each layer in turn, and of the last one's output.
        tokens: number of tokens compared.
        teacher_loss, loss: of the two models, in nats per predicted token.
    """

    max_difference: float
    max_logit: float
    hidden_states: list[float]
    tokens: int
    teacher_loss: float
    loss: float

    @property
    def diverges_at(self) -> int:
        """The layer in which the difference grows most: where to look first."""
        growth = [after - before for before, after in zip(self.hidden_states, self.hidden_states[1:], strict=False)]
        return max(range(len(growth)), key=growth.__getitem__)


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, *, length: int = 512) -> list[Tensor]:
    """The tokens of `text` in windows [1, S] of about equal size, at most `length` each.

    Raises:
        ValueError: if the text has fewer than two tokens.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids
    if tokens.shape[1] < 2:
        raise ValueError(f"the text has {tokens.shape[1]} tokens; a loss needs at least 2.")
    return list(tokens.chunk(math.ceil(tokens.shape[1] / length), dim=1))


@torch.no_grad()
def compare_at_one_loop(teacher: PreTrainedModel, looped: PreTrainedModel, windows: Sequence[Tensor]) -> Comparison:
    """How far `looped` is from `teacher` at `num_loops=1`.

    Give it models in float32 (`in_full_precision`): in bfloat16 the order of operations alone moves a logit by more
    than a wrong weight would.
    """
    differences, scales, hidden_states = [], [], []
    teacher_loss = loss = 0.0
    for window in windows:
        tokens = window.to(teacher.device)
        theirs = teacher(tokens, output_hidden_states=True, use_cache=False)
        ours = looped(tokens, num_loops=1, output_hidden_states=True, use_cache=False)
        differences.append(max_difference(theirs.logits, ours.logits))
        scales.append(theirs.logits.abs().max().item())
        hidden_states.append(list(map(max_difference, theirs.hidden_states, ours.hidden_states)))
        teacher_loss += total_loss(theirs.logits, window)
        loss += total_loss(ours.logits, window)
    predicted = sum(window.numel() - 1 for window in windows)
    return Comparison(
        max_difference=max(differences),
        max_logit=max(scales),
        hidden_states=[max(states) for states in zip(*hidden_states, strict=True)],
        tokens=sum(window.numel() for window in windows),
        teacher_loss=teacher_loss / predicted,
        loss=loss / predicted,
    )


def refuse_difference(comparison: Comparison, tolerance: float) -> None:
    """Raise ConversionError if two models differ by more than `tolerance`; says where the difference begins."""
    if comparison.max_difference <= tolerance:
        return
    rows = [f"   {layer:>5} {difference:.2e}" for layer, difference in enumerate(comparison.hidden_states)]
    raise ConversionError(
        f"at num_loops=1 a logit differs from the teacher's by {comparison.max_difference:.2e}, more than the "
        f"tolerance of {tolerance:.0e}; nothing was written. The difference grows most in layer "
        f"{comparison.diverges_at}. Largest difference of the hidden states before each layer, and after the last:\n"
        + "\n".join(rows)
    )


def loss_by_loops(model: PreTrainedModel, windows: Sequence[Tensor], loops: Iterable[int]) -> dict[int, float]:
    """Loss in nats per predicted token over `windows` [1, S], at each loop count."""
    return {num_loops: mean_loss(model, windows, num_loops=num_loops) for num_loops in loops}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Sequence[Tensor], **inputs: Any) -> float:
    """Loss in nats per predicted token over `windows` [1, S], of any causal model; `inputs` go to its forward."""
    logits = (model(window.to(model.device), use_cache=False, **inputs).logits for window in windows)
    return sum(map(total_loss, logits, windows)) / sum(window.numel() - 1 for window in windows)


def total_loss(logits: Tensor, window: Tensor) -> float:
    """Summed loss in nats of `logits` [1, S, vocabulary] on the tokens [1, S], each predicted from those before it."""
    targets = window[0, 1:].to(logits.device)
    return F.cross_entropy(logits[0, :-1].float(), targets, reduction="sum").item()


def in_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a float32 copy of one with fewer bits."""
    return model if torch.finfo(model.dtype).bits >= 32 else copy.deepcopy(model).float()


def max_difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference; infinite where either is not a number."""
    difference = (first - second).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


__all__ = [
    "HELD_OUT_TEXT",
    "TOLERANCE",
    "Comparison",
    "ConversionError",
    "compare_at_one_loop",
    "in_full_precision",
    "loss_by_loops",
    "mean_loss",
    "refuse_difference",
    "text_windows",
]
