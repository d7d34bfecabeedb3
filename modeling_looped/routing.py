"""Routing: halting rules that decide before a loop which tokens take part in it (Mixture-of-Recursions).

B batch, S tokens, D hidden size, T loops. A token that does not take part keeps its state, and no other token attends
to it in that loop (arXiv 2507.10524). Here every loop still computes every token and throws away what is not wanted,
so that slots never have holes; a token that sits out writes a key of zeros to its slot, which later steps recognise
and never attend to. Where loops share keys and values (`config.kv_sharing`), those are the first loop's, of every
token, and nothing is hidden.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Any, final

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
    """The scores of a router, W s, or W gelu(V s): [B, S, D] -> [B, S, rows]. A module, since what moves weights hooks
    into calls.

    Args:
        rows: scores per token.
        hidden_size: D.
        std: standard deviation of the weights at initialisation.
        width: rows of V; `None`: there is no V.
        separate: whether every row of W has a V of its own.
    """

    def __init__(self, rows: int, hidden_size: int, std: float, width: int | None = None, *, separate: bool = False):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, hidden_size if width is None else width))
        first = None if width is None else torch.empty(rows if separate else 1, width, hidden_size)
        self.first_weight = None if first is None else nn.Parameter(first)

    def init_weights(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.std)
        if self.first_weight is not None:
            init.normal_(self.first_weight, mean=0.0, std=self.std)

    def forward(self, state: Tensor, row: int | None = None) -> Tensor:
        """All scores, or those of `row` alone."""
        weight = self.weight if row is None else self.weight[row : row + 1]
        if self.first_weight is not None:
            first = self.first_weight[0 if row is None else row]
            state = F.gelu(F.linear(state, first.to(state.dtype)))
        return F.linear(state, weight.to(state.dtype))


def check_router(params: Any, scores: tuple[str, ...]) -> None:
    """Shared check of what both routers have."""
    if not 0.0 < params.alpha < math.inf:
        raise ValueError(f"alpha={params.alpha!r} must be a positive number.")
    if not 0.0 < params.temperature < math.inf:
        raise ValueError(f"temperature={params.temperature!r} must be a positive number.")
    for name, allowed in (("score", scores), ("gating", ("weighted", "additive"))):
        if getattr(params, name) not in allowed:
            raise ValueError(f"{name}={getattr(params, name)!r} must be one of: {', '.join(allowed)}.")
    if params.router_width is not None and params.router_width < 1:
        raise ValueError(f"router_width={params.router_width!r} must be None (a linear router) or at least 1.")
    check_table_loops(params.table_loops)


def worth(scores: Tensor, gating: str) -> Tensor:
    """What the results of tokens with these scores are worth: the scores, or with additive gating one each. Then no
    gradient reaches the router through the output; it gets zeros, as DDP and the Trainer expect.
    """
    return scores if gating == "weighted" else scores * 0.0 + 1.0


@HALTINGS.register("expert_choice")
@final
class ExpertChoice(Router):
    r"""Each loop chooses its tokens: those with the highest weights among the tokens that took part in the last one.

    g = \alpha sigmoid(w_t \cdot s) is a token's weight in loop t; who is chosen gets s <- s + g core(s). The number
    chosen is the loop's capacity times the sequence's length (padding left out), at least 1. `selection="top_k"`
    is how these models train; it looks at the whole sequence, so it is not causal, and a cache cannot be used with it.
    `selection="threshold"` chooses a token if w_t \cdot s is not negative, that is, if its sigmoid reaches 1/2, which
    the auxiliary loss of the paper trains the router to predict, and is causal.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        capacity: share of the tokens in (0, 1] that each loop chooses; later loops use the last.
        alpha: scale of the weights.
        selection: `top_k` or `threshold`.
        table_loops: loops with a router of their own (`None`: the config's `num_loops`).
        score: `sigmoid`, `tanh`, or `none`: the weight is w_t s itself, without alpha.
        gating: `weighted`, or `additive`: the result of a chosen token is added as it is.
        router_width: width of a router with one hidden layer, w_t gelu(V_t s); `None`: a linear one.
        temperature: what the state is divided by before the router reads it.
        """

        capacity: tuple[float, ...] = (1.0,)
        alpha: float = 0.1
        selection: str = "top_k"
        table_loops: int | None = None
        score: str = "sigmoid"
        gating: str = "weighted"
        router_width: int | None = None
        temperature: float = 1.0

        def __post_init__(self):
            if not self.capacity or not all(0.0 < share <= 1.0 for share in self.capacity):
                raise ValueError(f"capacity={list(self.capacity)} must be shares in (0, 1], at least one.")
            if self.selection not in ("top_k", "threshold"):
                raise ValueError(f"selection={self.selection!r} must be one of: top_k, threshold.")
            check_router(self, ("sigmoid", "tanh", "none"))

    def __init__(self, params, context):
        super().__init__(params, context)
        shape = (params.table_loops, context.hidden_size, context.initializer_range, params.router_width)
        self.router = RouterScores(*shape, separate=True)

    @property
    def reads_whole_sequence(self) -> bool:
        return self.params.selection == "top_k"

    def start(self, state: Tensor) -> Readings:
        return super().start(state)._replace(output=state)

    def route(self, readings: Readings, state: Tensor, loop_idx: int, valid: Tensor) -> Route:
        row = table_row(loop_idx, self.params.table_loops)
        logits = self.router(state / self.params.temperature, row).squeeze(-1)
        match self.params.score:
            case "sigmoid":
                gate, scale = torch.sigmoid(logits), self.params.alpha
            case "tanh":
                gate, scale = torch.tanh(logits), self.params.alpha
            case _:
                gate, scale = logits, 1.0
        # Who took part in every loop so far has a full count; the first loop draws from all.
        survivors = valid & (readings.exit_loops == loop_idx).to(valid.device)
        if self.params.selection == "threshold":
            chosen = survivors & (logits >= 0.0)
        else:
            share = self.params.capacity[table_row(loop_idx, len(self.params.capacity))]
            places = (valid.sum(dim=-1, keepdim=True) * share).long().clamp(min=1)
            order = torch.where(survivors, gate, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            chosen = survivors & (order.argsort(dim=-1) < places)
        return Route(chosen, worth(scale * gate, self.params.gating))

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
        gating: `weighted`, or `additive`: the chosen depth's state is added as it is.
        router_width: width of a router with one hidden layer, W gelu(V s); `None`: a linear one.
        temperature: what the state is divided by before the router reads it.
        """

        alpha: float = 1.0
        score: str = "softmax"
        balancing_bias: str = "none"
        table_loops: int | None = None
        gating: str = "weighted"
        router_width: int | None = None
        temperature: float = 1.0

        def __post_init__(self):
            check_router(self, ("softmax", "sigmoid"))
            if self.balancing_bias not in ("none", "loss_free"):
                raise ValueError(f"balancing_bias={self.balancing_bias!r} must be one of: none, loss_free.")

    def __init__(self, params, context):
        super().__init__(params, context)
        shape = (params.table_loops, context.hidden_size, context.initializer_range, params.router_width)
        self.router = RouterScores(*shape)
        # a buffer: a parameter that is not trained would be after loading
        balances = params.balancing_bias == "loss_free"
        self.balancing_bias = nn.Buffer(torch.empty(params.table_loops)) if balances else None

    def init_weights(self) -> None:
        if self.balancing_bias is not None:
            init.zeros_(self.balancing_bias)

    def start(self, state: Tensor) -> Readings:
        scores = self.router(state / self.params.temperature)
        scores = scores.softmax(dim=-1) if self.params.score == "softmax" else scores.sigmoid()
        scores = self.params.alpha * scores
        ranked = scores if self.balancing_bias is None else scores + self.balancing_bias.to(scores)
        depth = ranked.argmax(dim=-1)
        weight = scores.gather(-1, depth.unsqueeze(-1)).squeeze(-1)
        return Readings(state, worth(weight, self.params.gating), depth + 1)

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
