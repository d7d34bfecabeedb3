"""Work that all test processes of a run share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once_per_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make` filled, for the first of the run's processes that asked for it. Only read it.

    Under xdist the tests of one file may run in several processes, each with module and session fixtures of its own.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, finished = base / name, base / f"{name}.finished"
    with FileLock(base / f"{name}.lock"):
        if not finished.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            finished.touch()
    return folder
