"""What heads are made of: logits, the transform before masked-language-model logits, and pooling.

B batch, S tokens, D hidden size, E embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import build_activation
from .configuration_looped import LoopedConfig
from .norms import build_norm


class LoopedHeadMixin:
    """What the language-model heads share: hidden states to logits."""

    config: LoopedConfig
    lm_head: nn.Linear

    def to_logits(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, vocabulary], scaled and soft-capped as the config says."""
        logits = self.lm_head(hidden_states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


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


__all__ = ["FirstTokenPooler", "LoopedHeadMixin", "MaskedLMTransform"]
