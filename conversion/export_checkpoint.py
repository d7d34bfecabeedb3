"""Export an imported checkpoint: back to the names, layout, files and config that it was published with.

    python conversion/export_checkpoint.py --source build/ouro-1.4b --output build/ouro-1.4b-original

Weights that nobody touched come out equal to the original's in every bit.
"""

import argparse
import sys
from pathlib import Path

from modeling_looped.conversion import export_checkpoint


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, type=Path, metavar="DIR", help="folder with the looped checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="folder that import_checkpoint.py wrote, if SOURCE is what was trained from it",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    try:
        export_checkpoint(options.source, options.output, like=options.like, report=print)
    except (ValueError, OSError) as error:
        print(f"export_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
