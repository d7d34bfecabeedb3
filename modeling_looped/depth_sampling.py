"""Depth sampling: how many loops a call in training runs.

B batch, S tokens, T loops. A draw is a function of (seed, step) and, where rows or tokens have depths of their own, of
the row's place, its tokens and the position: no generator's state is read or changed. So every rank draws the same
depth for a batch; ranks that hold different rows draw differently for them, and ranks that hold the same rows (tensor
parallelism) draw the same, without knowing their rank. `step` counts the model's sampled forward passes (micro-batches
where gradients are accumulated) in a buffer, because the checkpoint that a `Trainer` writes and restores holds the
model's buffers, and nothing else that a model can reach.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

from .depth import Depth, DepthRange
from .keyed_random import MASK, keyed_uniform, mix
from .registry import Registry, Strategy

#: How the name of the buffer ends in which a model that samples counts its steps.
STEP = "depth_sampling.step"

DEPTH_SAMPLINGS: Registry[DepthSampling] = Registry("depth_sampling")

GRANULARITIES = ("batch", "sequence", "token")
CURRICULA = ("none", "linear", "one_minus_sqrt")

#: Tables end where what is left is too little to be drawn: uniform numbers have 23 bits.
NEGLIGIBLE = 2.0**-25


class DepthSampling(Strategy):
    """Abstract depth sampling.

    Attributes:
        drawn: the depths of the last draw, for the accounts of what that call cost; `None`: there was none.
    """

    drawn: DepthRange | None = None

    @abstractmethod
    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_loops: int) -> Depth:
        """The depth of one call in training.

        Args:
            input_ids: [B, S], or `None`.
            inputs_embeds: [B, S, D], where there are no `input_ids`.
            num_loops: the config's.
        """


@DEPTH_SAMPLINGS.register("fixed")
@final
class FixedDepth(DepthSampling):
    """Always the config's `num_loops`."""

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_loops: int) -> Depth:
        return Depth(num_loops)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Attributes:
    granularity: what has a depth of its own: a `batch`, each `sequence`, or each `token`.
    min_loops: smallest depth; smaller draws are raised to it.
    max_loops: largest depth; larger draws are cut to it. `None`: there is none (of `uniform`: see there).
    curriculum: growth of the mean: `none`, `linear` or `one_minus_sqrt`.
    curriculum_steps: training forwards until the mean has grown to its full value.
    seed: key of the draws, from 0 to 2^31 - 1.
    """

    granularity: str = "batch"
    min_loops: int = 1
    max_loops: int | None = None
    curriculum: str = "none"
    curriculum_steps: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("granularity", GRANULARITIES), ("curriculum", CURRICULA)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of: {', '.join(allowed)}.")
        if self.min_loops < 1:
            raise ValueError(f"min_loops={self.min_loops} must be at least 1.")
        if self.max_loops is not None and self.max_loops < self.min_loops:
            raise ValueError(f"max_loops={self.max_loops} must be None or at least min_loops={self.min_loops}.")
        if (self.curriculum == "none") != (self.curriculum_steps == 0) or self.curriculum_steps < 0:
            raise ValueError(
                f"curriculum_steps={self.curriculum_steps} with curriculum={self.curriculum!r}: a curriculum needs at "
                "least 1 step, and without one it must be 0."
            )
        if not 0 <= self.seed <= MASK:
            raise ValueError(f"seed={self.seed} must lie in 0..{MASK}.")


@dataclasses.dataclass(frozen=True)
class MeanParams(SamplingParams):
    __doc__ = f"""{str(SamplingParams.__doc__).rstrip()}
    mean: mean of the distribution, at least 1. `None`: the config's `num_loops`.
    """

    mean: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.mean is not None and not 1.0 <= self.mean < math.inf:
            raise ValueError(f"mean={self.mean!r} must be None (the config's num_loops) or a number of at least 1.")


class SampledDepth(DepthSampling):
    """Abstract: a depth drawn anew in every forward.

    One keyed uniform number per depth is looked up in the table of the cumulated probabilities, so a draw is the same
    on every device and in every version of torch.
    """

    Params = SamplingParams

    def __init__(self, params, context):
        super().__init__(params, context)
        self.step = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def init_weights(self) -> None:
        init.zeros_(self.step)

    @abstractmethod
    def probabilities(self, num_loops: int, progress: float = 1.0) -> Tensor:
        """The probability of each depth 1, 2, …, fp64 [depths].

        Args:
            num_loops: the config's.
            progress: share of the curriculum's growth, in [0, 1]; 1 is the full mean.
        """

    def progress(self, step: int) -> float:
        r"""Share of the mean's growth that step `step` (from 0) has reached, with n = `curriculum_steps`.

        `linear`: s/n. `one_minus_sqrt`: 1 - \sqrt{1 - s/n}, slow first. The mean is 1 + (mean - 1) * progress: from 1,
        as the retrofit of arXiv 2511.07384 starts. (Parcae's code lets only the loops without gradients grow, and
        rounds the mean up.)
        """
        if step >= self.params.curriculum_steps:
            return 1.0
        share = step / self.params.curriculum_steps
        return share if self.params.curriculum == "linear" else 1.0 - math.sqrt(1.0 - share)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_loops: int) -> Depth:
        draw: Any = self.draw  # the stub of `torch.compiler.disable` takes what it returns for no method
        return draw(input_ids, inputs_embeds, num_loops)

    @torch.compiler.disable
    def draw(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_loops: int) -> Depth:
        """The depth of the next step: what no graph can hold, since it is not known when a graph is made."""
        # The one place of the model where a forward leaves something behind: see the top of this file.
        step = int(self.step)
        self.step.add_(1)
        table = self.probabilities(num_loops, self.progress(step)).cumsum(0)
        seed = self.params.seed | (step & MASK) << 31

        def depths(rows: Tensor, columns: int) -> Tensor:
            uniform = keyed_uniform(seed, rows.unsqueeze(-1), columns).squeeze(1).double()
            return torch.searchsorted(table, uniform, right=True).clamp_(max=len(table) - 1) + 1  # [rows, columns]

        if self.params.granularity == "batch":
            loops = int(depths(torch.zeros(1, dtype=torch.int64), 1))
            refuse_disagreement(loops, self.step.device)
            self.drawn = DepthRange(loops, loops)
            return Depth(loops)
        batch, length = given_shape(input_ids, inputs_embeds)
        each = depths(row_keys(input_ids, batch), length if self.params.granularity == "token" else 1)
        shallowest, loops = range_on_all_ranks(int(each.min()), int(each.max()), self.step.device)
        self.drawn = DepthRange(shallowest, loops)
        return Depth(loops, each.unsqueeze(-1).to(self.step.device), shallowest)


@DEPTH_SAMPLINGS.register("poisson")
@final
class PoissonDepth(SampledDepth):
    """r ~ Poisson(mean), brought into min_loops..max_loops (Parcae's `poisson-truncated-full`, arXiv 2604.12946).

    With `config.backprop_loops` = k, the last min(r, k) loops keep a graph.
    """

    Params = MeanParams

    def probabilities(self, num_loops: int, progress: float = 1.0) -> Tensor:
        rate = grown(self.params.mean or num_loops, progress)
        return clamped(poisson(torch.tensor([rate], dtype=torch.float64))[0], self.params)


@DEPTH_SAMPLINGS.register("lognormal_poisson")
@final
class LognormalPoissonDepth(SampledDepth):
    r"""\tau ~ N(log mean - sigma^2/2, sigma), r ~ Poisson(e^\tau) + 1 (Huginn, arXiv 2502.05171): E[r] = mean + 1."""

    @dataclasses.dataclass(frozen=True)
    class Params(MeanParams):
        __doc__ = f"""{str(MeanParams.__doc__).rstrip()}
        sigma: standard deviation of the rate's logarithm, positive.
        """

        sigma: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not 0.0 < self.sigma <= 2.0:
                raise ValueError(f"sigma={self.sigma!r} must lie in (0, 2].")

    def probabilities(self, num_loops: int, progress: float = 1.0) -> Tensor:
        mean, sigma = grown(self.params.mean or num_loops, progress), self.params.sigma
        # An even grid of the normal: of smooth functions, such a sum misses less than fp64 shows.
        normal = torch.linspace(-6.0, 6.0, 193, dtype=torch.float64)
        weights = torch.softmax(-0.5 * normal**2, dim=0)
        counts = weights @ poisson(torch.exp(math.log(mean) - 0.5 * sigma**2 + sigma * normal))
        return clamped(torch.cat((counts.new_zeros(1), counts)), self.params)


@DEPTH_SAMPLINGS.register("uniform")
@final
class UniformDepth(SampledDepth):
    """r uniform on min_loops..max_loops; a `max_loops` of `None` is the one that makes `config.num_loops` the mean.

    A curriculum moves the upper end, from min_loops.
    """

    def probabilities(self, num_loops: int, progress: float = 1.0) -> Tensor:
        low = self.params.min_loops
        high = max(low, 2 * num_loops - low if self.params.max_loops is None else self.params.max_loops)
        high = low + round((high - low) * progress)
        counts = torch.arange(1, high + 1)
        return (counts >= low).double() / (high - low + 1)


def grown(mean: float, progress: float) -> float:
    """The mean of a curriculum that begins at 1."""
    return 1.0 + (mean - 1.0) * progress


def poisson(rates: Tensor) -> Tensor:
    """The probabilities of the counts 0, 1, … [rates, counts] of Poisson distributions, as far as they matter."""
    largest = float(rates.max())
    counts = torch.arange(int(largest + 8.0 * math.sqrt(largest) + 20.0), dtype=rates.dtype)
    rates = rates.unsqueeze(-1)
    return torch.exp(counts * torch.log(rates) - rates - torch.lgamma(counts + 1.0))


def clamped(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of the depths 1, 2, … from those of the counts 0, 1, …, brought into the bounds of `params`."""
    probabilities = probabilities / probabilities.sum()
    counts = torch.arange(len(probabilities)).clamp(params.min_loops, params.max_loops)
    depths = torch.zeros(int(counts[-1]) + 1, dtype=probabilities.dtype).scatter_add_(0, counts, probabilities)[1:]
    beyond = depths.flip(0).cumsum(0).flip(0)  # P(depth >= r)
    depths = depths[: int((beyond > NEGLIGIBLE).sum())]
    return depths / depths.sum()


def given_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """B and S of a call."""
    given: Any = inputs_embeds if input_ids is None else input_ids
    return given.shape[0], given.shape[1]


def row_keys(input_ids: Tensor | None, batch: int) -> Tensor:
    """A key for each row, int64 [B] on the CPU: of its place, and of its tokens where the call has any."""
    place = torch.arange(batch)
    if input_ids is None:
        return place
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return mix(mix((input_ids.long() & MASK) ^ mix(position)).sum(dim=-1).cpu() & MASK) ^ place


def is_shared() -> bool:
    """Whether other processes take part in this forward."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def range_on_all_ranks(smallest: int, largest: int, device: torch.device) -> tuple[int, int]:
    """The smallest and the largest depth of all ranks: with weights gathered in every loop (FSDP2), a rank that ran
    fewer loops, or fewer with a graph, would leave the others waiting.
    """
    if not is_shared():
        return smallest, largest
    extremes = torch.tensor((-smallest, largest), device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return -int(extremes[0]), int(extremes[1])


def refuse_disagreement(loops: int, device: torch.device) -> None:
    """Raise RuntimeError, where torch debugs its distributed calls (`TORCH_DISTRIBUTED_DEBUG`), if ranks drew
    different loop counts, which would otherwise hang under FSDP2.
    """
    if is_shared() and dist.get_debug_level() != dist.DebugLevel.OFF:
        smallest, largest = range_on_all_ranks(loops, loops, device)
        if smallest != largest:
            raise RuntimeError(
                f"depth_sampling drew {smallest} loops on one rank and {largest} on another: the ranks' models stand "
                "at different steps. Load all of them from the same checkpoint."
            )


def draws_depth(forward: Callable) -> Callable:
    """Decorator of `LoopedModel.forward`: a call in training that names no loop count gets one drawn.

    Not without gradients and not on a cache: there text is generated, or a loss compared, by a model that happens to
    be in training mode.
    """
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapper(self, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        if config.depth_sampling["type"] == "fixed" or not (self.training and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if config.num_core_layers == 0 or any(call.get(name) is not None for name in ("num_loops", "past_key_values")):
            return forward(self, **call)
        depth = self.depth_sampling(call.get("input_ids"), call.get("inputs_embeds"), config.num_loops)
        if depth.loops > (config.max_trained_loops or 0):
            config.max_trained_loops = depth.loops
        return forward(self, **{**call, "num_loops": depth})

    return wrapper


__all__ = ["DEPTH_SAMPLINGS", "STEP", "DepthSampling", "draws_depth"]
