"""Worker: gradients of two processes against those of one. `python -m torch.distributed.run … gradients.py FOLDER`.

Writes `FOLDER/gradients.json`, case -> what was measured. Every case takes steps with a loop count that is fixed, or
drawn from a generator keyed by (seed, step), the same on both ranks, and compares each gradient with that of a process
that saw both ranks' tokens. The cases `transformers` also save the whole model, to `FOLDER/<variant>`.
"""

import contextlib
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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from distributed.leave import leave

SEED = 1234
STEPS = {"fixed": 1, "random": 3}

#: Architectures beside the default, whose parameters are used in other ways: once per forward, by some loops only, …
VARIANTS = {
    "lora": {"loop_adapter": {"type": "lora", "rank": 3}},
    "late_lora": {"loop_adapter": {"type": "lora", "rank": 3, "loops": [1, 2], "shared_scale": "per_channel"}},
    "gated": {"loop_update": {"type": "gated", "free_loops": 1}, "loop_conditioning": "embedding"},
    "norms": {"loop_conditioning": "norms", "final_norm": "every_loop"},
    "tied": {"final_norm": "after_loops", "tie_word_embeddings": True},
    "halting": {"halting": "gate", "readout": "linear"},
    "truncated": {"backprop_loops": 1},
    "hyperloop": {"residual_streams": {"type": "hyperloop", "num_streams": 2, "table_loops": 2}},
}

#: (strategy, checkpointing, loops, variant). `fsdp` frees a layer's gathered weights after each use, `fsdp_kept` keeps
#: them until the layer's first backward, `fsdp_resident` until the end of the step, and `transformers` is FSDP as
#: `from_pretrained` sets it up.
CASES = [
    *itertools.product(("ddp", "fsdp", "fsdp_kept"), ("none", "layer", "loop"), ("fixed", "random"), ("plain",)),
    *itertools.product(("fsdp_resident",), ("none", "loop"), ("random",), ("plain",)),
    *itertools.product(("ddp",), ("none",), ("random",), VARIANTS),
    *itertools.product(("fsdp",), ("loop",), ("random",), VARIANTS),
    *itertools.product(("transformers",), ("layer", "loop"), ("random",), ("plain", "norms", "tied")),
]


def loops_of(step: int, kind: str) -> int | None:
    """Loop count of a step: the config's, or one drawn with no state but (seed, step)."""
    if kind == "fixed":
        return None
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    return int(torch.randint(1, 6, (), generator=generator))


class BytesMoved(TorchDispatchMode):
    """Adds up what collectives deliver on this rank: gathered parameters, and gradients before they are scattered."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


def parallel(model: torch.nn.Module, strategy: str, folder: Path) -> torch.nn.Module:
    if strategy == "transformers":
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    if strategy == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=False)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=strategy == "fsdp")
        if strategy == "fsdp_resident":
            layer.set_reshard_after_backward(False)
    return fully_shard(model, reshard_after_forward=strategy == "fsdp")


def gradients(model: torch.nn.Module, tokens: torch.Tensor, num_loops: int | None) -> dict[str, torch.Tensor]:
    """Gradients of a model that is not distributed."""
    model.zero_grad()
    model(tokens, labels=tokens, num_loops=num_loops).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run_case(folder: Path, strategy: str, checkpointing: str, loops: str, variant: str) -> dict:
    torch.manual_seed(0)
    granularity = "layer" if checkpointing == "none" else checkpointing
    single = tiny_model(checkpoint_granularity=granularity, **VARIANTS.get(variant, {})).train()
    model = parallel(copy.deepcopy(single), strategy, folder / "start" / variant).train()
    if checkpointing != "none":
        getattr(model, "module", model).activation_checkpointing_enable()
    counts, errors, missing, moved, alone = [], [], [], [], 0.0
    for step in range(STEPS[loops]):
        tokens = random_tokens(4, 9, seed=step)
        mine = tokens[2 * dist.get_rank() :][:2]
        num_loops = loops_of(step, loops)
        counts.append(single.config.num_loops if num_loops is None else num_loops)
        traffic = BytesMoved()
        with traffic if checkpointing == "none" else contextlib.nullcontext():
            model(mine, labels=mine, num_loops=num_loops).loss.backward()
        if strategy == "fsdp_resident":
            for layer in model.model.layers:
                layer.reshard()
        moved.append((traffic.gathered, traffic.reduced))
        reference = gradients(single, tokens, num_loops)
        if step == 0:
            unreduced = gradients(single, mine, num_loops)
            alone = max(float((unreduced[name] - reference[name]).abs().max()) for name in reference)
        for name, parameter in model.named_parameters():
            name = name.removeprefix("module.")
            if parameter.grad is None:
                missing.append(name)
                continue
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            errors.append(float((gradient - reference[name]).abs().max()))
        model.zero_grad()
    if strategy == "transformers":
        model.save_pretrained(folder / variant)
    layer_bytes = sum(parameter.nbytes for parameter in single.model.layers.parameters())
    return {
        "loops": counts,
        "error": max(errors),
        "error_without_reduction": alone,
        "missing": missing,
        "moved": moved,
        "parameter_bytes": sum(parameter.nbytes for parameter in single.parameters()),
        "layer_bytes": layer_bytes,
        "core_bytes": layer_bytes // 2,  # two of the four stored layers
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {"/".join(case): run_case(folder, *case) for case in CASES}
    if dist.get_rank() == 0:
        (folder / "gradients.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
