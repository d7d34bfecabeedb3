"""Loop a stacked checkpoint: the middle of its layers becomes a core that runs any number of times, untrained.

    python conversion/retrofit.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct \
        --prelude 13 --core 4 --coda 13 --loops 2 --output build/smollm2-looped

The result keeps all layers and equals the teacher at one loop, which is checked on text before anything is written.
More loops are damped, which needs no training; with --identity-rank they do nothing until they are trained.
"""

import argparse
import shlex
import sys
from pathlib import Path

from modeling_looped.conversion import ConversionError, retrofit_checkpoint
from modeling_looped.conversion.options import DTYPES, positive
from modeling_looped.conversion.verification import HELD_OUT_TEXT, TOLERANCE


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--teacher",
        required=True,
        metavar="PATH_OR_ID",
        help="folder or Hub id of a Llama, Mistral, Qwen2, Qwen3, OLMo2",
    )
    add("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    add("--revision", help="branch, tag or commit of a teacher on the Hub")
    add("--prelude", required=True, type=int, metavar="P", help="first layers, run once before the loops")
    add("--core", required=True, type=int, metavar="R", help="middle layers, run in every loop")
    add("--coda", required=True, type=int, metavar="C", help="last layers, run once after the loops")
    add("--loops", required=True, type=int, metavar="T", help="loop count that the model is set to")
    add(
        "--identity-rank",
        type=int,
        metavar="R",
        help="to train: loops after the first start as the identity, with low-rank weights (default: damped loops)",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--text", type=Path, metavar="FILE", default=HELD_OUT_TEXT, help="held-out text to compare and measure on")
    add(
        "--tolerance",
        type=positive,
        default=TOLERANCE,
        help="largest difference from the teacher's logits (%(default)s)",
    )
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the weights (%(default)s)",
    )
    add("--force", action="store_true", help="replace the result of an earlier conversion in DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = vars(parse(arguments))
    command = shlex.join(["python", "conversion/retrofit.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        retrofit_checkpoint(overwrite=options.pop("force"), command=command, report=print, **options)
    except (ValueError, OSError, ConversionError) as error:
        print(f"retrofit.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
