"""Loop loss: which loops the loss of a language-model head is made of, in training.

B batch, S tokens, V vocabulary, D hidden size, T loops, K of them supervised. What the model returns as logits, and
the loss in evaluation, do not depend on it. A supervised loop is read out as if it were the last: readout, coda, final
norm and head run on the state after it. So K supervised loops cost K runs of coda and head in place of one, and K
hidden states [B, S, D] are kept; logits are not, since they are computed for `chunk_tokens` tokens at a time and again
in the backward pass (the head's forward runs twice for each supervised loop, and once more for the logits that are
returned).
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .registry import Registry, Strategy

LOOP_LOSSES: Registry[LoopLoss] = Registry("loop_loss")


class LoopReadings(NamedTuple):
    """What a loss is made of.

    Attributes:
        losses: cross-entropy of each token after each supervised loop, fp32 [B, S, K]; 0 where a token does not count.
        loops: those loops, from 0.
        depth: loops that each row [B, 1] or token [B, S] ran, int64; `None`: T.
        num_loops: T.
        exit_probabilities: exit distribution of the gate, fp32 [B, S, T]; `None` without one.
        exit_logits: logit of the probability of stopping after each loop once there, fp32 [B, S, T]; `None` as above.
    """

    losses: Tensor
    loops: range
    depth: Tensor | None
    num_loops: int
    exit_probabilities: Tensor | None
    exit_logits: Tensor | None


class LoopLoss(Strategy):
    """Abstract loop loss."""

    #: Halting rules that it works beside.
    halting: ClassVar[tuple[str, ...]] = ()
    #: Whether nothing but the halting rule trains, so that no loop needs a graph.
    trains_gate_alone = False

    @abstractmethod
    def supervised(self, num_loops: int, shallowest: int) -> range:
        """The loops, from 0, whose output it reads in a call of `num_loops` loops, in which some row or token takes
        part in `shallowest` only. The last one is among them.
        """

    @abstractmethod
    def forward(self, readings: LoopReadings) -> Tensor:
        """The loss of each token, fp32 [B, S]."""


@LOOP_LOSSES.register("output")
@final
class OutputLoss(LoopLoss):
    """The cross-entropy of the model's output, as in every model of Transformers (which computes it)."""

    def supervised(self, num_loops: int, shallowest: int) -> range:
        return range(num_loops - 1, num_loops)

    def forward(self, readings: LoopReadings) -> Tensor:
        return readings.losses[..., -1]


@dataclasses.dataclass(frozen=True)
class ChunkParams:
    """Attributes:
    chunk_tokens: tokens whose logits are computed at a time; changes memory, not the result.
    """

    chunk_tokens: int = 1024

    def __post_init__(self):
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1.")


@LOOP_LOSSES.register("deep_supervision")
@final
class DeepSupervision(LoopLoss):
    r"""\sum_t w_t L_t over the last `window` loops, w_t \propto decay^{T-t}, which sum to one.

    L_t is the cross-entropy after loop t. With `decay=1` it is the mean over a window of last loops of Yang et al.
    (arXiv 2311.12424, equation 3); with a window of 1 the cross-entropy of the last loop. Where rows or tokens have
    depths of their own, T is theirs. Of a loop that truncated backpropagation leaves without a graph, the loss trains
    coda and head alone.
    """

    halting = ("none", "state_change")

    @dataclasses.dataclass(frozen=True)
    class Params(ChunkParams):
        __doc__ = f"""{str(ChunkParams.__doc__).rstrip()}
        window: how many loops are supervised, the last ones. `None`: all.
        decay: weight of a loop relative to the one after it, in (0, 1].
        """

        window: int | None = None
        decay: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            if self.window is not None and self.window < 1:
                raise ValueError(f"window={self.window} must be None (all loops) or at least 1.")
            if not 0.0 < self.decay <= 1.0:
                raise ValueError(f"decay={self.decay!r} must lie in (0, 1].")

    def supervised(self, num_loops: int, shallowest: int) -> range:
        first = 0 if self.params.window is None else max(0, shallowest - self.params.window)
        return range(first, num_loops)

    def forward(self, readings: LoopReadings) -> Tensor:
        losses = readings.losses
        loops = torch.tensor(readings.loops, device=losses.device)
        depth = torch.tensor(readings.num_loops) if readings.depth is None else readings.depth.unsqueeze(-1)
        behind = depth.to(losses.device) - 1 - loops  # loops that follow, [K], [B, 1, K] or [B, S, K]
        counts = behind >= 0
        if self.params.window is not None:
            counts = counts & (behind < self.params.window)
        weights = torch.where(counts, self.params.decay ** behind.clamp(min=0).to(losses.dtype), 0.0)
        return (losses * (weights / weights.sum(dim=-1, keepdim=True))).sum(dim=-1)


@LOOP_LOSSES.register("expected_exit")
@final
class ExpectedExitLoss(LoopLoss):
    r"""\sum_t p_t L_t - \beta H(p): the loss expected under the gate's exit distribution, less its entropy.

    Stage I of Ouro (arXiv 2510.25741, equation 4, which trains model and gate together; its \beta falls from 0.1 to
    0.05). Up to a constant it is the evidence bound with a uniform prior over the loops. Truncated backpropagation
    leaves the gate its gradient from the loops that keep a graph.
    """

    halting = ("gate",)

    @dataclasses.dataclass(frozen=True)
    class Params(ChunkParams):
        __doc__ = rf"""{str(ChunkParams.__doc__).rstrip()}
        entropy_weight: \beta, not negative.
        """

        entropy_weight: float = 0.1

        def __post_init__(self):
            super().__post_init__()
            if not 0.0 <= self.entropy_weight < math.inf:
                raise ValueError(f"entropy_weight={self.entropy_weight!r} must be a number of at least 0.")

    def supervised(self, num_loops: int, shallowest: int) -> range:
        return range(num_loops)

    def forward(self, readings: LoopReadings) -> Tensor:
        p: Any = readings.exit_probabilities
        # clamped: a saturated gate makes p = 0, where the logarithm's gradient is infinite
        log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        return (p * (readings.losses + self.params.entropy_weight * log_p)).sum(dim=-1)


@LOOP_LOSSES.register("exit_gate")
@final
class ExitGateLoss(LoopLoss):
    r"""Trains the gate alone to go on as long as that helps: \frac{1}{T} \sum_{t=2}^{T} BCE(1 - \lambda_t, w_t).

    With I_t = max(0, L_{t-1} - L_t), a token's improvement in loop t, w_t = sigmoid(slope (I_t - threshold)) is the
    wanted probability of going on, and 1 - \lambda_t the gate's. Stage II of Ouro (arXiv 2510.25741, equations 5 and
    6). All other parameters must be frozen, and no loop keeps a graph.
    """

    halting = ("gate",)
    trains_gate_alone = True

    @dataclasses.dataclass(frozen=True)
    class Params(ChunkParams):
        __doc__ = f"""{str(ChunkParams.__doc__).rstrip()}
        slope: how sharply the wanted probability depends on the improvement, positive.
        threshold: improvement, in nats, at which it is one half.
        """

        slope: float = 50.0
        threshold: float = 0.005

        def __post_init__(self):
            super().__post_init__()
            if not 0.0 < self.slope < math.inf:
                raise ValueError(f"slope={self.slope!r} must be a positive number.")
            if not 0.0 <= self.threshold < math.inf:
                raise ValueError(f"threshold={self.threshold!r} must be a number of at least 0.")

    def supervised(self, num_loops: int, shallowest: int) -> range:
        return range(num_loops)

    def forward(self, readings: LoopReadings) -> Tensor:
        logits: Any = readings.exit_logits
        improvement = (readings.losses[..., :-1] - readings.losses[..., 1:]).clamp(min=0.0)
        wanted = torch.sigmoid(self.params.slope * (improvement - self.params.threshold))
        # 1 - sigmoid(x) = sigmoid(-x)
        terms = F.binary_cross_entropy_with_logits(-logits[..., 1:], wanted, reduction="none")
        # `0 * logits` keeps the gate in the graph of a one-loop run, which teaches it nothing.
        return (terms.sum(dim=-1) + 0.0 * logits.sum(dim=-1)) / readings.num_loops


def cross_entropies(
    hidden_states: Tensor,
    targets: Tensor,
    to_logits: Callable[[Tensor], Tensor],
    chunk_tokens: int,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each token, fp32 [B, S], 0 where the target is `ignore_index`.

    Args:
        hidden_states: what the head reads, [B, S, D].
        targets: the token to predict at each place, int64 [B, S].
        to_logits: the head, [1, tokens, D] -> [1, tokens, V].
        chunk_tokens: tokens whose logits exist at a time; the backward pass computes them again.
        ignore_index: target of places that do not count.
    """

    def losses_of(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = to_logits(hidden.unsqueeze(0)).squeeze(0).float()
        return F.cross_entropy(logits, wanted.to(logits.device), ignore_index=ignore_index, reduction="none")

    pieces = zip(hidden_states.flatten(0, 1).split(chunk_tokens), targets.flatten().split(chunk_tokens), strict=True)
    if torch.is_grad_enabled():
        losses: Any = [checkpoint(losses_of, *piece, use_reentrant=False) for piece in pieces]
    else:
        losses = [losses_of(*piece) for piece in pieces]
    return torch.cat(losses).view(targets.shape)


def refuse_trainable_beside_gate(model: nn.Module) -> None:
    """Raise ValueError if more than the halting rule of a language model trains: `exit_gate` gives nothing else a
    gradient, on which distributed training insists.
    """
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".halting." not in name]
    if others:
        raise ValueError(
            f"loop_loss='exit_gate' trains the gate alone, and {len(others)} other parameters require gradients "
            f"({others[0]}, ...): freeze them, with model.requires_grad_(False) and "
            "model.model.halting.requires_grad_(True), or modeling_looped.training.select_trainable(model, 'halting')."
        )


__all__ = ["LOOP_LOSSES", "LoopLoss", "LoopReadings", "cross_entropies", "refuse_trainable_beside_gate"]
