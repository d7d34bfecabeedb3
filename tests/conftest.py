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
    """quanto unpacks four bits with its Python function: compiling the C++ one takes a new machine 45 s."""
    from optimum.quanto.library.extensions import get_extension
    from optimum.quanto.library.unpack import unpack

    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
