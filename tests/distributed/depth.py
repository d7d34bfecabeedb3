"""Worker: sampled depths in two processes. `python -m torch.distributed.run … depth.py FOLDER`.

Writes `FOLDER/depth.json`, case -> the loops that each rank ran in every step, the depths of its rows or tokens, and
how far the gradients are from those of one process that takes both ranks' rows at these depths.
"""

import copy
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import random_tokens, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distributed.leave import leave

CASES = list(itertools.product(("ddp", "fsdp"), ("batch", "sequence", "token")))
STEPS = 3


def tokens_of(step: int, rank: int) -> torch.Tensor:
    """A rank's rows in a step: two, and longer ones on the second rank."""
    return random_tokens(2, 5 + 2 * rank, seed=10 * step + rank)


def gathered(value: object) -> list:
    """Every rank's `value`, in order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items())


def sampled_model(granularity: str) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = {"type": "poisson", "granularity": granularity, "mean": 3, "seed": 1}
    return tiny_model(depth_sampling=spec, backprop_loops=2, loop_conditioning="norms").train()


def measure(strategy: str, granularity: str) -> dict:
    rank = dist.get_rank()
    alone = sampled_model(granularity)
    model = copy.deepcopy(alone)
    if strategy == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=False)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    result = {"loops": [], "depths": [], "error": 0.0, "error_without_reduction": 0.0}
    for step in range(STEPS):
        model.zero_grad()
        tokens = tokens_of(step, rank)
        output = model(tokens, labels=tokens, output_loop_hidden_states=True)
        output.loss.backward()
        result["loops"].append(gathered(len(output.loop_hidden_states) - 1))
        depths = gathered(output.num_loops.tolist())
        result["depths"].append(depths)

        expected = []
        alone.zero_grad()
        for other in range(dist.get_world_size()):
            rows = tokens_of(step, other)
            (alone(rows, labels=rows, num_loops=torch.tensor(depths[other])).loss / 2).backward()
            expected.append({name: grad.clone() for name, grad in gradients(alone).items()})
        found = gradients(model)
        result["error"] = max(result["error"], error(found, expected[-1]))
        result["error_without_reduction"] = max(result["error_without_reduction"], error(found, expected[0]))
    return result


def disagreement() -> str:
    """What a rank hears that was loaded from another step than its neighbour."""
    dist.set_debug_level(dist.DebugLevel.INFO)
    model = sampled_model("batch")
    model.model.depth_sampling.step.fill_(3 * dist.get_rank())
    try:
        for step in range(STEPS):
            model(tokens_of(step, 0))
    except RuntimeError as refusal:
        return str(refusal)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict = {f"{strategy}/{granularity}": measure(strategy, granularity) for strategy, granularity in CASES}
    results["refused"] = gathered(disagreement())
    if dist.get_rank() == 0:
        (folder / "depth.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
