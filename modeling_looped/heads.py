"""What heads are made of: logits, the transform before masked-language-model logits, and pooling.

B batch, S tokens, D hidden size, E embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .activations import build_activation
from .configuration_looped import LoopedConfig
from .loop_loss import LoopLoss, LoopReadings, cross_entropies, refuse_trainable_beside_gate
from .norms import build_norm
from .outputs import LoopedModelOutput

logger = logging.get_logger(__name__)


class LoopedHeadMixin:
    """What the language-model heads share: hidden states to logits, and the loss over several loops."""

    config: LoopedConfig
    lm_head: nn.Linear
    model: Any
    training: bool

    def to_logits(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, vocabulary], scaled and soft-capped as the config says."""
        logits = self.lm_head(hidden_states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def asks_for_loops(self, labels: Tensor | None) -> dict[str, bool]:
        """Arguments for the base model in a call with these labels: whether the loss will read several loops."""
        reads = labels is not None and self.training and self.config.loop_loss["type"] != "output"
        return {"output_loop_readings": True} if reads else {}

    def loss_of_loops(
        self,
        outputs: LoopedModelOutput,
        labels: Tensor,
        to_logits: Callable[[Tensor], Tensor],
        *,
        shifts: bool,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss that `config.loop_loss` names, scaled as Transformers scales its own.

        Args:
            outputs: of the base model, with `loop_readings`.
            labels: [B, S].
            to_logits: the head, [B, S, D] -> [B, S, vocabulary].
            shifts: whether a label is the target of the place before it.
            num_items_in_batch: what the sum over tokens is divided by, the tokens of a whole step where gradients are
                accumulated; `None`: the batch's tokens that count.
            ignore_index: label of places that do not count.
            shift_labels: targets [B, S] that have been shifted already.
            kwargs: not read.
        """
        rule: LoopLoss = self.model.loop_loss
        loops: Any = outputs.loop_readings
        if rule.trains_gate_alone and not torch.compiler.is_compiling():
            refuse_trainable_beside_gate(self)  # pyright: ignore[reportArgumentType] (mixed into a model)
        targets = labels if shift_labels is None or not shifts else shift_labels
        if shifts and shift_labels is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        chunk: int = rule.params.chunk_tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and not rule.trains_gate_alone):
            losses = [cross_entropies(x, targets, to_logits, chunk, ignore_index) for x in loops.hidden_states]
        readings = LoopReadings(
            torch.stack(losses, dim=-1),
            loops.loops,
            loops.depth,
            loops.num_loops,
            outputs.exit_probabilities,
            loops.exit_logits,
        )
        counts = targets.ne(ignore_index)
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        total = torch.where(counts.to(losses[0].device), rule(readings), 0.0).sum()
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)


class MaskedLMTransform(nn.Module):
    """What ALBERT and BERT do before the output embeddings: norm(act(W h + b)), from width D to the embeddings' E."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.act_fn = build_activation(config.hidden_act)
        self.norm = build_norm(config.norm_type, width, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, E]."""
        return self.norm(self.act_fn(self.dense(hidden_states)))


class FirstTokenPooler(nn.Module):
    """tanh(W h_1 + b) of the first token that is not padding (ALBERT, BERT)."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, hidden_states: Tensor, valid: Tensor) -> Tensor:
        """[B, S, D] and the tokens that are not padding, bool [B, S] -> [B, D]."""
        first = valid.int().argmax(dim=-1)
        rows = torch.arange(len(first), device=hidden_states.device)
        return self.dropout(torch.tanh(self.dense(hidden_states[rows, first.to(rows.device)])))


def last_token_logits(logits: Tensor, input_ids: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Scores [B, S, labels] -> [B, labels], those of the last token that is not padding, as in every decoder of
    Transformers, whose generic head returns nothing of the base model's output beside the hidden states.

    Raises:
        ValueError: for several rows and no token that would be padding.
    """
    batch = logits.shape[0]
    if pad_token_id is None and batch != 1:
        raise ValueError(
            f"pad_token_id=None with a batch of {batch}: where each row ends is told by its padding; set "
            "config.pad_token_id, or pass one row."
        )
    if pad_token_id is None or input_ids is None:
        if pad_token_id is not None and not torch.compiler.is_compiling():
            logger.warning_once(
                "inputs_embeds do not show which tokens are padding: each row is classified by its last place."
            )
        return logits[:, -1]
    places = torch.arange(input_ids.shape[1], device=logits.device, dtype=torch.int32)
    last = (places * (input_ids != pad_token_id).to(logits.device, torch.int32)).argmax(dim=-1)
    return logits[torch.arange(batch, device=logits.device), last]


__all__ = ["FirstTokenPooler", "LoopedHeadMixin", "MaskedLMTransform", "last_token_logits"]
