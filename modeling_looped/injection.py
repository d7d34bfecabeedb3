"""Injection: how the prelude's output enters every loop.

D hidden size. With s the state [B, S, D] that a loop starts from and e the (normalised) prelude output [B, S, D], an
injection gives the core's input x [B, S, D]. Seen over the loops it is the linear part of a dynamical system,
x_t = A s_t + B e; Parcae's argument (arXiv 2604.12946) is that the spectral radius of A decides stability: it is 1 for
`add`, unconstrained for `concat`, and strictly inside (0, 1) for `diagonal` whatever the parameters become.
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

from .registry import Registry, Strategy

INJECTIONS: Registry[Injection] = Registry("injection")

#: What an injection computes once per call, before the first loop.
Prepared = tuple[Tensor, ...]


class Injection(Strategy):
    """Abstract injection, in two steps: what is the same in every loop, and what enters one.

    Parameters are read in the first step only, which returns tensors: hooks on a module, such as those by which ZeRO-3
    brings its weights back for the backward pass, see what the module returns, and nothing that a closure holds.
    """

    #: Whether the core still sees the prelude after the first loop; without it truncated backpropagation would cut
    #: the prelude off from every gradient.
    carries_prelude = True

    @abstractmethod
    def forward(self, prelude: Tensor) -> Prepared:
        """What `inject` needs of a prelude output [B, S, D]."""

    @abstractmethod
    def inject(self, prepared: Prepared, state: Tensor, loop_idx: int) -> Tensor:
        """The core's input [B, S, D] in loop `loop_idx` (from 0).

        Args:
            prepared: what `forward` returned.
            state: [B, S, D]. Where a model is spread over devices, it may come from another one than the prelude.
            loop_idx: the loop that the state enters.
        """

    def spectral_radius(self) -> Tensor | None:
        """Largest absolute eigenvalue of A in x = A s + B e, a scalar in fp32; `None`: there is no such A.

        It is that of the injection alone: core and update come on top.
        """
        return None


@INJECTIONS.register("none")
@final
class NoInjection(Injection):
    """x = s: the loop iterates on its own output (Ouro, ALBERT, relaxed recursive models)."""

    carries_prelude = False

    def forward(self, prelude: Tensor) -> Prepared:
        return ()

    def inject(self, prepared: Prepared, state: Tensor, loop_idx: int) -> Tensor:
        return state

    def spectral_radius(self) -> Tensor:
        return torch.ones(())


@INJECTIONS.register("add")
@final
class AddInjection(Injection):
    """x = s + e. The linear part has spectral radius 1: marginally stable."""

    def forward(self, prelude: Tensor) -> Prepared:
        return (prelude,)

    def inject(self, prepared: Prepared, state: Tensor, loop_idx: int) -> Tensor:
        (prelude,) = prepared
        return state.to(prelude.device) + prelude

    def spectral_radius(self) -> Tensor:
        return torch.ones(())


@INJECTIONS.register("concat", "linear")
@final
class ConcatInjection(Injection):
    """x = W [s ; e], W of shape [D, 2D] with the state's columns first (Huginn's adapter, Parcae's `linear`).

    With a state of another width than the prelude's, W is [D_state, D_state + D_prelude].
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        start: what W is at initialisation: `normal` (drawn with the model's initializer_range), `state`
            ([I, 0]: passes the state on) or `prelude` ([0, I]: passes the prelude on).
        first_loop: `inject`, as in every other loop; or `skip`: the first loop runs on e itself, and the state before
            it is not read (the `skip-adapter` start of retrofitted recurrence, arXiv 2511.07384).
        bias: whether a vector, which starts at zero, is added.
        """

        start: str = "normal"
        first_loop: str = "inject"
        bias: bool = False

        def __post_init__(self):
            if self.first_loop not in ("inject", "skip"):
                raise ValueError(f"first_loop={self.first_loop!r} must be one of: inject, skip.")
            if self.start not in ("normal", "state", "prelude"):
                raise ValueError(f"start={self.start!r} must be one of: normal, state, prelude.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.weight = nn.Parameter(torch.empty(context.hidden_size, context.hidden_size + context.prelude_size))
        self.bias = nn.Parameter(torch.empty(context.hidden_size)) if params.bias else None

    def init_weights(self) -> None:
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.params.start == "normal":
            init.normal_(self.weight, mean=0.0, std=self.context.initializer_range)
        else:
            state, prelude = self.context.hidden_size, self.context.prelude_size
            keep_state = self.params.start == "state"
            for_state = torch.eye(state) if keep_state else torch.zeros(state, state)
            for_prelude = torch.zeros(state, prelude) if keep_state else torch.eye(state, prelude)
            init.copy_(self.weight, torch.cat((for_state, for_prelude), dim=1))

    def forward(self, prelude: Tensor) -> Prepared:
        for_state, for_prelude = self.weight.split((self.context.hidden_size, self.context.prelude_size), dim=1)
        # A copy: a view of a parameter made without gradients says that it requires them, which trips torch's hooks.
        return prelude, F.linear(prelude, for_prelude, self.bias), for_state.contiguous()

    def inject(self, prepared: Prepared, state: Tensor, loop_idx: int) -> Tensor:
        prelude, injected, for_state = prepared
        if self.params.first_loop == "skip" and loop_idx == 0:
            # In training `0 * injected` keeps the matrix in the graph of a one-loop run: DDP and the Trainer want it.
            return prelude + 0.0 * injected if self.training else prelude
        return F.linear(state.to(injected.device), for_state) + injected

    @torch.no_grad()
    def spectral_radius(self) -> Tensor:
        r"""That of W's columns for the state, from above and within about 1 %: \|A^k\|^{1/k} with k = 4096, which
        tends to it (Gelfand's formula) and takes 12 matrix products, where eigenvalues would take seconds.
        """
        power = self.weight[:, : self.context.hidden_size].float()
        logarithm = torch.zeros((), device=power.device)
        for doubling in range(13):
            if doubling:
                power = power @ power
            # |A^2k| = |A^k|^2 |N^2| with N = A^k / |A^k|; the norm is taken out so that nothing overflows
            norm = power.norm()
            logarithm = 2.0 * logarithm * (doubling > 0) + norm.log()
            power = power / norm.clamp_min(torch.finfo(power.dtype).tiny)
        return (logarithm / 2.0**12).exp()


@INJECTIONS.register("diagonal")
@final
class DiagonalInjection(Injection):
    r"""x = \bar A s + \bar B e, the discretised linear system of Parcae (arXiv 2604.12946, section 3).

    With A = -exp(A_log) < 0 and a step \Delta = softplus(dt_bias) > 0, both learned per channel,
    \bar A = exp(\Delta A) lies in (0, 1) for every value of the parameters. The input matrix is

    - `euler` (published): \bar B = \Delta B;
    - `zoh` (the exact zero-order hold of the same system): \bar B = A^{-1} (exp(\Delta A) - I) B.

    B is a [D, D] matrix ([D_state, D_prelude] where the widths differ) and starts as the identity; A_log starts at 0
    and dt_bias such that \bar A = `initial_decay`.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        r"""Attributes:
        initial_decay: diagonal of \bar A at initialisation, in (0, 1); Parcae starts at sqrt(1/5).
        input_matrix: `euler` or `zoh`.
        """

        initial_decay: float = math.sqrt(1 / 5)
        input_matrix: str = "euler"

        def __post_init__(self):
            if not 0.0 < self.initial_decay < 1.0:
                raise ValueError(f"initial_decay={self.initial_decay!r} must lie strictly between 0 and 1.")
            if self.input_matrix not in ("euler", "zoh"):
                raise ValueError(f"input_matrix={self.input_matrix!r} must be one of: euler, zoh.")

    def __init__(self, params, context):
        super().__init__(params, context)
        self.A_log = nn.Parameter(torch.empty(context.hidden_size))
        self.dt_bias = nn.Parameter(torch.empty(context.hidden_size))
        self.B = nn.Parameter(torch.empty(context.hidden_size, context.prelude_size))

    def init_weights(self) -> None:
        init.zeros_(self.A_log)
        step = -math.log(self.params.initial_decay)  # A = -1 at the start, so the decay is exp(-step)
        init.constant_(self.dt_bias, math.log(math.expm1(step)))  # the inverse of softplus
        init.copy_(self.B, torch.eye(*self.B.shape))

    def rate_and_step(self) -> tuple[Tensor, Tensor]:
        r"""-A and \Delta, both [D], finite and not negative, in fp32: bf16 would round a slow channel's decay to 1."""
        # exp overflows above 88, and the gradient of an infinite rate is NaN instead of the zero of a saturated
        # channel.
        return self.A_log.float().clamp(max=88.0).exp(), F.softplus(self.dt_bias.float())

    def decay(self, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""The diagonal of \bar A, [D], strictly inside (0, 1) as numbers of `dtype`, whatever the parameters are."""
        rate, step = self.rate_and_step()
        limits = torch.finfo(dtype)
        return torch.exp(-step * rate).to(dtype).clamp(limits.tiny, 1.0 - limits.eps / 2)

    @torch.no_grad()
    def spectral_radius(self) -> Tensor:
        """The largest decay, exactly."""
        return self.decay().max()

    def forward(self, prelude: Tensor) -> Prepared:
        rate, gain = self.rate_and_step()
        if self.params.input_matrix == "zoh":
            # (1 - decay) / rate, written as the step times a factor that is 1 in fp32 for all smaller exponents: the
            # limit for rate -> 0 is the step, where the quotient itself would be 0 / 0.
            exponent = (gain * rate).clamp_min(1e-7)
            gain = gain * (-torch.expm1(-exponent) / exponent)
        return F.linear(prelude, self.B) * gain.to(prelude.dtype), self.decay(prelude.dtype)

    def inject(self, prepared: Prepared, state: Tensor, loop_idx: int) -> Tensor:
        injected, decay = prepared
        return torch.addcmul(injected, state.to(injected.device), decay)
