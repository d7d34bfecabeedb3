"""Residual streams: what runs along the layers, and how attention and MLP read from it and write to it.

B batch, S tokens, D hidden size, n streams. As a rule there is one stream, x <- x + f(x). With hyper-connections
there are n of them, X [B, S, n, D], and each f (attention or MLP, with its norms) sits between a read, a mix and a
write that depend on the token:

    X_i <- sum_j M_ij X_j + w_i f(sum_j r_j X_j),   r and w [B, S, n], M [B, S, n, n].

Everything else that acts on the residual stream (norms between the parts, injection, loop update, readout) acts on
each stream. The streams start as copies of one, and end as their mean.

Or f is the whole core (`hyperloop`): then there are streams between the loops only, and one wherever layers run.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .registry import BuildContext, Registry, SelfInitialised, Strategy, check_table_loops, table_row

RESIDUAL_STREAMS: Registry[ResidualStreams] = Registry("residual_streams")

#: The parts of a layer that read from the streams and write to them.
BRANCHES = ("attention", "mlp")

#: Keeps norms of zeros finite (as in Nanbeige's code of both kinds of hyper-connections).
EPSILON = 1e-6


class Mapping(NamedTuple):
    """How one invocation of a branch is connected.

    Attributes:
        write: w, what each stream gets of the branch's output, [B, S, n].
        mix: M [B, S, n, n]; `None`: the identity.
    """

    write: Tensor
    mix: Tensor | None


def check_streams(initial_gate: float, **counts: int | None) -> None:
    """Shared check of the numbers of streams and of `initial_gate`."""
    for name, value in counts.items():
        if value is not None and value < 2:
            raise ValueError(f"{name}={value!r} must be at least 2 (one stream is type 'none').")
    if not math.isfinite(initial_gate):
        raise ValueError(f"initial_gate={initial_gate!r} must be a finite number.")


def project(streams: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """W v [B, S, outputs] and the mean square of v [B, S, 1], with v the streams [B, S, n, D] side by side."""
    side_by_side = streams.flatten(2)
    # at least fp32: the numbers are few, and 20 roundings of a doubly stochastic matrix in bf16 no longer make one
    exact = torch.promote_types(streams.dtype, torch.float32)
    mean_square = side_by_side.to(exact).square().mean(dim=-1, keepdim=True)
    return F.linear(side_by_side, weight).to(exact), mean_square


def read_from(streams: Tensor, strengths: Tensor) -> Tensor:
    """The sum of the streams [B, S, n, D], each as strongly as `strengths` [B, S, n] say: [B, S, D]."""
    return (strengths.unsqueeze(-1) * streams).sum(dim=2)


class LoopMapping(NamedTuple):
    """How one loop's output joins the streams between the loops.

    Attributes:
        keep: what each stream keeps of itself, in (0, 1), [B, S, n].
        write: what it gets of the core's output, [B, S, n].
        shift: added to that output, [D].
    """

    keep: Tensor
    write: Tensor
    shift: Tensor


class ResidualStreams(Strategy):
    """Abstract choice of residual streams."""

    #: Whether the streams live from the embeddings to the final norm, the loop's state included.
    carried = False

    def connections(self, layer: int, *, in_core: bool) -> nn.ModuleDict | None:
        """The connections of stored layer `layer`, one per branch; `None`: it adds to the one stream."""
        return None

    def spread(self, hidden_states: Tensor, *, in_core: bool) -> Tensor:
        """[B, S, D], or streams of another number -> what the layers of the core, or those around it, run on."""
        return hidden_states

    def carry(self, hidden_states: Tensor) -> Tensor:
        """What the loop works on: streams of the core where they are carried, else [B, S, D] as it is."""
        return self.spread(hidden_states, in_core=True) if self.carried else hidden_states

    def start(self, state: Tensor) -> Tensor:
        """The loop's first state, [B, S, D] or streams -> what the loop works on."""
        return self.carry(state)

    def forward(self, state: Tensor, loop_idx: int) -> tuple[Tensor, Any]:
        """What loop `loop_idx` reads of the state, and what `join_loop` is to know of it."""
        return state, None

    def join_loop(self, state: Tensor, output: Tensor, mapping: Any) -> Tensor:
        """The state after a loop: from the one before it, the loop's output (one stream, or all where they are
        carried), and what `forward` said.
        """
        return output

    def after_loops(self, state: Tensor) -> Tensor:
        """What readout and coda get of the loop's state."""
        return state

    def leave(self, hidden_states: Tensor) -> Tensor:
        """What layers leave behind: the streams where they are carried, else their mean [B, S, D]."""
        return hidden_states if self.carried else self.merge(hidden_states)

    def merge(self, hidden_states: Tensor) -> Tensor:
        """The mean over the streams, [B, S, D]."""
        return hidden_states


@RESIDUAL_STREAMS.register("none")
@final
class OneStream(ResidualStreams):
    """One stream, to which every branch adds."""


@dataclasses.dataclass(frozen=True)
class StreamParams:
    """Parameters that all hyper-connections have.

    Attributes:
        num_streams: n, at least 2.
        core_num_streams: n in the core; `None`: as around it. Where the number grows each stream is copied, where it
            shrinks neighbours are averaged; numbers of which neither divides the other go over the mean of all.
        span: `model`, the streams are carried from the embeddings to the final norm; or `part`, the prelude, each loop
            and the coda each start from copies of one stream and end in the mean, so that the loop's state is one.
        own_loops: loops of the core with connections of their own, of which the last serves all later loops too; 1:
            all loops share one.
        initial_gate: factor of what depends on the token, at initialisation.
    """

    num_streams: int = 4
    core_num_streams: int | None = None
    span: str = "model"
    own_loops: int = 1
    initial_gate: float = 0.01

    def __post_init__(self):
        check_streams(self.initial_gate, num_streams=self.num_streams, core_num_streams=self.core_num_streams)
        if self.span not in ("model", "part"):
            raise ValueError(f"span={self.span!r} must be one of: model, part.")
        if self.own_loops < 1:
            raise ValueError(f"own_loops={self.own_loops!r} must be at least 1.")


class SeveralStreams(ResidualStreams):
    """Abstract hyper-connections: n streams."""

    Params = StreamParams

    def __init__(self, params, context):
        super().__init__(params, context)
        self.carried = params.span == "model"

    @property
    @abstractmethod
    def connection(self) -> type[HyperConnection]:
        """What the type connects a branch by."""

    def num_streams(self, *, in_core: bool) -> int:
        """n, in the core or around it."""
        return (in_core and self.params.core_num_streams) or self.params.num_streams

    def connections(self, layer: int, *, in_core: bool) -> nn.ModuleDict:
        streams, rows = self.num_streams(in_core=in_core), self.params.own_loops if in_core else 1
        width = self.context.layer_shapes[layer].hidden_size
        return nn.ModuleDict({
            branch: self.connection(self.params, self.context, layer, width, streams, rows) for branch in BRANCHES
        })  # fmt: skip

    def spread(self, hidden_states: Tensor, *, in_core: bool) -> Tensor:
        wanted = self.num_streams(in_core=in_core)
        if hidden_states.ndim == 3:
            return hidden_states.unsqueeze(2).expand(-1, -1, wanted, -1)
        held = hidden_states.shape[2]
        if held == wanted:
            return hidden_states
        if wanted % held == 0:
            return hidden_states.repeat_interleave(wanted // held, dim=2)
        if held % wanted == 0:
            return hidden_states.unflatten(2, (wanted, held // wanted)).mean(dim=3)
        return self.spread(self.merge(hidden_states), in_core=in_core)

    def merge(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if hidden_states.ndim == 3 else hidden_states.mean(dim=2)


@RESIDUAL_STREAMS.register("hyper_connections")
@final
class HyperConnections(SeveralStreams):
    r"""Dynamic hyper-connections (arXiv 2409.19606), as Nanbeige4.2's code has them without `enable_mhc`.

    With v the streams side by side [B, S, n D], z = tanh(W v / rms(v) + b) and factors a learned per connection,
    r = a_r z_r + e_k, w = a_w z_w + 1, M = a_M z_M + I, where e_k is stream k = layer mod n. W and b start at zero.
    """

    @property
    def connection(self) -> type[HyperConnection]:
        return DynamicConnection


@RESIDUAL_STREAMS.register("mhc")
@final
class ManifoldHyperConnections(SeveralStreams):
    r"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880), as Nanbeige4.2's code has them.

    With v the streams side by side [B, S, n D] and h = a (W v / rms(v)) + b, r = \sigma(h_r), w = 2 \sigma(h_w) and M
    the doubly stochastic matrix that `sinkhorn_iterations` rounds of normalising rows, then columns make of
    exp(h_M). Read and write are bounded and the mix neither grows nor shrinks the sum of the streams, however many
    layers and loops follow each other. W starts at zero and b such that layer l reads stream l mod n and all streams
    get its output, so that the model starts as the one with one stream, but for the last digits of \sigma.
    """

    @dataclasses.dataclass(frozen=True)
    class Params(StreamParams):
        """Attributes:
        num_streams: as for hyper_connections.
        core_num_streams: as for hyper_connections.
        span: as for hyper_connections.
        own_loops: as for hyper_connections.
        initial_gate: as for hyper_connections.
        mixing: `sinkhorn`, or `identity`: the streams are not mixed.
        sinkhorn_iterations: rounds of normalisation.
        initial_logit: how far b decides at initialisation (Nanbeige starts at 20, where sigmoids hardly learn).
        """

        mixing: str = "sinkhorn"
        sinkhorn_iterations: int = 20
        initial_logit: float = 4.0

        def __post_init__(self):
            super().__post_init__()
            if self.mixing not in ("sinkhorn", "identity"):
                raise ValueError(f"mixing={self.mixing!r} must be one of: sinkhorn, identity.")
            if self.sinkhorn_iterations < 1:
                raise ValueError(f"sinkhorn_iterations={self.sinkhorn_iterations!r} must be at least 1.")
            if not math.isfinite(self.initial_logit):
                raise ValueError(f"initial_logit={self.initial_logit!r} must be a finite number.")

    @property
    def connection(self) -> type[HyperConnection]:
        return ManifoldConnection


@RESIDUAL_STREAMS.register("hyperloop")
@final
class HyperloopStreams(ResidualStreams):
    r"""Streams between the loops: each loop reads one state from all of them, and all take up its output (Hyperloop
    Transformers, arXiv 2604.21254).

    With X the streams, v all of them side by side [B, S, n D], t the loop and h = a_t (W_t v / rms(v)) + b_t, where
    read, write and keep each have a factor a_t, n rows of W_t and n biases,

        X_i <- \sigma(h_keep)_i X_i + 2 \sigma(h_write)_i (F(\sum_j \sigma(h_read)_j X_j) + c_t),

    where F is a loop of the core, injection included, and c_t a vector. Coda or final norm get the mean. W and c start
    at zero, and b such that a loop reads the mean and stream i keeps (i + 1/2) / n of itself and takes the rest from
    the output: a moving average over loops, each stream with a memory of its own, which is bounded if F is. A loop's
    output includes what it read, so that the streams would grow with the loops if all kept everything.
    """

    @dataclasses.dataclass(frozen=True)
    class Params:
        """Attributes:
        num_streams: n, at least 2.
        table_loops: loops with connections of their own (`None`: the config's `num_loops`).
        initial_gate: a at initialisation, the factor of what depends on the token.
        """

        num_streams: int = 4
        table_loops: int | None = None
        initial_gate: float = 0.01

        def __post_init__(self):
            check_streams(self.initial_gate, num_streams=self.num_streams)
            check_table_loops(self.table_loops)

    def __init__(self, params, context):
        super().__init__(params, context)
        n, rows, width = params.num_streams, params.table_loops, context.hidden_size
        self.weight = nn.Parameter(torch.empty(rows, 3 * n, n * width))
        self.bias = nn.Parameter(torch.empty(rows, 3 * n))
        self.gate = nn.Parameter(torch.empty(rows, 3))
        self.shift = nn.Parameter(torch.empty(rows, width))

    def init_weights(self) -> None:
        n = self.params.num_streams
        keep = (torch.arange(n) + 0.5) / n
        start = torch.logit(torch.cat((torch.full((n,), 1.0 / n), (1.0 - keep) / 2.0, keep)))
        init.zeros_(self.weight)
        init.zeros_(self.shift)
        init.copy_(self.bias, start.expand_as(self.bias))
        init.constant_(self.gate, self.params.initial_gate)

    def start(self, state: Tensor) -> Tensor:
        return state.unsqueeze(2).expand(-1, -1, self.params.num_streams, -1) if state.ndim == 3 else state

    def forward(self, state: Tensor, loop_idx: int) -> tuple[Tensor, LoopMapping]:
        n, row = self.params.num_streams, table_row(loop_idx, self.params.table_loops)
        projected, mean_square = project(state, self.weight[row])
        gate = self.gate[row].to(projected.dtype).repeat_interleave(n)
        logits = gate * projected * torch.rsqrt(mean_square + EPSILON) + self.bias[row].to(projected.dtype)
        read, write, keep = torch.sigmoid(logits).to(state.dtype).split(n, dim=-1)
        return read_from(state, read), LoopMapping(keep, 2.0 * write, self.shift[row].to(state.dtype))

    def join_loop(self, state: Tensor, output: Tensor, mapping: LoopMapping) -> Tensor:
        # the loop may have ended on another device than it read the state on
        state, keep, write, shift = (part.to(output.device) for part in (state, *mapping))
        return keep.unsqueeze(-1) * state + write.unsqueeze(-1) * (output + shift).unsqueeze(2)

    def after_loops(self, state: Tensor) -> Tensor:
        return state.mean(dim=2)


class HyperConnection(SelfInitialised, ABC):
    """Abstract connection of one branch of one layer.

    Args:
        params: of the type.
        context: of the model.
        layer: number of the stored layer.
        width: D.
        streams: n.
        rows: loops with parameters of their own; every parameter has so many rows.
    """

    def __init__(self, params: Any, context: BuildContext, layer: int, width: int, streams: int, rows: int):
        super().__init__()
        self.params, self.context = params, context
        self.streams, self.rows, self.home = streams, rows, layer % streams
        self.mixes = getattr(params, "mixing", None) != "identity"
        outputs = streams * (streams + 2) if self.mixes else 2 * streams
        self.weight = nn.Parameter(torch.empty(rows, outputs, streams * width))
        self.bias = nn.Parameter(torch.empty(rows, outputs))
        self.gate = nn.Parameter(torch.empty(rows, 3 if self.mixes else 2))

    def init_weights(self) -> None:
        init.zeros_(self.weight)
        init.copy_(self.bias, self.initial_bias().expand_as(self.bias))
        init.constant_(self.gate, self.params.initial_gate)

    @abstractmethod
    def initial_bias(self) -> Tensor:
        """Biases [outputs] at initialisation."""

    @abstractmethod
    def mappings(self, projected: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read [B, S, n], write [B, S, n] and mix [B, S, n, n] (`None`: the identity), all fp32.

        Args:
            projected: W v / rms(v), fp32 [B, S, outputs]: n to read, n to write, n * n to mix, if they do.
            gate: factors, fp32 [3 or 2].
            bias: fp32 [outputs].
        """

    def forward(self, streams: Tensor, loop_idx: int) -> tuple[Tensor, Mapping]:
        """X [B, S, n, D] in loop `loop_idx` -> what the branch reads, [B, S, D], and how its output is written."""
        row = table_row(loop_idx, self.rows)
        projected, mean_square = project(streams, self.weight[row])
        exact, kind = projected.dtype, streams.dtype
        projected = projected * self.inverse_rms(mean_square)
        read, write, mix = self.mappings(projected, self.gate[row].to(exact), self.bias[row].to(exact))
        return read_from(streams, read.to(kind)), Mapping(write.to(kind), None if mix is None else mix.to(kind))

    @abstractmethod
    def inverse_rms(self, mean_square: Tensor) -> Tensor:
        """1 / rms(v) from the mean of the squares."""

    def matrix(self, flat: Tensor) -> Tensor:
        """[B, S, n * n] -> [B, S, n, n]."""
        return flat.unflatten(-1, (self.streams, self.streams))

    def extra_repr(self) -> str:
        return f"streams={self.streams}, rows={self.rows}"


@final
class DynamicConnection(HyperConnection):
    """See `HyperConnections`."""

    def initial_bias(self) -> Tensor:
        return torch.zeros(self.bias.shape[-1])

    def inverse_rms(self, mean_square: Tensor) -> Tensor:
        return torch.rsqrt(mean_square + EPSILON)

    def mappings(self, projected: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        n, device = self.streams, projected.device
        values = torch.tanh(projected + bias)
        read = gate[0] * values[..., :n] + (torch.arange(n, device=device) == self.home)
        write = gate[1] * values[..., n : 2 * n] + 1.0
        mix = gate[2] * self.matrix(values[..., 2 * n :]) + torch.eye(n, device=device)
        return read, write, mix


@final
class ManifoldConnection(HyperConnection):
    """See `ManifoldHyperConnections`."""

    def initial_bias(self) -> Tensor:
        n, logit = self.streams, self.params.initial_logit
        read = torch.full((n,), -logit)
        read[self.home] = logit
        parts = [read, torch.zeros(n)]
        if self.mixes:
            parts.append((logit * (2.0 * torch.eye(n) - 1.0)).flatten())
        return torch.cat(parts)

    def inverse_rms(self, mean_square: Tensor) -> Tensor:
        # of zeros the root has no gradient; the least positive number in its place changes no result
        return 1.0 / (mean_square.clamp_min(torch.finfo(mean_square.dtype).tiny).sqrt() + EPSILON)

    def mappings(self, projected: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        n = self.streams
        read = torch.sigmoid(gate[0] * projected[..., :n] + bias[:n])
        write = 2.0 * torch.sigmoid(gate[1] * projected[..., n : 2 * n] + bias[n : 2 * n])
        if not self.mixes:
            return read, write, None
        logits = self.matrix(gate[2] * projected[..., 2 * n :] + bias[2 * n :])
        return read, write, sinkhorn(logits, self.params.sinkhorn_iterations)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """exp(logits) [..., n, n], its rows and then its columns normalised to one, `iterations` times (Sinkhorn and Knopp
    1967): nearly doubly stochastic, its columns exactly.
    """
    matrix = torch.exp(logits - logits.detach().amax(dim=-1, keepdim=True))  # a row's factor has no effect
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp_min(EPSILON)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True).clamp_min(EPSILON)
    return matrix


def join(residual: Tensor, branch: Tensor, mapping: Mapping | None) -> Tensor:
    """What follows a branch: the residual stream [B, S, D] plus its output [B, S, D]; or, where there are several,
    the mixed streams [B, S, n, D] plus each one's share of it.
    """
    if mapping is None:
        return residual + branch
    mixed = residual if mapping.mix is None else mapping.mix @ residual
    return mixed + mapping.write.unsqueeze(-1) * branch.unsqueeze(2)


__all__ = ["BRANCHES", "RESIDUAL_STREAMS", "LoopMapping", "Mapping", "ResidualStreams", "join"]
