"""Worker: DeepSpeed's ZeRO in two processes. `python -m torch.distributed.run … zero.py FOLDER`.

By `deepspeed.initialize`, since Accelerate has no DeepSpeed without an accelerator. Writes `FOLDER/zero.json`, case ->
how far the weights are, after a few steps of other loop counts, from those of one process that saw all tokens.
"""

import copy
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from helpers import random_tokens, tiny_model

from distributed.gradients import VARIANTS as OTHERS
from distributed.leave import leave

VARIANTS = {"plain": {}, "concat": {"injection": "concat"}, **OTHERS}
CASES = [(1, "plain"), (2, "plain"), *((3, variant) for variant in VARIANTS)]
LOOPS = (3, 1, 4)
RATE = 0.1


def whole(parameters: list[torch.nn.Parameter], stage: int) -> list[torch.Tensor]:
    """Copies of the parameters, gathered where a rank holds a part of each."""
    if stage < 3:
        return [parameter.detach().clone() for parameter in parameters]
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


def run_case(stage: int, variant: str) -> dict:
    torch.manual_seed(0)
    alone = tiny_model(**VARIANTS[variant]).train()
    start = [parameter.detach().clone() for parameter in alone.parameters()]
    sharded = copy.deepcopy(alone)
    engine, *_ = deepspeed.initialize(
        model=sharded,
        optimizer=torch.optim.SGD(sharded.parameters(), lr=RATE),
        config={
            "gradient_clipping": 0.0,  # its default is 1
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    optimizer = torch.optim.SGD(alone.parameters(), lr=RATE)
    for step, num_loops in enumerate(LOOPS):
        tokens = random_tokens(4, 9, seed=step)
        mine = tokens[2 * dist.get_rank() :][:2]
        engine.backward(engine(mine, labels=mine, num_loops=num_loops).loss)
        engine.step()
        alone(tokens, labels=tokens, num_loops=num_loops).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = whole(list(engine.module.parameters()), stage)
    expected = [parameter.detach() for parameter in alone.parameters()]
    return {
        "error": max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True)),
        "moved": min(float((after - before).abs().max()) for after, before in zip(expected, start, strict=True)),
        "parameters": sum(parameter.numel() for parameter in expected),
        "held": sum(parameter.numel() for parameter in engine.module.parameters()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__.clear()  # it would compile one, for half a minute, which training does not use
    deepspeed.init_distributed("gloo", verbose=False)
    results = {f"{stage}/{variant}": run_case(stage, variant) for stage, variant in CASES}
    if dist.get_rank() == 0:
        (folder / "zero.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
