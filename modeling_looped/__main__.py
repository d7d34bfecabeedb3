"""The command line: `python -m modeling_looped COMMAND ...`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

#: Command -> module and function that take the rest of the command line and return the exit status.
COMMANDS = {
    "scaling-law": "modeling_looped.scaling.command:main",
    "train": "modeling_looped.training.pretrain:main",
}

#: Command -> the extra that brings the packages which only it needs.
EXTRAS = {"scaling-law": "scaling", "train": "train"}

USAGE = f"""usage: python -m modeling_looped COMMAND ...

commands: {", ".join(sorted(COMMANDS))}
`python -m modeling_looped COMMAND --help` says more of each.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, or 2 if there is no such command."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        said = f"there is no command {name!r}{hint}.\n\n" if name else ""
        sys.stderr.write(said + USAGE)
        return 2
    module, _, function = COMMANDS[name].partition(":")
    try:
        command = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("modeling_looped"):
            raise
        extra = f"modeling-looped[{EXTRAS[name]}]"
        sys.stderr.write(f"{name} needs the package {error.name!r}; `pip install {extra}` brings it.\n")
        return 1
    return command(rest[:-1])


if __name__ == "__main__":
    sys.exit(main())
