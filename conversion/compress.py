"""Compress a stacked checkpoint: several of its layers become one shared layer that loops. A start for training.

    python conversion/compress.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --loops 3 --output build/small \
        --prelude 4 --core 5 --coda 11 --merge first --rank 64 --adapter fitted --calibration text.txt
    python conversion/compress.py --teacher ... --loops 2 --output ... --keep 0-9,20-29 --loop 8-9,20-21 --gate 0.1
    python conversion/compress.py --teacher ... --loops 2 --output ... --find middle --calibration text.txt

Which layers share is said by sizes (--prelude, --core, --coda: all layers of the teacher), by name (--keep, --loop:
the others are dropped), or found from activations (--find).
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from modeling_looped.conversion import ConversionError
from modeling_looped.conversion.alignment import ALIGNMENTS
from modeling_looped.conversion.calibration import Calibration
from modeling_looped.conversion.compress import ADAPTERS
from modeling_looped.conversion.compress_checkpoint import compress_checkpoint
from modeling_looped.conversion.layer_plan import ORDERS, LayerPlan, fitting_plan, kept_plan, parse_layers
from modeling_looped.conversion.merging import MERGES
from modeling_looped.conversion.options import DTYPES
from modeling_looped.conversion.plan_search import cheapest_and_looped, dropped_and_looped, shared_middle
from modeling_looped.conversion.verification import HELD_OUT_TEXT

#: What `--find` drops: the block that turns the state least; one by one, the layers without which the loss is lowest.
DROPS = {"drop": dropped_and_looped, "cheapest": partial(cheapest_and_looped, report=print)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, metavar="PATH_OR_ID", help="folder or Hub id of a Llama, Mistral, Qwen or OLMo 2")
    add("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    add("--revision", help="branch, tag or commit of a teacher on the Hub")
    add("--loops", required=True, type=int, metavar="T", help="how often the shared layers run")
    add("--prelude", type=int, metavar="P", help="first layers, kept as they are")
    add("--core", type=int, metavar="R", help="shared layers, which stand for R * T layers")
    add("--coda", type=int, metavar="C", help="last layers, kept as they are")
    add("--order", choices=ORDERS, default="cycle", help="abc abc or aa bb cc (%(default)s)")
    add("--keep", metavar="LAYERS", help="layers to keep, for example 0-9,20-29; the others are dropped")
    add("--loop", metavar="LAYERS", help="those of them that loop, one after the other among the kept")
    add("--find", choices=("middle", *DROPS), help="share the middle, drop a block, or drop the cheapest one by one")
    add("--dropped", type=int, metavar="N", help="with --find drop or cheapest: how many layers to drop")
    add("--looped", type=int, metavar="R", help="with --find drop or cheapest: how many layers around the gap loop")
    add("--rank", type=int, default=0, help="of the low-rank difference per loop; 0: none (%(default)s)")
    add("--merge", choices=sorted(MERGES), default="average", help="rule for the shared weights (%(default)s)")
    add("--adapter", choices=ADAPTERS, default="svd", help="with --rank: how they are found (%(default)s)")
    add("--align", dest="alignment", choices=ALIGNMENTS, default="none", help="reorder before merging (%(default)s)")
    add("--gate", type=float, metavar="G", help="let loops after the first enter through a gate that starts at G")
    add("--calibration", dest="calibration_text", type=Path, metavar="FILE", help="text to calibrate on")
    add("--calibration-tokens", type=int, default=8192, help="how much of it to read (%(default)s)")
    add("--text", type=Path, metavar="FILE", default=HELD_OUT_TEXT, help="held-out text for the losses")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights")
    add("--force", dest="overwrite", action="store_true", help="replace the result of an earlier conversion in DIR")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded.

    Raises:
        ValueError: unless they describe exactly one plan, and nothing besides.
    """
    if options.loops < 1:
        raise ValueError(f"--loops {options.loops} must be at least 1.")
    sizes = [options.prelude, options.core, options.coda]
    ways = [any(size is not None for size in sizes), options.keep is not None, options.find is not None]
    if sum(ways) != 1:
        raise ValueError("say which layers share in one way: --prelude --core --coda, --keep --loop, or --find.")
    if ways[0] and None in sizes:
        raise ValueError("--prelude, --core and --coda go together.")
    if options.keep is not None and not options.loop:
        raise ValueError("--keep needs --loop: which of the kept layers loop.")
    drops = options.find in DROPS
    if drops and None in (options.dropped, options.looped):
        raise ValueError(f"--find {options.find} needs --dropped N and --looped R.")
    finder = " or ".join(f"--find {name}" for name in DROPS)
    partners = (("loop", "--keep", options.keep is not None), ("dropped", finder, drops), ("looped", finder, drops))
    for name, partner, present in partners:
        if getattr(options, name) is not None and not present:
            raise ValueError(f"--{name} {getattr(options, name)} goes with {partner} only.")
    if options.order != "cycle" and not (ways[0] or options.find == "middle"):
        raise ValueError(
            f"--order {options.order} goes with --prelude --core --coda or --find middle only: elsewhere the looping "
            "layers run as they lie in the teacher."
        )


def plan(options: argparse.Namespace, num_layers: int, calibration: Calibration | None) -> LayerPlan:
    """The plan that the checked options describe.

    Raises:
        ValueError: for `--find` without a calibration, and for sizes or layers that do not fit the teacher.
    """
    if options.keep is not None:
        return kept_plan(parse_layers(options.keep), parse_layers(options.loop), options.loops)
    if options.find is None:
        sizes = (options.prelude, options.core, options.coda)
        return fitting_plan(num_layers, *sizes, options.loops, order=options.order)
    if calibration is None:
        raise ValueError(f"--find {options.find} needs --calibration FILE, on which it finds the layers.")
    if options.find == "middle":
        return shared_middle(calibration, options.loops, order=options.order)
    return DROPS[options.find](calibration, dropped=options.dropped, looped=options.looped, loops=options.loops)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    passed = (
        "teacher",
        "output",
        "gguf_file",
        "revision",
        "rank",
        "merge",
        "adapter",
        "alignment",
        "calibration_text",
        "calibration_tokens",
        "text",
        "device",
        "dtype",
        "overwrite",
    )
    gate = {"type": "gated", "initial_gate": options.gate, "free_loops": 1}
    try:
        check(options)
        compress_checkpoint(
            **{name: getattr(options, name) for name in passed},
            planner=partial(plan, options),
            searches=options.find is not None,
            loop_update="replace" if options.gate is None else gate,
            command=shlex.join(["python", "conversion/compress.py", *given]),
            report=print,
        )
    except (ValueError, OSError, ConversionError) as error:
        print(f"compress.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
