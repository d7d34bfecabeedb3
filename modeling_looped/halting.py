"""Halting: which loop's state each token is read from.

B batch, S tokens, D hidden size, T loops. As a rule halting gives the state after every loop a weight per token; the
weights of a token sum to one over the loops, and the output is the weighted sum of its states. The recurrence itself
is untouched: every loop runs for every token, so no key-value slot is ever missing, and a token's result does not
depend on when its neighbours halt. Gate and sums are computed in fp32, since bf16 loses the product of many survival
probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, Strategy

HALTINGS: Registry[Halting] = Registry("halting")


class Route(NamedTuple):
    """Which tokens take part in a loop.

    Attributes:
        active: those that do, bool [B, S].
        weight: what each token's result is worth, [B, S].
    """

    active: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Route:
        """The same on `device`."""
        return Route(self.active.to(device), self.weight.to(device))


class Step(NamedTuple):
    """One loop, as a halting rule sees it; all on one device.

    Attributes:
        previous: state before the loop [B, S, D].
        core_input: what entered the core [B, S, D], the prelude and the loop's signal included.
        state: state after the loop [B, S, D].
        active: tokens that took part, bool [B, S]; `None`: all, without a router.
    """

    previous: Tensor
    core_input: Tensor
    state: Tensor
    active: Tensor = None  # pyright: ignore[reportAssignmentType] (only routers read it)


class Readings(NamedTuple):
    """What a halting rule carries from loop to loop.

    Attributes:
        output: what has been read so far, [B, S, D].
        remaining: probability that has not been given out yet, fp32 [B, S]; `None` for a rule that does not choose.
        exit_loops: loops after which the token halted, int64 [B, S]; 0 while it has not, `None` as above.
        probabilities: the exit distribution so far, fp32 [B, S] for each loop.
        logits: those of a gate's probability of stopping once there, fp32 [B, S] for each loop.
    """

    output: Tensor
    remaining: Tensor = None  # pyright: ignore[reportAssignmentType] (absent only where no rule reads it)
    exit_loops: Tensor = None  # pyright: ignore[reportAssignmentType] (the same)
    probabilities: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()

    def add(
        self,
        state: Tensor,
        weight: Tensor,
        remaining: Tensor,
        halts: Tensor,
        loop_idx: int,
        *,
        probability: Tensor | None = None,
    ) -> Readings:
        """Readings with `weight` [B, S] of `state` [B, S, D] added; tokens in `halts` [B, S] halt, if they run.

        `probability` is the loop's share of the exit distribution, where that is not the weight itself.
        """
        return self.after(self.output + spread(weight, state), weight, remaining, halts, loop_idx, probability)

    def after(
        self,
        output: Tensor,
        weight: Tensor,
        remaining: Tensor,
        halts: Tensor,
        loop_idx: int,
        probability: Tensor | None = None,
    ) -> Readings:
        """Readings after a loop that made the output `output`; the other arguments as in `add`."""
        return Readings(
            output,
            remaining,
            torch.where(halts & self.running, loop_idx + 1, self.exit_loops),
            (*self.probabilities, weight if probability is None else probability),
        )

    def to(self, device: torch.device) -> Readings:
        """The same on `device`: a core that is spread over several may end on another one than it started on."""
        if self.exit_loops is None:
            return Readings(self.output.to(device))
        return Readings(
            self.output.to(device),
            self.remaining.to(device),
            self.exit_loops.to(device),
            tuple(tensor.to(device) for tensor in self.probabilities),
            tuple(tensor.to(device) for tensor in self.logits),
        )

    @property
    def running(self) -> Tensor:
        """Tokens that have not halted, bool [B, S]."""
        return self.exit_loops == 0


def spread(weight: Tensor, state: Tensor) -> Tensor:
    """A weight per token [B, S] times the tokens' state [B, S, D]."""
    return weight.unsqueeze(-1).to(state.dtype) * state


class Halting(Strategy):
    """Abstract halting rule."""

    #: Whether it decides before each loop which tokens take part (routing.py).
    routes = False

    @property
    def reads_whole_sequence(self) -> bool:
        """Whether a token's result depends on later tokens, so that no cache can be used."""
        return False

    def reads_last_state(self, num_loops: int) -> bool:
        """Whether with `num_loops` loops every token is read from the last state, so that the loops unroll."""
        return num_loops == 1

    def route(self, readings: Readings, state: Tensor, loop_idx: int, valid: Tensor) -> Route | None:
        """Who takes part in loop `loop_idx`, which starts from `state`; `None`: every token."""
        return None

    def merge(self, route: Route, previous: Tensor, output: Tensor) -> Tensor:
        """The state after a routed loop."""
        return output

    def start(self, state: Tensor) -> Readings:
        """Readings before the first loop."""
        ones = state.new_ones(state.shape[:-1], dtype=torch.float32)
        return Readings(torch.zeros_like(state), ones, torch.zeros_like(ones, dtype=torch.int64))

    @abstractmethod
    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        """Readings after loop `loop_idx` (from 0). In the last loop a rule gives out all that remains."""


@HALTINGS.register("none")
@final
class NoHalting(Halting):
    """The state after the last loop."""

    def reads_last_state(self, num_loops: int) -> bool:
        return True

    def start(self, state: Tensor) -> Readings:
        return Readings(state)

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        return Readings(step.state)


@HALTINGS.register("state_change")
@final
class StateChangeHalting(Halting):
    r"""Halt when a loop hardly moves the state: \|s_t - s_{t-1}\| <= threshold \|s_t\|, no parameters.

    The latent-difference criterion of Huginn (arXiv 2502.05171, section 5), per token.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        threshold: relative change at or below which a token halts; 0 reads the last loop unless the state stands
            still.
        min_loops: loops that every token takes.
        """

        threshold: float = 0.03
        min_loops: int = 1

        def __post_init__(self):
            if not self.threshold >= 0.0:
                raise ValueError(f"threshold={self.threshold!r} must not be negative.")
            if not isinstance(self.min_loops, int) or self.min_loops < 1:
                raise ValueError(f"min_loops={self.min_loops!r} must be an integer of at least 1.")

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        change = (step.state - step.previous).float().norm(dim=-1)
        halts = change <= self.params.threshold * step.state.float().norm(dim=-1)
        if is_last or loop_idx + 1 < self.params.min_loops:
            halts = torch.full_like(halts, is_last)
        weight = torch.where(halts, readings.remaining, 0.0)
        return readings.add(step.state, weight, readings.remaining - weight, halts, loop_idx)


@HALTINGS.register("gate")
@final
class GateHalting(Halting):
    r"""A learned gate with a threshold on the distribution of exits (Ouro's Q-exit, arXiv 2510.25741).

    \lambda_t = sigmoid(w \cdot s_t + b) is the probability of stopping at loop t once there, so that
    p_t = \lambda_t \prod_{j<t} (1 - \lambda_j), and the last loop takes the rest. A token is read from the first loop
    whose cumulative probability reaches `threshold` (1: always the last). With `output="expected"` it is read from the
    mixture \sum_t p_t s_t instead. The choice of one loop has no gradient; in training the probabilities' own passes
    straight through it, so that the gate learns and the forward is the same as in evaluation.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        threshold: cumulative probability in (0, 1] at which a token exits.
        output: `threshold` or `expected`.
        """

        threshold: float = 1.0
        output: str = "threshold"

        def __post_init__(self):
            if not 0.0 < self.threshold <= 1.0:
                raise ValueError(f"threshold={self.threshold!r} must lie in (0, 1].")
            if self.output not in ("threshold", "expected"):
                raise ValueError(f"output={self.output!r} must be one of: threshold, expected.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.weight = nn.Parameter(torch.empty(1, context.hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.context.initializer_range)
        init.zeros_(self.bias)

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        logit = F.linear(step.state.float(), self.weight.float(), self.bias.float()).squeeze(-1)
        stop = torch.sigmoid(logit)
        # The last loop takes the rest whatever the gate says: `0 * stop` keeps the gate in the graph of a one-loop
        # run.
        probability = readings.remaining + 0.0 * stop if is_last else readings.remaining * stop
        remaining = readings.remaining - probability
        # At threshold 1 the rule is off: a gate that saturates must not make it exit all the same.
        reached = (
            1.0 - remaining >= self.params.threshold if self.params.threshold < 1.0 else torch.zeros_like(stop).bool()
        )
        halts = torch.ones_like(reached) if is_last else reached
        if self.params.output == "expected":
            weight = probability
        else:
            weight = (halts & readings.running).float()
            if self.training:
                weight = weight + (probability - probability.detach())
        after = readings.add(step.state, weight, remaining, halts, loop_idx, probability=probability)
        return after._replace(logits=(*readings.logits, logit))


@HALTINGS.register("act")
@final
class AdaptiveComputationTime(Halting):
    r"""Adaptive computation time, per position.

    `form="graves"` (Graves, arXiv 1603.08983): p_t = sigmoid(w \cdot s_{t-1} + b), from the state that enters the
    loop. A token gives p_t to each state until its sum would pass `threshold`; that state gets the remainder
    1 - \sum p and the token halts. The last loop takes what is left, and the output is \sum_t p_t s_t.

    `form="universal"` (the code of the Universal Transformer, arXiv 1807.03819): the gate reads what enters the core,
    position and time signals included; the output is the running mix o <- (1 - p_t) o + p_t s_t; and a token that has
    not halted by the last loop gives that loop its p_t and no remainder.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        threshold: sum of halting probabilities in (0, 1) beyond which a token halts (1 - epsilon of the papers).
        initial_bias: b at initialisation; 1 makes early halting likely, as the papers start it.
        form: `graves` or `universal`.
        """

        threshold: float = 0.99
        initial_bias: float = 1.0
        form: str = "graves"

        def __post_init__(self):
            if not 0.0 < self.threshold < 1.0:
                raise ValueError(f"threshold={self.threshold!r} must lie strictly between 0 and 1.")
            if not math.isfinite(self.initial_bias):
                raise ValueError(f"initial_bias={self.initial_bias!r} must be a finite number.")
            if self.form not in ("graves", "universal"):
                raise ValueError(f"form={self.form!r} must be one of: graves, universal.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.weight = nn.Parameter(torch.empty(1, context.hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.context.initializer_range)
        init.constant_(self.bias, self.params.initial_bias)

    def reads_last_state(self, num_loops: int) -> bool:
        return num_loops == 1 and self.params.form == "graves"

    def forward(self, readings: Readings, step: Step, loop_idx: int, is_last: bool) -> Readings:
        universal = self.params.form == "universal"
        read = (step.core_input if universal else step.previous).float()
        probability = torch.sigmoid(F.linear(read, self.weight.float(), self.bias.float()).squeeze(-1))
        halts = 1.0 - readings.remaining + probability > self.params.threshold
        takes_rest = halts if universal else halts | is_last
        # A token that halts takes the remainder, whatever its probability: `0 * p` keeps the gate in the graph.
        weight = torch.where(takes_rest, readings.remaining + 0.0 * probability, probability)
        weight = torch.where(readings.running, weight, 0.0)
        remaining = readings.remaining - weight
        if not universal:
            return readings.add(step.state, weight, remaining, takes_rest, loop_idx)
        output = readings.output + spread(weight, step.state - readings.output)
        return readings.after(output, weight, remaining, halts | is_last, loop_idx)
