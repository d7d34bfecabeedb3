"""Loop adapter: what a shared layer may do differently in every loop, at low rank.

R rank, T loops. A loop adapter is part of the model (its weights are in the checkpoint and it runs without PEFT). A
PEFT adapter on a shared layer is another thing: one adapter that acts in every loop.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .registry import Registry, SelfInitialised, Strategy, check_table_loops, table_row

LOOP_ADAPTERS: Registry[LoopAdapter] = Registry("loop_adapter")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoopAdapter(Strategy):
    """Abstract loop adapter: a recipe for the modules that sit beside the projections of the core's layers."""

    @abstractmethod
    def for_projection(self, name: str, in_features: int, out_features: int, has_bias: bool) -> LoopLoRA | None:
        """The module beside projection `name` of one core layer, or `None` where the adapter does not act."""


@LOOP_ADAPTERS.register("none")
@final
class NoLoopAdapter(LoopAdapter):
    """Every loop uses the shared weights as they are."""

    def for_projection(self, name: str, in_features: int, out_features: int, has_bias: bool) -> LoopLoRA | None:
        return None


@LOOP_ADAPTERS.register("lora")
@final
class LoraLoopAdapter(LoopAdapter):
    """W_t = c_t W + (alpha / rank) B_t A_t per loop t (Relaxed Recursive Transformers, arXiv 2410.20672, section 3;
    there c_t = 1).
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        rank: r, at least 1.
        alpha: numerator of the scale alpha / r; `None`: r, a scale of 1.
        targets: projections that get an adapter.
        table_loops: loops with an adapter of their own (`None`: the config's `num_loops`).
        biases: of projections that have a bias, `shared` by all loops, or `per_loop`, which costs next to nothing.
        ranks: of each of the targets, where they are not all `rank`; the scale of all stays alpha / rank.
        loops: those that have an adapter, ascending, from 0; the others use the shared weights as they are. `None`:
            all.
        shared_scale: c_t: `none`, 1 everywhere, or `per_channel`, a learned factor per output channel and adapted
            loop, which says how much of the shared weight that loop uses.
        initial_scale: where these factors start. At 0, with `targets` o_proj and down_proj and `loops` from 1 on, the
            further loops start as the identity and yet learn at once, which a gate near 0 does not let them.
        """

        rank: int = 8
        alpha: float | None = None
        targets: tuple[str, ...] = TARGETS
        table_loops: int | None = None
        biases: str = "shared"
        ranks: tuple[int, ...] | None = None
        loops: tuple[int, ...] | None = None
        shared_scale: str = "none"
        initial_scale: float = 1.0

        def __post_init__(self):
            if self.shared_scale not in ("none", "per_channel"):
                raise ValueError(f"shared_scale={self.shared_scale!r} must be one of: none, per_channel.")
            if not math.isfinite(self.initial_scale):
                raise ValueError(f"initial_scale={self.initial_scale!r} must be a finite number.")
            if self.initial_scale != 1.0 and self.shared_scale == "none":
                raise ValueError(
                    f"initial_scale={self.initial_scale} is the start of shared_scale='per_channel', not of 'none'."
                )
            if self.loops is not None and (not self.loops or sorted(set(self.loops)) != [*self.loops]):
                raise ValueError(f"loops={self.loops!r} must be None (all) or ascending loop numbers, at least one.")
            if self.biases not in ("shared", "per_loop"):
                raise ValueError(f"biases={self.biases!r} must be one of: shared, per_loop.")
            if not isinstance(self.rank, int) or self.rank < 1:
                raise ValueError(f"rank={self.rank!r} must be an integer of at least 1.")
            if self.alpha is not None and not math.isfinite(self.alpha):
                raise ValueError(f"alpha={self.alpha!r} must be None (the rank) or a finite number.")
            unknown = sorted(set(self.targets) - set(TARGETS))
            if unknown or not self.targets or isinstance(self.targets, str):
                raise ValueError(f"targets={self.targets!r} must be a list of some of: {', '.join(TARGETS)}.")
            if self.ranks is not None and (len(self.ranks) != len(self.targets) or min(self.ranks) < 1):
                raise ValueError(
                    f"ranks={list(self.ranks)} must be None (the rank for all) or ranks of at least 1, one for "
                    f"each of the {len(self.targets)} targets."
                )
            check_table_loops(self.table_loops)
            if self.loops and self.table_loops and not 0 <= self.loops[0] <= self.loops[-1] < self.table_loops:
                raise ValueError(
                    f"loops={list(self.loops)} must lie between 0 and {self.table_loops - 1}: table_loops="
                    f"{self.table_loops} loops have a row of their own."
                )

    def for_projection(self, name: str, in_features: int, out_features: int, has_bias: bool) -> LoopLoRA | None:
        if name not in self.params.targets:
            return None
        targets = self.params.targets
        ranks = dict(zip(targets, self.params.ranks or (self.params.rank,) * len(targets), strict=True))
        return LoopLoRA(
            in_features,
            out_features,
            rank=ranks[name],
            scale=(self.params.rank if self.params.alpha is None else self.params.alpha) / self.params.rank,
            table_loops=self.params.table_loops,
            bias=has_bias and self.params.biases == "per_loop",
            loops=self.params.loops,
            initial_scale=None if self.params.shared_scale == "none" else self.params.initial_scale,
        )


@final
class LoopLoRA(SelfInitialised):
    """What loops do to one projection: a low-rank difference, and a factor on what the shared weight gives.

    Args:
        in_features, out_features: of the projection it stands beside.
        rank: r.
        scale: factor of the difference.
        table_loops: T.
        bias: whether each loop has a difference of the bias too.
        loops: those that have an adapter; `None`: all.
        initial_scale: start of each loop's factors on the shared projection's output channels; `None`: no factors.
    """

    #: Where these parameters are in a model's state dict.
    WHERE = "model.layers.{layer}.{part}.loop_adapters.{projection}.{parameter}"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        table_loops: int,
        bias: bool = False,
        loops: Sequence[int] | None = None,
        initial_scale: float | None = None,
    ):
        super().__init__()
        self.scale = scale
        self.table_loops = table_loops
        self.loops = tuple(range(table_loops) if loops is None else loops)
        #: Loops without a gap: where a loop's row is can then be computed, and a compiled graph serves all of them.
        self.without_gap = self.loops == tuple(range(self.loops[0], self.loops[-1] + 1))
        rows = len(self.loops)
        # Parameters, not Linears: PEFT's "all-linear" must see each physical projection once and nothing else.
        self.A = nn.Parameter(torch.empty(rows, rank, in_features))
        self.B = nn.Parameter(torch.empty(rows, out_features, rank))
        self.bias = nn.Parameter(torch.empty(rows, out_features)) if bias else None
        self.initial_scale = initial_scale
        self.shared_scale = None if initial_scale is None else nn.Parameter(torch.empty(rows, out_features))

    def init_weights(self) -> None:
        # LoRA's usual start (arXiv 2106.09685): the difference is zero and A is Kaiming-uniform with a = sqrt(5).
        bound = 1.0 / math.sqrt(self.A.shape[-1])
        init.uniform_(self.A, -bound, bound)
        init.zeros_(self.B)
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.shared_scale is not None and self.initial_scale is not None:
            init.constant_(self.shared_scale, self.initial_scale)

    def row(self, loop_idx: int) -> int | None:
        """Row of the tables that loop `loop_idx` uses, if it has an adapter; loops beyond T do as the last of them."""
        loop = table_row(loop_idx, self.table_loops)
        if self.without_gap:
            return loop - self.loops[0] if self.loops[0] <= loop <= self.loops[-1] else None
        return self.loops.index(loop) if loop in self.loops else None

    def forward(self, inputs: Tensor, loop_idx: int, shared: Tensor) -> Tensor:
        """What the loop makes of `inputs` [..., in_features], given what the shared projection makes of them, `shared`
        [..., out_features].
        """
        row = self.row(loop_idx)
        if row is None:
            return self._taking_part(shared) if self.training else shared
        if self.shared_scale is not None:
            shared = shared * self.shared_scale[row]
        output = shared + F.linear(F.linear(inputs, self.A[row]), self.B[row]) * self.scale
        return output if self.bias is None else output + self.bias[row]

    def _taking_part(self, output: Tensor) -> Tensor:
        """`output` as it is, of a graph in which every parameter is: one that a step with few loops never reads still
        gets a (zero) gradient, as DDP and the Trainer expect.
        """
        # one number of each: a sum over all of them could overflow in half precision, and 0 * infinity is no 0
        for parameter in self.parameters():
            output = output + 0.0 * parameter.flatten()[0]
        return output

    def merged(self, weight: Tensor, loop_idx: int) -> Tensor:
        """The weight [out_features, in_features] that loop `loop_idx` uses, from the shared one."""
        row = self.row(loop_idx)
        if row is None:
            return weight
        if self.shared_scale is not None:
            weight = weight.float() * self.shared_scale[row].float()[:, None]
        return weight.float() + self.scale * (self.B[row].float() @ self.A[row].float())

    def merged_bias(self, bias: Tensor, loop_idx: int) -> Tensor:
        """The bias [out_features] that loop `loop_idx` uses, from the shared one."""
        row = self.row(loop_idx)
        if row is None:
            return bias
        if self.shared_scale is not None:
            bias = bias.float() * self.shared_scale[row].float()
        return bias if self.bias is None else bias.float() + self.bias[row].float()

    def extra_repr(self) -> str:
        _, rank, in_features = self.A.shape
        return f"{in_features} -> {self.B.shape[1]}, rank={rank}, loops={self.loops}, scale={self.scale}"


def build_adapters(module: nn.Module, names: tuple[str, ...], adapter: LoopAdapter | None) -> nn.ModuleDict:
    """The loop adapters beside the projections `names` of `module`; empty where the adapter does not act."""
    adapters = nn.ModuleDict()
    if adapter is not None:
        for name in names:
            out_features, in_features = module.get_parameter(f"{name}.weight").shape
            has_bias = module.get_submodule(name).bias is not None
            built = adapter.for_projection(name, in_features, out_features, has_bias)
            if built is not None:
                adapters[name] = built
    return adapters


def add_adapter(adapters: nn.ModuleDict, name: str, output: Tensor, inputs: Tensor, loop_idx: int) -> Tensor:
    """The projection's `output`, changed by its loop adapter, if there is one, which sees the same `inputs`."""
    return adapters[name](inputs, loop_idx, output) if name in adapters else output
