"""A looped language model in its plainest form: what every fast path must equal.

Pure functions over a state dict and a config, written from the equations in `LoopedConfig` and the papers' notation,
for one sequence and one head at a time, with every loop unrolled, masks as truth tables, no cache and no kernels.

S tokens, D hidden size, K head dim, T loops, t a loop counted from 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_looped import LoopedConfig
from modeling_looped.state import keyed_uniform

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
}


class Trace(NamedTuple):
    """What one forward saw.

    Attributes:
        hidden: the head's input [S, D].
        states: the state before the first loop and after each one, T + 1 tensors [S, D].
        exit_loops: loops after which each token is read [S]; `None` where the last loop is read.
        slots: keys and values [heads, S, K] of every attention invocation, in the order of execution.
    """

    hidden: Tensor
    states: list[Tensor]
    exit_loops: Tensor | None
    slots: list[tuple[Tensor, Tensor]]


def reference_logits(weights: dict[str, Tensor], config: LoopedConfig, tokens: Tensor, **options) -> Tensor:
    """Logits [S, vocabulary] of one sequence of token ids [S]; `options` as for `reference_trace`."""
    hidden = reference_trace(weights, config, tokens, **options).hidden
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = config.logit_scale * (hidden @ head.T)
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def reference_trace(
    weights: dict[str, Tensor],
    config: LoopedConfig,
    tokens: Tensor,
    *,
    num_loops: int | None = None,
    positions: Tensor | None = None,
    backprop_loops: int | None = None,
    training: bool = False,
) -> Trace:
    """Run one sequence of token ids [S].

    Args:
        weights: a model's named parameters.
        num_loops: T; `None`: the config's.
        positions: position of every token [S]; `None`: 0, 1, 2, …
        backprop_loops: the last so many loops keep a graph; `None`: all.
        training: whether the choice of a loop passes the gate's gradient straight through.
    """
    w = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    T = config.num_loops if num_loops is None else num_loops
    P, R, C = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
    positions = torch.arange(len(tokens)) if positions is None else positions
    rope = rope_angles(config, positions)
    slots: list[tuple[Tensor, Tensor]] = []

    def run(x: Tensor, layers: range, t: int = 0) -> Tensor:
        for layer in layers:
            x = block(w, config, layer, t, x, rope, slots)
        return x

    def final_norm(x: Tensor) -> Tensor:
        return rms_norm(x, w["norm.weight"], config.rms_norm_eps)

    x = run(config.embedding_scale * w["embed_tokens.weight"][tokens], range(P))
    states: list[Tensor] = []
    exit_loops = None
    if R > 0:
        e = rms_norm(x, w["prelude_norm.weight"], config.rms_norm_eps) if config.prelude_norm else x
        s = initial_state(config, e, positions)
        states.append(s)
        for t in range(T):
            y = run(condition(w, config, t, inject(w, config, s, e)), range(P, P + R), t)
            s = update(w, config, t, T, s, y)
            if config.final_norm == "every_loop":
                s = final_norm(s)
            if backprop_loops is not None and t < T - backprop_loops:
                s = s.detach()
            states.append(s)
        x, exit_loops = halt(w, config, states, training)
        if config.readout["type"] == "linear":
            x = x @ w["readout.weight"].T
        if config.final_norm == "after_loops":
            x = final_norm(x)
    x = run(x, range(P + R, P + R + C))
    state_is_normed = R > 0 and C == 0 and config.final_norm == "every_loop"
    return Trace(x if state_is_normed else final_norm(x), states, exit_loops, slots)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def initial_state(config: LoopedConfig, e: Tensor, positions: Tensor) -> Tensor:
    """s_0: the prelude output, zeros, or a normal truncated at three standard deviations."""
    spec = config.state_init
    if spec["type"] == "input":
        return e
    if spec["type"] == "zeros":
        return torch.zeros_like(e)
    uniform = keyed_uniform(spec["seed"], positions[None], e.shape[-1])[0].double()
    low, high = (torch.special.ndtr(torch.tensor(cut, dtype=torch.float64)) for cut in (-3.0, 3.0))
    return (spec["std"] * torch.special.ndtri(low + uniform * (high - low))).to(e.dtype)


def inject(w: dict[str, Tensor], config: LoopedConfig, s: Tensor, e: Tensor) -> Tensor:
    """x_t from the state s and the prelude output e."""
    spec = config.injection
    if spec["type"] == "none":
        return s
    if spec["type"] == "add":
        return s + e
    if spec["type"] == "concat":
        return torch.cat((s, e), dim=-1) @ w["injection.weight"].T
    A = -torch.exp(w["injection.A_log"])
    step = torch.log(1 + torch.exp(w["injection.dt_bias"]))
    decay = torch.exp(step * A)
    gain = step if spec["input_matrix"] == "euler" else (decay - 1) / A
    return decay * s + gain * (e @ w["injection.B"].T)


def condition(w: dict[str, Tensor], config: LoopedConfig, t: int, x: Tensor) -> Tensor:
    """The core's input in loop t."""
    spec = config.loop_conditioning
    if spec["type"] == "embedding":
        return x + last_row(w["loop_conditioning.embedding"], t)
    if spec["type"] == "sinusoidal":
        half = config.hidden_size // 2
        signal = torch.zeros(config.hidden_size)
        for k in range(half):
            angle = t * math.exp(-k * math.log(1e4) / max(half - 1, 1))
            signal[k], signal[half + k] = math.sin(angle), math.cos(angle)
        return x + spec["scale"] * signal
    return x


def update(w: dict[str, Tensor], config: LoopedConfig, t: int, T: int, s: Tensor, y: Tensor) -> Tensor:
    """The next state from the state s and the core's output y."""
    spec = config.loop_update
    if spec["type"] == "replace":
        return y
    if spec["type"] == "damped":
        K = T if spec["steps"] is None else spec["steps"]
        return (1 - 1 / K) * s + (1 / K) * y
    if spec["type"] == "learned_scale":
        return s + last_row(w["loop_update.scale"], t) * (y - s)
    g = 1.0 if t < spec["free_loops"] else 1 / (1 + torch.exp(-w["loop_update.gate"]))
    return s + g * (y - s)


def halt(
    w: dict[str, Tensor], config: LoopedConfig, states: list[Tensor], training: bool
) -> tuple[Tensor, Tensor | None]:
    """What is read from the states, token by token, and after which loop."""
    spec, T = config.halting, len(states) - 1
    if spec["type"] == "none":
        return states[-1], None
    read, exits = [], []
    for token in range(len(states[0])):
        s = [state[token] for state in states]
        if spec["type"] == "state_change":
            still = [t for t in range(1, T) if t >= spec["min_loops"]
                     and torch.norm(s[t] - s[t - 1]) <= spec["threshold"] * torch.norm(s[t])]  # fmt: skip
            exits.append(min([*still, T]))
            read.append(s[exits[-1]])
            continue
        stop = [torch.sigmoid(x @ w["halting.weight"][0] + w["halting.bias"][0]) for x in s]
        if spec["type"] == "gate":
            survival, p = torch.tensor(1.0), []
            for t in range(1, T):
                p.append(stop[t] * survival)
                survival = survival * (1 - stop[t])
            p.append(survival)
            reached = [t for t in range(1, T) if spec["threshold"] < 1 and sum(p[:t]) >= spec["threshold"]]
            exits.append(min([*reached, T]))
            mixture = sum(weight * state for weight, state in zip(p, s[1:], strict=True))
            if spec["output"] == "expected":
                read.append(mixture)
            elif training:
                constant = sum(weight.detach() * state for weight, state in zip(p, s[1:], strict=True))
                read.append(s[exits[-1]] + mixture - constant)
            else:
                read.append(s[exits[-1]])
        else:
            total, output, t = torch.tensor(0.0), torch.zeros_like(s[0]), 1
            while t < T and total + stop[t - 1] <= spec["threshold"]:  # the state that enters loop t decides
                output = output + stop[t - 1] * s[t]
                total = total + stop[t - 1]
                t += 1
            read.append(output + (1 - total) * s[t])
            exits.append(t)
    return torch.stack(read), torch.tensor(exits)


def last_row(table: Tensor, t: int) -> Tensor:
    """Loop t's row of a table with one row per loop; loops beyond it share the last one."""
    return table[t] if t < len(table) else table[-1]


def block(
    w: dict[str, Tensor],
    config: LoopedConfig,
    layer: int,
    t: int,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    slots: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """One layer on the residual stream x [S, D], in loop t."""
    prefix = f"layers.{layer}."

    def norm(name: str, branch: Tensor) -> Tensor:
        return rms_norm(branch, loop_weight(w, prefix + name, t), config.rms_norm_eps)

    def place(x: Tensor, f, before: str, after: str) -> Tensor:
        if config.norm_placement == "pre":
            return x + f(norm(before, x))
        if config.norm_placement == "sandwich":
            return x + norm(after, f(norm(before, x)))
        if config.norm_placement == "sandwich_sum":
            return norm(after, x + f(norm(before, x)))
        if config.norm_placement == "post":
            return norm(after, x + f(x))
        return x + norm(after, f(x))

    def attend(branch: Tensor) -> Tensor:
        return attention(w, config, layer, t, branch, rope, slots)

    def feed(branch: Tensor) -> Tensor:
        act = ACTIVATIONS[config.hidden_act]
        wide = project(w, config, prefix + "mlp.", "up_proj", t, branch)
        if config.mlp_type == "gated":
            wide = act(project(w, config, prefix + "mlp.", "gate_proj", t, branch)) * wide
        else:
            wide = act(wide)
        return project(w, config, prefix + "mlp.", "down_proj", t, wide)

    x = place(x, attend, "input_layernorm", "post_attention_layernorm")
    return place(x, feed, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def loop_weight(w: dict[str, Tensor], name: str, t: int) -> Tensor:
    """A norm's weight: one vector, or loop t's row where every loop has its own."""
    weight = w[name + ".weight"]
    return weight if weight.ndim == 1 else last_row(weight, t)


def project(w: dict[str, Tensor], config: LoopedConfig, prefix: str, name: str, t: int, x: Tensor) -> Tensor:
    """A shared projection in loop t: x (W + alpha/r B_t A_t)^T + b."""
    weight = w[f"{prefix}{name}.weight"]
    if f"{prefix}loop_adapters.{name}.A" in w:
        spec = config.loop_adapter
        alpha = spec["rank"] if spec["alpha"] is None else spec["alpha"]
        A = last_row(w[f"{prefix}loop_adapters.{name}.A"], t)
        B = last_row(w[f"{prefix}loop_adapters.{name}.B"], t)
        weight = weight + alpha / spec["rank"] * (B @ A)
    output = x @ weight.T
    bias = w.get(f"{prefix}{name}.bias")
    return output if bias is None else output + bias


def attention(
    w: dict[str, Tensor],
    config: LoopedConfig,
    layer: int,
    t: int,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    slots: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Grouped-query attention of one layer over one sequence x [S, D]."""
    prefix, K = f"layers.{layer}.self_attn.", config.head_dim
    q, k, v = (project(w, config, prefix, f"{name}_proj", t, x) for name in "qkv")
    eps = config.rms_norm_eps
    if config.qk_norm == "flat":
        q = rms_norm(q, loop_weight(w, prefix + "q_norm", t), eps)
        k = rms_norm(k, loop_weight(w, prefix + "k_norm", t), eps)
    queries, keys, values = (list(projected.split(K, dim=-1)) for projected in (q, k, v))
    if config.qk_norm == "per_head":
        queries = [rms_norm(head, loop_weight(w, prefix + "q_norm", t), eps) for head in queries]
        keys = [rms_norm(head, loop_weight(w, prefix + "k_norm", t), eps) for head in keys]
    queries, keys = [rotate(head, *rope) for head in queries], [rotate(head, *rope) for head in keys]
    slots.append((torch.stack(keys), torch.stack(values)))

    visible = visibility(config, layer, len(x))
    heads_per_key = config.num_attention_heads // config.num_key_value_heads
    attended = []
    for head, query in enumerate(queries):
        key, value = keys[head // heads_per_key], values[head // heads_per_key]
        scores = (query @ key.T / math.sqrt(K)).masked_fill(~visible, -math.inf)
        attended.append(torch.softmax(scores, dim=-1) @ value)
    return project(w, config, prefix, "o_proj", t, torch.cat(attended, dim=-1))


def visibility(config: LoopedConfig, layer: int, length: int) -> Tensor:
    """Truth table [S, S]: whether token i (row) sees token j (column).

    A causal window of n is the token itself and the n - 1 before it; a bidirectional one reaches n tokens either way.
    """
    types = config.stored_layer_types
    sliding = types[layer] == "sliding_attention" if types is not None else config.sliding_window is not None
    visible = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if config.is_causal:
                visible[i, j] = j <= i and (not sliding or i - j < config.sliding_window)
            else:
                visible[i, j] = not sliding or abs(i - j) <= config.sliding_window
    return visible


def rope_angles(config: LoopedConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, rotated pairs] of every token's rotation.

    The frequencies of the scaled types come from Transformers' own formulas, for a sequence as long as this one.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        rotated = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        frequencies = torch.tensor([rope["rope_theta"] ** (-2 * i / rotated) for i in range(rotated // 2)])
        scaling = 1.0
    else:
        formula = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, scaling = formula(config, seq_len=int(positions.max()) + 1)
    angles = positions[:, None] * frequencies
    return scaling * torch.cos(angles), scaling * torch.sin(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+n}) of the first 2n channels of one head [S, K]; the others pass."""
    n = cos.shape[-1]
    first, second, rest = x[:, :n], x[:, n : 2 * n], x[:, 2 * n :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
