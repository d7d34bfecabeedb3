"""Starts a worker script in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

#: Seconds after which a worker counts as hung (two ranks that wait for different collectives wait for ever).
PATIENCE = 400


def launch(worker: str, folder: Path) -> None:
    """Run `worker` on two ranks with `folder` as its argument; raises with its output if it fails or hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    search = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command += [str(HERE / worker), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if result.returncode:
        raise RuntimeError(f"{worker} failed:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}")
