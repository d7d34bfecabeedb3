"""Input embeddings beyond the token table: positions, token types, a norm, and a projection to the model's width.

B batch, S tokens, E embedding size, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_looped import LoopedConfig
from .norms import build_norm

logger = logging.get_logger(__name__)


class LoopedEmbeddingMixin:
    """The parts of a model that turn token embeddings [B, S, E] into the first hidden states [B, S, D].

    They sit on the model itself, beside `embed_tokens`, under the names that the ecosystem looks for.
    """

    config: LoopedConfig

    def build_embeddings(self, config: LoopedConfig) -> None:
        """Make the modules that the config asks for; the others are `None`."""
        size = config.hidden_size if config.embedding_size is None else config.embedding_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        learned, types = config.position_embedding == "learned", config.type_vocab_size
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size) if learned else None
        self.token_type_embeddings = nn.Embedding(types, size) if types else None
        self.embedding_norm = (
            build_norm(config.norm_type, size, config.rms_norm_eps) if config.embedding_norm else None
        )
        self.embedding_projection = (
            nn.Linear(size, config.hidden_size, bias=config.embedding_projection_bias)
            if config.embedding_size is not None
            else None
        )

    def embed(self, embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token embeddings [B, S, E] at `position_ids` [B or 1, S] -> the prelude's input [B, S, D].

        Raises:
            ValueError: for a position beyond the learned ones.
        """
        if self.config.embedding_scale != 1.0:
            embeds = embeds * self.config.embedding_scale
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            embeds = embeds + self.token_type_embeddings(types).to(embeds.device)
        elif token_type_ids is not None and not self.config.prefix_lm and not torch.compiler.is_compiling():
            logger.warning_once("token_type_ids are ignored: the model has no such embeddings (type_vocab_size=0).")
        if self.position_embeddings is not None:
            rows = self.config.max_position_embeddings
            if not torch.compiler.is_compiling() and not position_ids.is_meta and int(position_ids.max()) >= rows:
                raise ValueError(
                    f"position {int(position_ids.max())} (counted from 0) lies beyond max_position_embeddings={rows}, "
                    "and position_embedding='learned' has no more rows."
                )
            embeds = embeds + self.position_embeddings(position_ids).to(embeds.device)
        if self.embedding_norm is not None:
            embeds = self.embedding_norm(embeds)
        return embeds if self.embedding_projection is None else self.embedding_projection(embeds)


__all__ = ["LoopedEmbeddingMixin"]
