"""Routing: halting rules that decide before a loop which tokens take part in it (Mixture-of-Recursions).

B batch, S tokens, D hidden size, T loops. A token that does not take part keeps its state, and no other token attends
to it in that loop (arXiv 2507.10524). Here every loop still computes every token and throws away what is not wanted,
so that slots never have holes; a token that sits out writes a key of zeros to its slot, which later steps recognise
and never attend to.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .halting import HALTINGS, Halting, Readings, Route, Step, spread
from .registry import SelfInitialised, check_table_loops, table_row


class Router(Halting):
    """Abstract rule that routes tokens."""

    routes = True

    def reads_last_state(self, num_loops: int) -> bool:
        return False

    @abstractmethod
    def route(self, readings: Readings, state: Tensor, loop_idx: int, valid: Tensor) -> Route:
        """Who takes part in loop `loop_idx`; among the `valid` tokens [B, S], which are not padding."""

    @abstractmethod
    def merge(self, route: Route, previous: Tensor, output: Tensor) -> Tensor:
        """The state after a loop that took the state `previous` to `output`, both [B, S, D]."""


class RouterScores(SelfInitialised):
    """The scores of a router, W s: [B, S, D] -> [B, S, rows]. A module, since what moves weights hooks into calls.

    Args:
        rows: scores per token.
        hidden_size: D.
        std: standard deviation of the weights at initialisation.
    """

    def __init__(self, rows: int, hidden_size: int, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))

    def init_weights(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.std)

    def forward(self, state: Tensor, row: int | None = None) -> Tensor:
        """All scores, or those of `row` alone."""
        weight = self.weight if row is None else self.weight[row : row + 1]
        return F.linear(state, weight.to(state.dtype))


@HALTINGS.register("expert_choice")
@final
class ExpertChoice(Router):
    r"""Each loop chooses its tokens: those with the highest weights among the tokens that took part in the last one.

    g = \alpha sigmoid(w_t \cdot s) is a token's weight in loop t; who is chosen gets s <- s + g core(s). The number
    chosen is the loop's capacity times the sequence's length (padding left out), at least 1. `selection="top_k"`
    is how these models train; it looks at the whole sequence, so it is not causal, and a cache cannot be used with it.
    `selection="threshold"` chooses a token if its sigmoid reaches 1/2, which the auxiliary loss of the paper trains
    the router to predict, and is causal.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        capacity: share of the tokens in (0, 1] that each loop chooses; later loops use the last.
        alpha: scale of the weights.
        selection: `top_k` or `threshold`.
        table_loops: loops with a router of their own (`None`: the config's `num_loops`).
        """

        capacity: tuple[float, ...] = (1.0,)
        alpha: float = 0.1
        selection: str = "top_k"
        table_loops: int | None = None

        def __post_init__(self):
            if not self.capacity or not all(0.0 < share <= 1.0 for share in self.capacity):
                raise ValueError(f"capacity={list(self.capacity)} must be shares in (0, 1], at least one.")
            if not 0.0 < self.alpha < math.inf:
                raise ValueError(f"alpha={self.alpha!r} must be a positive number.")
            if self.selection not in ("top_k", "threshold"):
                raise ValueError(f"selection={self.selection!r} must be one of: top_k, threshold.")
            check_table_loops(self.table_loops)

    def __init__(self, params, context):
        super().__init__(params, context)
        self.router = RouterScores(params.table_loops, context.hidden_size, context.initializer_range)

    @property
    def reads_whole_sequence(self) -> bool:
        return self.params.selection == "top_k"

    def start(self, state: Tensor) -> Readings:
        return super().start(state)._replace(output=state)

    def route(self, readings: Readings, state: Tensor, loop_idx: int, valid: Tensor) -> Route:
        row = table_row(loop_idx, self.params.table_loops)
        gate = torch.sigmoid(self.router(state, row).squeeze(-1))
        # Who took part in every loop so far has a full count; the first loop draws from all.
        survivors = valid & (readings.exit_loops == loop_idx).to(valid.device)
        if self.params.selection == "threshold":
            chosen = survivors & (gate >= 0.5)
        else:
            share = self.params.capacity[table_row(loop_idx, len(self.params.capacity))]
            places = (valid.sum(dim=-1, keepdim=True) * share).long().clamp(min=1)
            order = torch.where(survivors, gate, -1.0).argsort(dim=-1, descending=True, stable=True)
            chosen = survivors & (order.argsort(dim=-1) < places)
        return Route(chosen, self.params.alpha * gate)

    def merge(self, route: Route, previous: Tensor, output: Tensor) -> Tensor:
        return torch.where(route.active.unsqueeze(-1), previous + spread(route.weight, output), previous)

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        # Unlike the other rules, `exit_loops` counts the loops that a token took, which may be none.
        return readings._replace(output=step.state, exit_loops=readings.exit_loops + step.active.long())


@HALTINGS.register("token_choice")
@final
class TokenChoice(Router):
    r"""Each token chooses its number of loops at the start: the one to which the router gives the highest probability.

    p = \alpha softmax(W s_0) over the depths 1 .. T; the chosen depth n is the argmax of p (of p + b with a loss-free
    balancing bias b, which is not trained by gradients), and the token reads s_0 + p_n s_n. Causal: a token's choice
    depends on that token alone. With fewer loops than depths, the last loop ends them all.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        alpha: scale of the weights.
        score: `softmax` over the depths, or `sigmoid` of each.
        balancing_bias: `none`, or `loss_free`: a bias on the choice, kept in the checkpoint.
        table_loops: depths to choose from (`None`: the config's `num_loops`).
        """

        alpha: float = 1.0
        score: str = "softmax"
        balancing_bias: str = "none"
        table_loops: int | None = None

        def __post_init__(self):
            if not 0.0 < self.alpha < math.inf:
                raise ValueError(f"alpha={self.alpha!r} must be a positive number.")
            if self.score not in ("softmax", "sigmoid"):
                raise ValueError(f"score={self.score!r} must be one of: softmax, sigmoid.")
            if self.balancing_bias not in ("none", "loss_free"):
                raise ValueError(f"balancing_bias={self.balancing_bias!r} must be one of: none, loss_free.")
            check_table_loops(self.table_loops)

    def __init__(self, params, context):
        super().__init__(params, context)
        self.router = RouterScores(params.table_loops, context.hidden_size, context.initializer_range)
        # a buffer: a parameter that is not trained would be after loading
        balances = params.balancing_bias == "loss_free"
        self.balancing_bias = nn.Buffer(torch.empty(params.table_loops)) if balances else None

    def init_weights(self) -> None:
        if self.balancing_bias is not None:
            init.zeros_(self.balancing_bias)

    def start(self, state: Tensor) -> Readings:
        scores = self.router(state)
        scores = scores.softmax(dim=-1) if self.params.score == "softmax" else scores.sigmoid()
        scores = self.params.alpha * scores
        ranked = scores if self.balancing_bias is None else scores + self.balancing_bias.to(scores)
        depth = ranked.argmax(dim=-1)
        weight = scores.gather(-1, depth.unsqueeze(-1)).squeeze(-1)
        return Readings(state, weight, depth + 1)

    def route(self, readings: Readings, state: Tensor, loop_idx: int, valid: Tensor) -> Route:
        return Route(valid & (readings.exit_loops > loop_idx).to(valid.device), readings.remaining)

    def merge(self, route: Route, previous: Tensor, output: Tensor) -> Tensor:
        return torch.where(route.active.unsqueeze(-1), output, previous)

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        ends = readings.exit_loops > loop_idx if is_last else readings.exit_loops == loop_idx + 1
        weight = torch.where(ends, readings.remaining, torch.zeros_like(readings.remaining))
        exit_loops = readings.exit_loops.clamp(max=loop_idx + 1) if is_last else readings.exit_loops
        return readings._replace(output=readings.output + spread(weight, step.state), exit_loops=exit_loops)


__all__ = ["ExpertChoice", "Router", "TokenChoice"]
