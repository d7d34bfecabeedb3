"""Killing a program in the middle of its work."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm


def take_locks_of_its_own() -> None:
    """Give this process locks of tqdm's that no other one shares.

    tqdm's are shared between processes: who is killed while he holds one stops the others for ever. A subclass, such
    as that of `datasets`, has the one that it first used, whatever its base class has now.
    """
    lock, classes = threading.RLock(), [tqdm]
    while classes:
        cls = classes.pop()
        cls.set_lock(lock)
        classes += cls.__subclasses__()


def killed(program: Callable[[], int], moment: str, delay: float) -> None:
    """Run `program` in a process of its own and kill -9 it `delay` seconds after it prints a line that begins so."""
    reader, writer = os.pipe()
    child = os.fork()  # a new interpreter would spend ten seconds on imports
    if child == 0:
        take_locks_of_its_own()
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        os._exit(program())
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:
            if line.startswith(moment):
                time.sleep(delay)
                break
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
