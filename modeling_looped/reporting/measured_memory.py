"""Memory that a step really takes on the CPU, beside the estimates of `memory.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def measured_peak(step: Callable[[], object]) -> int:
    """Largest number of bytes that CPU tensors made in `step` take at a time, as torch's profiler sees them.

    The step runs twice; the first time makes what is made only once.
    """
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler  # torch's stubs say less than there is
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward's graph keeps for the backward: storages of saved tensors, each once, without parameters.

    Inside of a checkpointed function nothing is kept but its arguments, which count. What a closure holds for the
    recomputation does not: a looped model's binding of the injection, one tensor for all loops.

    Args:
        model: whose parameters do not count.
        forward: makes a graph and returns what holds it.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # the storages themselves, so that no address is used twice
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = forward()
    size = sum(storage.nbytes() for storage in kept.values())
    del graph
    return size


__all__ = ["measured_peak", "saved_bytes"]
