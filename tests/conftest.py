"""Shared set-up of the tests: one thread per process (xdist runs several), no network, a fixed seed, warnings once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import modeling_looped  # noqa: F401  (registers the Auto classes)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
