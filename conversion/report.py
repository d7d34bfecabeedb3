"""Report on a looped model: losses and costs by loop count, distance to its teacher, the curves of its training.

    python conversion/report.py --model build/small --teacher HuggingFaceTB/SmolLM2-135M-Instruct \
        --text held_out.txt --run build/small-run --output build/small-report

Writes report.md with pictures, and report.json, from which conversion/model_card.py makes a model card.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_looped import LoopedForCausalLM
from modeling_looped.accounting import checked_length
from modeling_looped.conversion.checkpoint import Steps, check_device
from modeling_looped.conversion.options import DTYPES
from modeling_looped.conversion.teacher import find_teacher, sha256
from modeling_looped.conversion.verification import HELD_OUT_TEXT, text_windows
from modeling_looped.reporting.layer_map import layer_map_of, read_manifest
from modeling_looped.reporting.report import measure, write_report
from modeling_looped.reporting.run_log import read_run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="folder of the looped model")
    add("--name", help="what the report calls it (the folder's name)")
    add("--teacher", metavar="PATH_OR_ID", help="checkpoint that it was made from, for the distances to it")
    add("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    add("--revision", help="branch, tag or commit of a teacher on the Hub")
    add("--manifest", type=Path, metavar="FILE", help="manifest of the conversion (the one in the model's folder)")
    add("--run", type=Path, metavar="DIR", help="output folder of the Trainer that trained it")
    add("--text", nargs="+", type=Path, metavar="FILE", default=[HELD_OUT_TEXT], help="text that training never saw")
    add("--tokens", type=int, metavar="N", help="read no more than so many tokens of each text")
    add("--loops", nargs="+", type=int, metavar="T", help="loop counts to measure (1, 2, 4 and the model's)")
    add("--context", type=int, default=1024, metavar="S", help="tokens of context for the costs (%(default)s)")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (%(default)s)")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace, command: str) -> Path:
    """Check everything that can be checked without weights, then load, measure and write.

    Raises:
        ValueError: for options or files that cannot work, with what would.
    """
    step = Steps(print)
    check_device(options.device)
    checked_length(options.context, "context")
    if options.tokens is not None:
        checked_length(options.tokens, "tokens")
    names = [path.stem for path in options.text]
    if len(set(names)) < len(names):
        raise ValueError(f"text={[str(path) for path in options.text]}: the files must differ in name.")
    contents = {path.stem: path.read_text(encoding="utf-8") for path in options.text}
    run = None if options.run is None else read_run(options.run)
    manifest = None if options.teacher is None else read_manifest(options.manifest or options.model)
    if not (options.model / "config.json").is_file():
        raise ValueError(f"model={str(options.model)!r} has no config.json.")

    step(f"loading {options.model}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(options.device).eval()
    if not isinstance(model, LoopedForCausalLM):
        raise ValueError(
            f"model={str(options.model)!r} is a {type(model).__name__}, and reports are on LoopedForCausalLM."
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    layers = None if manifest is None else layer_map_of(manifest, model.config)
    teacher = None
    if options.teacher is not None:
        files = find_teacher(options.teacher, gguf_file=options.gguf_file, revision=options.revision)
        step(f"loading the teacher {options.teacher}")
        teacher = files.model(dtype=options.dtype, device=options.device).eval()
    length = min(512, model.config.max_position_embeddings)
    texts = {name: text_windows(tokenizer, content, length=length) for name, content in contents.items()}
    if options.tokens is not None:
        texts = {name: windows[: max(1, options.tokens // length)] for name, windows in texts.items()}
    loops = options.loops or sorted({1, 2, 4, model.config.num_loops})
    figures = measure(
        model, texts, loops=loops, context=options.context, teacher=teacher, layers=layers, run=run, progress=step
    )
    hashes = {path.name: sha256(path) for path in options.text}
    written = write_report(
        figures,
        model,
        options.output,
        name=options.name or options.model.resolve().name,
        command=command,
        source={"texts_sha256": hashes, "torch": torch.__version__},
    )
    step(f"written to {written}")
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        report(options, shlex.join(["python", "conversion/report.py", *given]))
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
