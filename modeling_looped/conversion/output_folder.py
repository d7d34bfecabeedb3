"""Output folders: written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "looped_manifest.json"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError if `output` cannot become a new checkpoint folder without destroying something.

    Args:
        output: the folder.
        overwrite: whether the result of an earlier conversion may be replaced.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output={str(output)!r} is not empty: choose another folder, or pass --force to replace it.")
    if not (output / MANIFEST).is_file():
        raise ValueError(
            f"output={str(output)!r} holds no {MANIFEST}, so it is not the result of a conversion and is not "
            "replaced even by force. Remove it yourself if it can go."
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place once the block ends without an error.

    Until then `output` stays as it was, and after an error nothing is left behind.
    """
    output = output.resolve()  # `.` has no name, and a parent that may move
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp lets only its owner in
        if output.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            output.rename(replaced / output.name)
            staging.rename(output)
            shutil.rmtree(replaced)
        else:
            staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


__all__ = ["MANIFEST", "check_output", "staged"]
