"""A looped language model in its plainest form: what every fast path must equal.

Pure functions over a state dict and a config, written from the equations in `LoopedConfig` and the papers' notation,
for one sequence and one head at a time, with every loop unrolled, masks as truth tables, no cache and no kernels.

S tokens, D hidden size, K head dim, T loops, t a loop counted from 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from reference_streams import carried, connect, connect_loop, copies, merge, spread
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_looped import LoopedConfig
from modeling_looped.state import keyed_uniform

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: (x * (x > 0)) ** 2,
    "half_relu2": lambda x: (x * (x > 0)) ** 2 / 2,
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
}


class Trace(NamedTuple):
    """What one forward saw.

    Attributes:
        hidden: the head's input [S, D].
        states: the state before the first loop and after each one, T + 1 tensors [S, D] (or [S, n, D]).
        exit_loops: loops after which each token is read [S]; `None` where the last loop is read.
        exit_probabilities: each token's distribution of exits over the loops [S, T]; `None` as above.
        slots: keys and values [heads, S, K] of every attention invocation that makes its own, in the order of
            execution.
    """

    hidden: Tensor
    states: list[Tensor]
    exit_loops: Tensor | None
    exit_probabilities: Tensor | None
    slots: list[tuple[Tensor, Tensor]]


class Run(NamedTuple):
    """What all layers of one forward read: the arguments of `block` that do not change within it.

    Attributes:
        w, config, tokens: as `reference_trace` was given them.
        rope: of the positions; `None`: no rotation.
        slots: as in `Trace`, in the making.
        anchors: with depth attention, keys and values [heads, S, K] of its anchors so far.
        held: where loops share keys and values, those of each core layer's first loop.
        encoded: output of an encoder [E, D of the encoder]; `None`: there is none.
    """

    w: dict[str, Tensor]
    config: LoopedConfig
    tokens: Tensor
    rope: tuple[Tensor, Tensor] | None
    slots: list[tuple[Tensor, Tensor]]
    anchors: list[tuple[Tensor, Tensor]]
    held: dict[int, tuple[Tensor, Tensor]]
    encoded: Tensor | None = None


def reference_logits(weights: dict[str, Tensor], config: LoopedConfig, tokens: Tensor, **options) -> Tensor:
    """Logits [S, vocabulary] of one sequence of token ids [S]; `options` as for `reference_trace`."""
    hidden = reference_trace(weights, config, tokens, **options).hidden
    if not config.is_causal and config.mlm_head == "transform":
        dense = hidden @ weights["head_transform.dense.weight"].T + weights["head_transform.dense.bias"]
        hidden = norm(weights, config, "head_transform.norm", ACTIVATIONS[config.hidden_act](dense))
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = config.logit_scale * (hidden @ head.T + weights.get("lm_head.bias", 0.0))
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def reference_trace(
    weights: dict[str, Tensor],
    config: LoopedConfig,
    tokens: Tensor,
    *,
    num_loops: int | None = None,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    backprop_loops: int | None = None,
    training: bool = False,
    encoded: Tensor | None = None,
    depths: Tensor | None = None,
) -> Trace:
    """Run one sequence of token ids [S].

    Args:
        weights: a model's named parameters.
        num_loops: T; `None`: the config's.
        positions: position of every token [S]; `None`: 0, 1, 2, …
        token_types: type of every token [S]; `None`: 0.
        backprop_loops: the last so many loops keep a graph; `None`: all.
        depths: loops that each token takes [S], after which it keeps its state; `None`: T, all of them.
        training: whether the choice of a loop passes the gate's gradient straight through.
        encoded: output of an encoder [E, D of the encoder], for a decoder.
    """
    w = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    T = config.num_loops if num_loops is None else num_loops
    T = T if depths is None else int(depths.max())
    own = torch.as_tensor(T if depths is None else depths)
    P, R, C = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
    positions = torch.arange(len(tokens)) if positions is None else positions
    rope = rope_angles(config, positions) if config.position_embedding == "rope" else None
    run = Run(w, config, tokens, rope, [], [], {}, encoded)

    def layers(x: Tensor, indices: range, t: int = 0) -> Tensor:
        if len(indices) > 0:
            x = spread(config, x, in_core=indices[0] in range(P, P + R))
            for layer in indices:
                x = block(run, layer, t, x)
        return x if carried(config) else merge(x)

    def final_norm(x: Tensor) -> Tensor:
        return x if config.final_norm == "none" else norm(w, config, "norm", x)

    x = layers(embed(w, config, tokens, positions, token_types), range(P))
    states: list[Tensor] = []
    exit_loops = exit_probabilities = None
    if R > 0:
        x = spread(config, x, in_core=True) if carried(config) else x
        e = norm(w, config, "prelude_norm", x) if config.prelude_norm else x
        s = initial_state(config, e, positions)
        s = copies(config, spread(config, s, in_core=True) if carried(config) else s)
        states.append(s)
        inputs: list[Tensor] = []
        first_anchor = len(run.anchors)
        G = config.core_group_size or R
        for first in range(P, P + R, G):
            for t in range(T):
                entering, join_loop = connect_loop(w, config, t, s)
                inputs.append(condition(w, config, t, positions, inject(w, config, t, entering, e)))
                y = layers(inputs[-1], range(first, first + G), t)
                after = join_loop(update(w, config, t, per_token(own, s), s, y, (first - P) // G))
                if config.final_norm == "every_loop":
                    after = final_norm(after)
                s = torch.where(t < per_token(own, s), after, s)
                if backprop_loops is not None and t < own.max() - backprop_loops:
                    s = torch.where(t < per_token(own, s) - backprop_loops, s.detach(), s)
                    run.anchors[first_anchor:] = [(k.detach(), v.detach()) for k, v in run.anchors[first_anchor:]]
                    for layer, shared in run.held.items():
                        run.held[layer] = (shared[0].detach(), shared[1].detach())
                states.append(s)
        x, exit_loops, exit_probabilities = halt(w, config, states, inputs, training)
        x = merge(x) if config.residual_streams["type"] == "hyperloop" else x
        if config.readout["type"] == "linear":
            x = x @ w["readout.weight"].T + w.get("readout.bias", 0.0)
        if config.final_norm == "after_loops":
            x = final_norm(x)
    x = merge(layers(x, range(P + R, P + R + C)))
    state_is_normed = R > 0 and C == 0 and config.final_norm == "every_loop"
    return Trace(x if state_is_normed else final_norm(x), states, exit_loops, exit_probabilities, run.slots)


def embed(
    w: dict[str, Tensor], config: LoopedConfig, tokens: Tensor, positions: Tensor, token_types: Tensor | None
) -> Tensor:
    """The prelude's input [S, D]."""
    x = config.embedding_scale * ngrams(w, config, tokens, w["embed_tokens.weight"][tokens])
    if config.type_vocab_size > 0:
        x = x + w["token_type_embeddings.weight"][torch.zeros_like(tokens) if token_types is None else token_types]
    if config.position_embedding == "learned":
        x = x + w["position_embeddings.weight"][positions]
    if config.embedding_norm:
        x = norm(w, config, "embedding_norm", x)
    if config.embedding_size is not None:
        x = x @ w["embedding_projection.weight"].T
        if config.embedding_projection_bias:
            x = x + w["embedding_projection.bias"]
    return x


def ngrams(w: dict[str, Tensor], config: LoopedConfig, tokens: Tensor, x: Tensor) -> Tensor:
    """Token embeddings x [S, D] with those of the n-grams that end in each token."""
    spec, fused = config.ngram_embedding, []
    if spec["type"] == "none":
        return x
    per_n = len(spec["table_sizes"]) // (spec["max_n"] - 1)
    for s in range(len(tokens)):
        rows = []
        for i, size in enumerate(spec["table_sizes"]):
            hashed, n = int(tokens[s]), i // per_n + 2
            for j in range(1, n):
                if s - j < 0 or int(tokens[s - j]) == spec["boundary_token_id"]:
                    break
                hashed += spec["hash_base"] ** j * int(tokens[s - j])
            rows.append(w[f"ngram_embedding.tables.{i}.weight"][hashed % size])
        if spec["fusion"] == "concat":
            fused.append(x[s] + w["ngram_embedding.projections.0.weight"] @ torch.cat(rows))
        else:
            parts = [w[f"ngram_embedding.projections.{i}.weight"] @ row for i, row in enumerate(rows)]
            fused.append((x[s] + sum(parts)) / (1 + len(rows)))
    return torch.stack(fused)


def norm(w: dict[str, Tensor], config: LoopedConfig, name: str, x: Tensor, t: int = 0) -> Tensor:
    """The norm called `name`, of the config's type, over the last axis; in loop t, if every loop has its own."""
    eps, D = config.rms_norm_eps, x.shape[-1]
    if config.norm_type == "rms":
        return rms_norm(x, loop_weight(w, name, t), eps)
    if config.norm_type == "rms_unweighted":
        return rms_norm(x, torch.ones(()), eps)
    centred = x - x.sum(-1, keepdim=True) / D
    squares = (centred**2).sum(-1, keepdim=True)
    if config.norm_type == "layer":
        normed = centred / torch.sqrt(squares / D + eps)
    else:
        normed = centred / (torch.sqrt(squares / (D - 1)) + eps)
    return loop_weight(w, name, t) * normed + loop_weight(w, name, t, "bias")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def initial_state(config: LoopedConfig, e: Tensor, positions: Tensor) -> Tensor:
    """s_0: the prelude output, zeros, a normal cut at some standard deviations, or one of mean 0 and deviation 1."""
    spec, D = config.state_init, config.core_hidden_size or config.hidden_size
    if spec["type"] == "input":
        return e
    if spec["type"] == "zeros":
        return torch.zeros(len(e), D, dtype=e.dtype)
    uniform = keyed_uniform(spec["seed"], positions[None], D)[0].double()
    if spec["type"] == "unit_normal":
        z = torch.special.ndtri(uniform)
        centred = z - z.mean(-1, keepdim=True)
        return (centred / torch.sqrt((centred**2).sum(-1, keepdim=True) / (D - 1))).to(e.dtype)
    cut = math.inf if spec["truncation"] is None else spec["truncation"]
    low, high = (torch.special.ndtr(torch.tensor(side, dtype=torch.float64)) for side in (-cut, cut))
    return (spec["std"] * torch.special.ndtri(low + uniform * (high - low))).to(e.dtype)


def inject(w: dict[str, Tensor], config: LoopedConfig, t: int, s: Tensor, e: Tensor) -> Tensor:
    """x_t from the state s and the prelude output e."""
    spec = config.injection
    if spec["type"] == "none":
        return s
    if spec["type"] == "add":
        return s + e
    if spec["type"] == "concat":
        if spec["first_loop"] == "skip" and t == 0:
            return e
        return torch.cat((s, e), dim=-1) @ w["injection.weight"].T + w.get("injection.bias", 0.0)
    A = -torch.exp(w["injection.A_log"])
    step = torch.log(1 + torch.exp(w["injection.dt_bias"]))
    decay = torch.exp(step * A)
    gain = step if spec["input_matrix"] == "euler" else (decay - 1) / A
    return decay * s + gain * (e @ w["injection.B"].T)


def condition(w: dict[str, Tensor], config: LoopedConfig, t: int, positions: Tensor, x: Tensor) -> Tensor:
    """The core's input in loop t."""
    spec = config.loop_conditioning
    if spec["type"] == "embedding":
        return x + last_row(w["loop_conditioning.embedding"], t)
    if spec["type"] == "sinusoidal":
        signal = time_signal(float(t), x.shape[-1]).expand(len(x), -1)
        if spec["positions"] == "every_loop":
            signal = signal + torch.stack([time_signal(float(i), x.shape[-1]) for i in positions])
        signal = signal.reshape(len(x), *[1] * (x.ndim - 2), -1)
        return x + spec["scale"] * signal
    return x


def time_signal(time: float, channels: int) -> Tensor:
    """[sin(time w) | cos(time w)], an odd last channel left at zero; of a loop or of a position."""
    half = channels // 2
    signal = torch.zeros(channels)
    for k in range(half):
        angle = time * math.exp(-k * math.log(1e4) / max(half - 1, 1))
        signal[k], signal[half + k] = math.sin(angle), math.cos(angle)
    return signal


def per_token(values: Tensor, s: Tensor) -> Tensor:
    """One number for all tokens, or one for each [S], to go with the state s [S, D], or streams [S, n, D]."""
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (s.ndim - 1))


def update(
    w: dict[str, Tensor], config: LoopedConfig, t: int, T: int | Tensor, s: Tensor, y: Tensor, group: int
) -> Tensor:
    """The next state from the state s and the output y of a group of the core, of T loops, or as many for each token
    [S, 1].
    """
    spec = config.loop_update
    if spec["type"] == "replace":
        return y
    if spec["type"] == "recursion_encoding":
        return last_row(w["loop_update.encoding"], t)[group] * y
    if spec["type"] == "damped":
        K = T if spec["steps"] is None else spec["steps"]
        return (1 - 1 / K) * s + (1 / K) * y
    if spec["type"] == "learned_scale":
        return s + last_row(w["loop_update.scale"], t) * (y - s)
    g = 1.0 if t < spec["free_loops"] else 1 / (1 + torch.exp(-w["loop_update.gate"]))
    return s + g * (y - s)


def halt(
    w: dict[str, Tensor], config: LoopedConfig, states: list[Tensor], inputs: list[Tensor], training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is read from the states, token by token; after which loop; and the distribution of exits [S, T].

    `inputs` are what entered the core in each loop.
    """
    spec, T = config.halting, len(states) - 1
    if spec["type"] == "none":
        return states[-1], None, None
    read, exits, probabilities = [], [], []
    for token in range(len(states[0])):
        s = [state[token] for state in states]
        if spec["type"] == "state_change":
            still = [t for t in range(1, T) if t >= spec["min_loops"]
                     and torch.norm(s[t] - s[t - 1]) <= spec["threshold"] * torch.norm(s[t])]  # fmt: skip
            exits.append(min([*still, T]))
            read.append(s[exits[-1]])
            probabilities.append(torch.tensor([float(t == exits[-1]) for t in range(1, T + 1)]))
            continue
        gated = [x[token] for x in inputs] if spec.get("form") == "universal" else s
        stop = [torch.sigmoid(x @ w["halting.weight"][0] + w["halting.bias"][0]) for x in gated]
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
            probabilities.append(torch.stack(p))
        elif spec["form"] == "graves":
            p, t = [], 1
            while t < T and sum(p) + stop[t - 1] <= spec["threshold"]:  # the state that enters loop t decides
                p.append(stop[t - 1])
                t += 1
            p.append(torch.tensor(1.0) - sum(p))
            read.append(sum(weight * state for weight, state in zip(p, s[1:], strict=False)))
            exits.append(t)
            probabilities.append(torch.stack(p + [torch.tensor(0.0)] * (T - t)))
        else:
            p, output, halted = [], torch.zeros_like(s[0]), None
            for t in range(1, T + 1):
                if halted is not None:
                    p.append(torch.tensor(0.0))
                elif sum(p) + stop[t - 1] > spec["threshold"]:
                    p.append(torch.tensor(1.0) - sum(p))
                    halted = t
                else:
                    p.append(stop[t - 1])
                output = (1 - p[-1]) * output + p[-1] * s[t]
            read.append(output)
            exits.append(halted or T)
            probabilities.append(torch.stack(p))
    return torch.stack(read), torch.tensor(exits), torch.stack(probabilities)


def last_row(table: Tensor, t: int) -> Tensor:
    """Loop t's row of a table with one row per loop; loops beyond it share the last one."""
    return table[t] if t < len(table) else table[-1]


def block(run: Run, layer: int, t: int, x: Tensor) -> Tensor:
    """One layer on the residual stream x [S, D], or streams [S, n, D], in loop t."""
    w, config, prefix = run.w, run.config, f"layers.{layer}."

    def normed(name: str, branch: Tensor) -> Tensor:
        return norm(w, config, prefix + name, branch, t)

    def place(x: Tensor, branch: str, f, before: str, after: str) -> Tensor:
        x, plus = connect(w, config, layer, branch, t, x)
        if config.norm_placement == "pre":
            return plus(f(normed(before, x)))
        if config.norm_placement == "sandwich":
            return plus(normed(after, f(normed(before, x))))
        if config.norm_placement == "sandwich_sum":
            return normed(after, plus(f(normed(before, x))))
        if config.norm_placement == "post":
            return normed(after, plus(f(x)))
        return plus(normed(after, f(x)))

    def attend(branch: Tensor) -> Tensor:
        return attention(run, layer, t, branch)

    def feed(branch: Tensor) -> Tensor:
        act = ACTIVATIONS[config.hidden_act]
        wide = project(w, config, prefix + "mlp.", "up_proj", t, branch)
        if config.mlp_type == "gated":
            wide = act(project(w, config, prefix + "mlp.", "gate_proj", t, branch)) * wide
        else:
            wide = act(wide)
        output = project(w, config, prefix + "mlp.", "down_proj", t, wide)
        return output if config.mlp_output_act is None else ACTIVATIONS[config.mlp_output_act](output)

    def read(branch: Tensor) -> Tensor:
        return cross_attention(run, layer, t, branch)

    x = place(x, "attention", attend, "input_layernorm", "post_attention_layernorm")
    if config.add_cross_attention:
        x = place(x, "", read, "pre_cross_attn_layernorm", "post_cross_attn_layernorm")
    return place(x, "mlp", feed, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def loop_weight(w: dict[str, Tensor], name: str, t: int, kind: str = "weight") -> Tensor:
    """A norm's weight or bias: one vector, or loop t's row where every loop has its own."""
    weight = w[f"{name}.{kind}"]
    return weight if weight.ndim == 1 else last_row(weight, t)


def project(w: dict[str, Tensor], config: LoopedConfig, prefix: str, name: str, t: int, x: Tensor) -> Tensor:
    """A shared projection in loop t: x (c_t W + alpha/r B_t A_t)^T + c_t b + b_t."""
    weight, bias = w[f"{prefix}{name}.weight"], w.get(f"{prefix}{name}.bias")
    own = f"{prefix}loop_adapters.{name}"
    if f"{own}.A" in w:
        spec = config.loop_adapter
        loops = spec["loops"] or list(range(spec["table_loops"]))
        t = min(t, spec["table_loops"] - 1)
        if t in loops:
            row = loops.index(t)
            alpha = spec["rank"] if spec["alpha"] is None else spec["alpha"]
            scale = w.get(f"{own}.shared_scale", torch.ones(len(loops), len(weight)))[row]
            weight = scale[:, None] * weight + alpha / spec["rank"] * (w[f"{own}.B"][row] @ w[f"{own}.A"][row])
            bias = None if bias is None else scale * bias + w.get(f"{own}.bias", torch.zeros(len(loops), 1))[row]
    output = x @ weight.T
    return output if bias is None else output + bias


def attention(run: Run, layer: int, t: int, x: Tensor) -> Tensor:
    """Grouped-query attention of one layer over one sequence x [S, D]."""
    w, config = run.w, run.config
    prefix, K = f"layers.{layer}.self_attn.", config.head_dim
    queries = heads(w, config, prefix, "q", t, x, run.rope)
    if layer in run.held:
        keys, values = run.held[layer]
    else:
        keys, values = heads(w, config, prefix, "k", t, x, run.rope), value_heads(run, layer, t, x)
        if config.depth_attention["type"] == "anchors":
            values = mix_depth(queries, keys, values, run.anchors)
            if layer % config.depth_attention["stride"] == 0:
                run.anchors.append((keys, values))
        run.slots.append((keys, values))
        core = range(config.num_prelude_layers, config.num_prelude_layers + config.num_core_layers)
        if config.kv_sharing == "first_loop" and layer in core:
            run.held[layer] = keys, values

    visible = visibility(config, layer, len(x))
    heads_per_key = len(queries) // len(keys)
    attended = []
    for head, query in enumerate(queries):
        key, value = keys[head // heads_per_key], values[head // heads_per_key]
        scores = (query @ key.T / math.sqrt(K)).masked_fill(~visible, -math.inf)
        attended.append(torch.softmax(scores, dim=-1) @ value)
    together = torch.cat(attended, dim=-1)
    if config.attention_gate == "per_channel":
        together = together / (1 + torch.exp(-(x @ w[prefix + "gate_proj.weight"].T)))
    return project(w, config, prefix, "o_proj", t, together)


def cross_attention(run: Run, layer: int, t: int, x: Tensor) -> Tensor:
    """Attention of one layer from x [S, D] to all of the encoder's output, made anew in every loop."""
    w, config, prefix = run.w, run.config, f"layers.{layer}.cross_attn."
    key_loop = 0 if config.kv_sharing == "first_loop" else t
    queries = heads(w, config, prefix, "q", t, x, None)
    keys = heads(w, config, prefix, "k", key_loop, run.encoded, None)
    values = clip(config, project(w, config, prefix, "v_proj", key_loop, run.encoded))
    attended = []
    for head, query in enumerate(queries):
        key_head = head * len(keys) // len(queries)
        value = values[:, key_head * config.head_dim : (key_head + 1) * config.head_dim]
        scores = query @ keys[key_head].T / math.sqrt(config.head_dim)
        attended.append(torch.softmax(scores, dim=-1) @ value)
    return project(w, config, prefix, "o_proj", t, torch.cat(attended, dim=-1))


def heads(
    w: dict[str, Tensor],
    config: LoopedConfig,
    prefix: str,
    name: str,
    t: int,
    x: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Queries (`name` "q") or keys ("k") of every head, clipped, normed and rotated, [heads, S, K]."""
    eps = config.rms_norm_eps
    projected = clip(config, project(w, config, prefix, f"{name}_proj", t, x))
    if config.qk_norm == "flat":
        projected = rms_norm(projected, loop_weight(w, f"{prefix}{name}_norm", t), eps)
    of_heads = []
    for head in projected.split(config.head_dim, dim=-1):
        if config.qk_norm == "per_head":
            head = rms_norm(head, loop_weight(w, f"{prefix}{name}_norm", t), eps)
        if config.qk_norm == "per_head_unweighted":
            head = rms_norm(head, torch.ones(()), torch.finfo(head.dtype).eps)
        of_heads.append(head if rope is None else rotate(head, *rope))
    return torch.stack(of_heads)


def value_heads(run: Run, layer: int, t: int, x: Tensor) -> Tensor:
    """Values of every key-value head, [heads, S, K], with what the layer's value embedding holds for the tokens."""
    w, config, prefix = run.w, run.config, f"layers.{layer}.self_attn."
    values = list(project(w, config, prefix, "v_proj", t, x).split(config.head_dim, dim=-1))
    spec = config.value_embedding
    if spec["type"] == "gated" and layer in spec["layers"]:
        embedded = w[f"value_embeddings.{layer}.weight"][run.tokens].split(config.head_dim, dim=-1)
        for head, row in enumerate(w[prefix + "value_gate.weight"]):
            gate = 2 / (1 + torch.exp(-(x[:, : spec["gate_channels"]] @ row)))
            values[head] = values[head] + gate[:, None] * embedded[head]
    return clip(config, torch.stack(values))


def mix_depth(queries: Tensor, keys: Tensor, values: Tensor, anchors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Values [heads, S, K], each mixed with those that the anchors had for the same head and token."""
    mixed = torch.empty_like(values)
    group = len(queries) // len(keys)
    for head in range(len(keys)):
        for s in range(keys.shape[1]):
            q = sum(queries[head * group : (head + 1) * group, s]) / group
            sources = [(key[head, s], value[head, s]) for key, value in [*anchors, (keys, values)]]
            weights = [torch.exp(q @ key / math.sqrt(len(q))) for key, _ in sources]
            mixture = sum(weight * value for weight, (_, value) in zip(weights, sources, strict=True))
            mixed[head, s] = mixture / sum(weights)
    return mixed


def clip(config: LoopedConfig, x: Tensor) -> Tensor:
    """x, cut at `qkv_clip` on both sides."""
    c = config.qkv_clip
    return x if c is None else torch.where(x > c, c, torch.where(x < -c, -c, x))


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
