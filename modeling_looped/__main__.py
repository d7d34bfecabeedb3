"""The command line: `python -m modeling_looped COMMAND ...`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

#: Command -> the function that runs it, which is imported only then.
COMMANDS = {"scaling-law": "modeling_looped.scaling.command:main"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    usage = f"usage: python -m modeling_looped COMMAND [--help]\ncommands: {', '.join(COMMANDS)}\n"
    if not given or given[0] in ("-h", "--help"):
        (sys.stdout if given else sys.stderr).write(usage)
        return 0 if given else 2
    if given[0] not in COMMANDS:
        close = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        sys.stderr.write(f"command={given[0]!r} is unknown.{hint}\n{usage}")
        return 2
    module, function = COMMANDS[given[0]].split(":")
    return getattr(importlib.import_module(module), function)(given[1:])


if __name__ == "__main__":
    sys.exit(main())
