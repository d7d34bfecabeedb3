"""Import a published looped checkpoint: its weights become a LoopedForCausalLM, and can be turned back.

    python conversion/import_checkpoint.py --source ByteDance/Ouro-1.4B --output build/ouro-1.4b

Names, shapes and types of all tensors are checked before one is read, and the weights pass through shard by shard.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from modeling_looped.conversion import ConversionError, import_checkpoint
from modeling_looped.conversion.options import DTYPES, positive
from modeling_looped.conversion.parity import PARITY_TOLERANCE
from modeling_looped.conversion.published import PUBLISHED

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text} must be a number of KB, MB or GB, such as 5GB")
    return int(match[1]) * UNITS[match[2]]


def setting(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE, the value JSON if it is and text if not."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"{text} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, metavar="PATH_OR_ID", help="folder or Hub id of the published checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--family", default="auto", choices=("auto", *PUBLISHED), help="what it is (%(default)s: told by its config)")
    add("--revision", help="branch, tag or commit of a source on the Hub")
    add(
        "--set",
        dest="settings",
        action="append",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="add a field to the source's config that it lacks, such as lora_alpha=32; can be repeated",
    )
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (%(default)s: as they are)")
    add("--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of a file of weights (%(default)s)")
    add("--verify", type=Path, metavar="FILE", help="safetensors file with inputs and logits of the original")
    add(
        "--tolerance",
        type=positive,
        default=PARITY_TOLERANCE,
        help="largest difference from the original's logits (%(default)s)",
    )
    add("--force", action="store_true", help="replace the result of an earlier conversion in DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        import_checkpoint(
            options.source,
            options.output,
            family=options.family,
            revision=options.revision,
            settings=dict(options.settings),
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            max_shard_bytes=options.max_shard_size,
            recording=options.verify,
            tolerance=options.tolerance,
            overwrite=options.force,
            command=shlex.join(["python", "conversion/import_checkpoint.py", *given]),
            report=print,
        )
    except (ValueError, OSError, ConversionError) as error:
        print(f"import_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
