"""How a worker script ends."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Wait for every rank, then end this process without tearing the interpreter down.

    gloo's threads may still hold tensors when Python finalises, and abort the process over them long after its results
    are written ("terminate called without an active exception", pytorch/pytorch#179291).
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
