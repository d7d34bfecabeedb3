"""Several residual streams in their plainest form, for `reference.py`: one token and one stream at a time.

S tokens, D hidden size, n streams, t a loop counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modeling_looped import LoopedConfig


def spread(config: LoopedConfig, x: Tensor, *, in_core: bool) -> Tensor:
    """x [S, D], or streams [S, m, D], as the n streams of a part [S, n, D]; x itself where there is one stream."""
    spec = config.residual_streams
    if spec["type"] in ("none", "hyperloop"):
        return x
    n = (in_core and spec["core_num_streams"]) or spec["num_streams"]
    held = [x] if x.ndim == 2 else list(x.unbind(1))
    m = len(held)
    if n % m == 0:
        streams = [held[i * m // n] for i in range(n)]
    elif m % n == 0:
        streams = [sum(held[i * m // n : (i + 1) * m // n]) * n / m for i in range(n)]
    else:
        streams = [sum(held) / m] * n
    return torch.stack(streams, dim=1)


def merge(x: Tensor) -> Tensor:
    """The mean of the streams, [S, D]."""
    return x if x.ndim == 2 else x.sum(1) / x.shape[1]


def carried(config: LoopedConfig) -> bool:
    """Whether the loop's state is streams."""
    return config.residual_streams.get("span") == "model"


def connect(
    w: dict[str, Tensor], config: LoopedConfig, layer: int, branch: str, t: int, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the branch of a layer reads from x in loop t, [S, D], and how its output joins x."""
    spec = config.residual_streams
    if spec["type"] in ("none", "hyperloop"):
        return x, lambda output: x + output
    prefix = f"layers.{layer}.residual_streams.{branch}."
    W, b, a = (w[prefix + name][min(t, len(w[prefix + name]) - 1)] for name in ("weight", "bias", "gate"))
    n = x.shape[1]
    read, write, mix = zip(*(mapping(spec, W, b, a, layer % n, token) for token in x), strict=True)
    entering = torch.stack([sum(r[j] * token[j] for j in range(n)) for r, token in zip(read, x, strict=True)])

    def join(output: Tensor) -> Tensor:
        joined = []
        for s, token in enumerate(x):
            streams = [sum(mix[s][i, j] * token[j] for j in range(n)) + write[s][i] * output[s] for i in range(n)]
            joined.append(torch.stack(streams))
        return torch.stack(joined)

    return entering, join


def copies(config: LoopedConfig, s: Tensor) -> Tensor:
    """The state s [S, D] that the loops start from as the streams between them, [S, n, D], where there are any."""
    spec = config.residual_streams
    return torch.stack([s] * spec["num_streams"], dim=1) if spec["type"] == "hyperloop" else s


def connect_loop(
    w: dict[str, Tensor], config: LoopedConfig, t: int, s: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What loop t reads from the state s, and how its output becomes the next one."""
    if config.residual_streams["type"] != "hyperloop":
        return s, lambda output: output
    names = ("weight", "bias", "gate", "shift")
    W, b, a, c = (w[f"residual_streams.{name}"] for name in names)
    W, b, a, c = (table[min(t, len(table) - 1)] for table in (W, b, a, c))
    n = s.shape[1]

    def strengths(X: Tensor, part: int) -> Tensor:
        v, rows = X.flatten(), slice(part * n, (part + 1) * n)
        z = W[rows] @ v / torch.sqrt((v * v).sum() / len(v) + 1e-6)
        return 1 / (1 + torch.exp(-(a[part] * z + b[rows])))

    entering = torch.stack([sum(r * x for r, x in zip(strengths(X, 0), X, strict=True)) for X in s])

    def join(output: Tensor) -> Tensor:
        joined = []
        for X, y in zip(s, output, strict=True):
            write, keep = 2 * strengths(X, 1), strengths(X, 2)
            joined.append(torch.stack([keep[i] * X[i] + write[i] * (y + c) for i in range(n)]))
        return torch.stack(joined)

    return entering, join


def mapping(spec: dict, W: Tensor, b: Tensor, a: Tensor, home: int, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read [n], write [n] and mix [n, n] of one token, whose streams are X [n, D]."""
    n, v = len(X), X.flatten()
    square, identity = (v * v).sum() / len(v), torch.eye(n, dtype=X.dtype)
    if spec["type"] == "hyper_connections":
        z = torch.tanh(W @ v / torch.sqrt(square + 1e-6) + b)
        return a[0] * z[:n] + identity[home], a[1] * z[n : 2 * n] + 1, a[2] * z[2 * n :].reshape(n, n) + identity
    z = W @ v / (torch.sqrt(square) + 1e-6)
    read = 1 / (1 + torch.exp(-(a[0] * z[:n] + b[:n])))
    write = 2 / (1 + torch.exp(-(a[1] * z[n : 2 * n] + b[n : 2 * n])))
    if spec["mixing"] == "identity":
        return read, write, identity
    mix = torch.exp(a[2] * z[2 * n :] + b[2 * n :]).reshape(n, n)
    for _ in range(spec["sinkhorn_iterations"]):
        mix = mix / mix.sum(1)[:, None]
        mix = mix / mix.sum(0)[None, :]
    return read, write, mix
