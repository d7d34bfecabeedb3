"""Starts a worker script in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

#: Seconds after which a worker counts as hung (two ranks that wait for different collectives wait for ever).
PATIENCE = 400


def launch(worker: str, folder: Path, *, packages: Path | None = None) -> None:
    """Run `worker` on two ranks with `folder` as its argument; raises with its output if it fails or hangs.

    Args:
        worker: a script of this folder.
        folder: where it writes.
        packages: folder of Python packages that only this worker finds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    search = [HERE.parent.parent, HERE.parent, *([packages] if packages else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, search)),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
    }
    command += [str(HERE / worker), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if result.returncode:
        raise RuntimeError(f"{worker} failed:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}")
