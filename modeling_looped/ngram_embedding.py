"""N-gram embeddings: what the token embeddings know of the tokens right before.

B batch, S tokens, D hidden size, N longest n-gram, K hash tables. A table has a row for every value of a hash of the
last n tokens, so that common phrases have embeddings of their own; which rows collide is chance.

The hash needs the N - 1 tokens before a call's own. `generate` knows them (`previous_input_ids`); a caller who steps
by hand need not pass them, because they are noted on the cache, with the keys that the cache held then: a cache that
has been reordered, cropped, repeated or copied since no longer holds these, and is refused rather than believed.
"""

from __future__ import annotations

import dataclasses
import weakref
from abc import abstractmethod
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .registry import Registry, Strategy

NGRAM_EMBEDDINGS: Registry[NgramEmbedding] = Registry("ngram_embedding")


class NgramEmbedding(Strategy):
    """Abstract n-gram embedding."""

    #: N - 1: tokens before a call's own that it needs to know.
    context_length = 0

    @abstractmethod
    def forward(self, embeds: Tensor, input_ids: Tensor | None, previous: Tensor | None, positions: Tensor) -> Tensor:
        """Token embeddings [B, S, D] with what the n-grams add.

        Args:
            embeds: token embeddings [B, S, D].
            input_ids: the tokens [B, S].
            previous: tokens before them [B, P]; `None`: there are none.
            positions: of the tokens in their sequence, [B or 1, S]: a token at position p has p tokens before it, and
                what stands before those is padding, or another sequence.
        """


@NGRAM_EMBEDDINGS.register("none")
@final
class NoNgramEmbedding(NgramEmbedding):
    """A token's embedding is its own."""

    def forward(self, embeds: Tensor, input_ids: Tensor | None, previous: Tensor | None, positions: Tensor) -> Tensor:
        return embeds


@NGRAM_EMBEDDINGS.register("hashed")
@final
class HashedNgramEmbedding(NgramEmbedding):
    r"""x <- (x + \sum_i P_i T_i[h_i]) / (1 + K), or x + P [T_1[h_1]; ...; T_K[h_K]] for `concat` (Nanbeige4.2's code).

    Table i of size m_i serves n-grams of n_i tokens, the first K / (N - 1) tables those of 2, the next those of 3, and
    so on. With b = `hash_base`, h_i = (\sum_{j=0}^{n_i-1} (b^j mod m_i) t_{-j}) mod m_i, where t_{-j} is the id of the
    token j places before, and 0 where the sequence has none or a boundary token lies in between.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        max_n: N, at least 2.
        table_sizes: m_i, in the order above; their number is a multiple of N - 1.
        row_multiple: rows of a table are filled up to a multiple of this.
        width: channels of all tables together; `None`: hidden_size. Each has its share, rounded down.
        hash_base: b.
        boundary_token_id: token that ends a sequence within a row; what follows it does not see it. `None`: none does.
        fusion: `average` or `concat`.
        """

        max_n: int = 3
        table_sizes: tuple[int, ...] = (10007, 10009)
        row_multiple: int = 1
        width: int | None = None
        hash_base: int = 32003
        boundary_token_id: int | None = None
        fusion: str = "average"

        def __post_init__(self):
            if self.max_n < 2:
                raise ValueError(f"max_n={self.max_n!r} must be at least 2.")
            tables = len(self.table_sizes)
            if not tables or tables % (self.max_n - 1) or min(self.table_sizes) < 1:
                raise ValueError(
                    f"table_sizes={list(self.table_sizes)} must be positive, and as many as a multiple of "
                    f"max_n - 1 = {self.max_n - 1}."
                )
            for name in ("row_multiple", "hash_base"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1.")
            if self.width is not None and self.width < tables:
                raise ValueError(f"width={self.width!r} must be None or at least the number of tables, {tables}.")
            if self.fusion not in ("average", "concat"):
                raise ValueError(f"fusion={self.fusion!r} must be one of: average, concat.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.context_length = params.max_n - 1
        tables, hidden, multiple = len(params.table_sizes), context.prelude_size, params.row_multiple
        share = (params.width or hidden) // tables
        self.tables = nn.ModuleList(
            nn.Embedding(-(-size // multiple) * multiple, share) for size in params.table_sizes
        )
        averages = params.fusion == "average"
        inputs = [share] * tables if averages else [share * tables]
        self.projections = nn.ModuleList(nn.Linear(size, hidden, bias=False) for size in inputs)

    def forward(self, embeds: Tensor, input_ids: Tensor | None, previous: Tensor | None, positions: Tensor) -> Tensor:
        if input_ids is None:
            raise ValueError(
                "ngram_embedding='hashed' reads the token ids: pass input_ids (inputs_embeds alone do not say which "
                "tokens they are)."
            )
        rows = [
            table(ids).to(embeds.device)
            for table, ids in zip(self.tables, self.hashes(input_ids, previous, positions), strict=True)
        ]
        if self.params.fusion == "concat":
            return embeds + self.projections[0](torch.cat(rows, dim=-1))
        total = torch.stack([project(row) for project, row in zip(self.projections, rows, strict=True)]).sum(dim=0)
        return (embeds + total) / (1 + len(rows))

    def hashes(self, input_ids: Tensor, previous: Tensor | None, positions: Tensor) -> list[Tensor]:
        """Row of each table, [B, S] each; arguments as for `forward`."""
        length, reach = input_ids.shape[1], self.context_length
        before = input_ids.new_zeros(len(input_ids), 0) if previous is None else previous[:, -reach:].to(input_ids)
        # what is filled up is no token, and neither is what the caller filled up: a token's position says how many are
        known = F.pad(torch.cat((before, input_ids), dim=1), (reach - before.shape[1], 0))
        exists = torch.arange(known.shape[1], device=known.device) >= reach - before.shape[1]
        positions, unbroken = positions.to(known.device), torch.ones_like(input_ids, dtype=torch.bool)
        tokens = [input_ids]
        for distance in range(1, reach + 1):
            place = slice(reach - distance, reach - distance + length)
            token = known[:, place]
            unbroken = unbroken & exists[place] & (positions >= distance)
            if self.params.boundary_token_id is not None:
                unbroken = unbroken & (token != self.params.boundary_token_id)
            tokens.append(torch.where(unbroken, token, 0))
        rows, per_n = [], len(self.params.table_sizes) // reach
        for index, size in enumerate(self.params.table_sizes):
            terms = [pow(self.params.hash_base, j, size) * tokens[j] for j in range(index // per_n + 2)]
            terms[0] = tokens[0]  # b^0, also where the table has one row and that is 0
            rows.append(torch.stack(terms).sum(dim=0) % size)
        return rows


class TokenNote:
    """The last tokens that a cache has seen, and the keys that it held after them.

    Args:
        tokens: [B, P].
        cache: that has seen them.
    """

    def __init__(self, tokens: Tensor | None = None, cache: Cache | None = None):
        self.tokens = tokens
        self.keys = None if cache is None else weakref.ref(first_keys(cache))
        self.length = None if cache is None else int(cache.get_seq_length())

    def holds_for(self, cache: Cache) -> bool:
        """Whether `cache` is what the note was written on, unchanged."""
        if self.keys is None or self.length != int(cache.get_seq_length()):
            return False
        return self.keys() is first_keys(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenNote:
        return TokenNote()  # the copy's keys are others

    def __reduce__(self) -> tuple[type[TokenNote], tuple[()]]:
        return TokenNote, ()


def first_keys(cache: Cache) -> Any:
    """What the first layer of a cache holds."""
    return getattr(cache.layers[0], "keys", None) if cache.layers else None


def tokens_before(strategy: NgramEmbedding, given: Tensor | None, cache: Cache | None) -> Tensor | None:
    """The tokens before a call's own, [B, P]; `None`: there are none.

    Args:
        strategy: of the model.
        given: by the caller.
        cache: of the caller.

    Raises:
        ValueError: if there are some that nobody knows.
    """
    if strategy.context_length == 0 or given is not None or cache is None:
        return given
    if not torch.compiler.is_compiling():
        if cache.get_seq_length() == 0:
            return None
        note = getattr(cache, "looped_tokens", None)
        if note is not None and note.holds_for(cache):
            return note.tokens
    raise ValueError(
        f"ngram_embedding='hashed' hashes the {strategy.context_length} tokens before each token, and those that this "
        "cache has seen are not known (it was reordered, cropped or copied since, filled elsewhere, or the call is "
        "compiled): pass previous_input_ids, the ids [batch, tokens] of the last tokens before input_ids."
    )


def note_tokens(
    strategy: NgramEmbedding, input_ids: Tensor | None, before: Tensor | None, cache: Cache | None
) -> None:
    """Write on the cache what the next call will ask `tokens_before` for."""
    if strategy.context_length == 0 or cache is None or input_ids is None or torch.compiler.is_compiling():
        return
    seen = input_ids if before is None else torch.cat((before.to(input_ids), input_ids), dim=1)
    note = TokenNote(seen[:, -strategy.context_length :].clone(), cache)
    cache.looped_tokens = note  # pyright: ignore[reportAttributeAccessIssue] (our note on it)


__all__ = ["NGRAM_EMBEDDINGS", "NgramEmbedding", "note_tokens", "tokens_before"]
