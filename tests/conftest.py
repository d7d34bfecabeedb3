"""Shared set-up of the tests: one thread per process (xdist runs several), no network, a fixed seed, warnings once."""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import modeling_looped  # noqa: F401  (registers the Auto classes)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quanto_without_compiler():
    """quanto unpacks its bits with torch's operations: compiling its C++ for that takes a new machine 45 s."""
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        mask = 2**bits - 1
        return torch.cat([packed >> bits * place & mask for place in range(8 // bits)])

    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
