"""The helper that kills programs leaves nothing behind that the next one waits for."""

import time

import pytest
from datasets.utils.tqdm import tqdm as tqdm_of_datasets
from killing import killed
from tqdm import tqdm


@pytest.mark.parametrize("bar", [tqdm, tqdm_of_datasets], ids=["tqdm", "datasets"])
def test_a_program_killed_with_the_lock_of_progress_bars_does_not_keep_it(bar):
    own = bar.get_lock()
    bar.set_lock(own)  # as a thread pool leaves it

    def program() -> int:
        with bar.get_lock():
            print("held")
            time.sleep(60)
        return 0

    killed(program, "held", delay=0.0)
    for lock in own.locks:  # between processes, and between threads
        assert lock.acquire(False)
        lock.release()
