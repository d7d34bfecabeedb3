"""Sample text from a checkpoint: to calibrate and distil on where its own training text is not at hand.

    python conversion/sample_text.py --model HuggingFaceTB/SmolLM2-135M-Instruct --start '<|endoftext|>' \
        --tokens 100000 --output build/samples.jsonl

The file has a column `text` and is read by `conversion/distill.py` and by `--calibration` of `conversion/compress.py`.
The same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from modeling_looped.conversion.checkpoint import check_device
from modeling_looped.conversion.options import DTYPES, positive
from modeling_looped.conversion.sampling import sample_text
from modeling_looped.conversion.teacher import find_teacher


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="folder or Hub id of a causal language model")
    add("--gguf-file", metavar="FILE", help="read this GGUF file of it")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--tokens", required=True, type=int, metavar="N", help="tokens to write at least")
    add("--output", required=True, type=Path, metavar="FILE", help="JSON-lines file to write")
    add("--max-length", type=int, default=256, help="tokens of a sample (%(default)s)")
    add("--batch-size", type=int, default=32, help="samples drawn at a time (%(default)s)")
    add("--temperature", type=positive, default=1.0, help="of the softmax (%(default)s)")
    add("--top-p", type=positive, default=1.0, help="probability mass that is sampled from (%(default)s)")
    add("--start", metavar="TOKEN", help="token that every sample begins with (the tokenizer's bos_token)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights")
    return parser.parse_args(arguments)


def made_by(provenance: dict[str, Any], dtype: str) -> str:
    """A hash of the model's files and its dtype."""
    return hashlib.sha256(json.dumps([provenance["sha256"], dtype], sort_keys=True).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    try:
        check_device(options.device)
        files = find_teacher(options.model, gguf_file=options.gguf_file, revision=options.revision, field="model")
        names = ("tokens", "max_length", "batch_size", "temperature", "top_p", "start", "seed")
        sample_text(
            files.model(dtype=options.dtype, device=options.device),
            files.tokenizer(),
            options.output,
            made_by=made_by(files.provenance(), options.dtype),
            progress=print,
            **{name: getattr(options, name) for name in names},
        )
    except (ValueError, OSError) as error:
        print(f"sample_text.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
