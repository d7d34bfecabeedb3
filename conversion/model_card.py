"""Write the model card of a looped model from its manifest and the figures of conversion/report.py.

    python conversion/model_card.py --model build/demo --report build/demo-report --license apache-2.0 \
        --base-model HuggingFaceTB/SmolLM2-135M-Instruct --language en --repo-id you/smollm2-looped

The card is written as README.md into the model's folder, where the Hub looks for it, or to --output.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_looped import LoopedConfig
from modeling_looped.conversion.output_folder import MANIFEST
from modeling_looped.reporting.card import RELATIONS, CardFields, model_card
from modeling_looped.reporting.layer_map import layer_map_of, read_manifest
from modeling_looped.reporting.report import FIGURES
from modeling_looped.reporting.run_log import read_json


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="folder of the looped model")
    add("--report", required=True, type=Path, metavar="DIR", help="what conversion/report.py wrote about it")
    add(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="manifest of the conversion (the one in the model's folder, or in its start/, if any)",
    )
    add("--license", required=True, help="the Hub's word for it, such as apache-2.0, or other")
    add("--license-name", metavar="NAME", help="of a licence that the Hub does not know")
    add("--license-link", metavar="URL", help="where its text is")
    add("--repo-id", metavar="ID", help="where the model will be on the Hub, for the example (the model's folder)")
    add("--base-model", metavar="ID", help="the teacher on the Hub")
    add(
        "--relation", default="finetune", choices=RELATIONS, help="to the base model, in the Hub's words (%(default)s)"
    )
    add("--language", nargs="+", default=[], metavar="CODE", help="ISO 639 codes, such as en")
    add("--datasets", nargs="+", default=[], metavar="ID", help="training data on the Hub")
    add("--trained-loops", metavar="RANGE", help="loop counts used in training, such as 1-4")
    add("--summary", help="first paragraph")
    add("--limits", type=Path, metavar="FILE", help="Markdown of the section on limits")
    add("--prompt", default="A plant needs", help="of the example (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="where to write (README.md in the model's folder)")
    add("--force", action="store_true", help="replace a card that is there")
    return parser.parse_args(arguments)


def manifest_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of the conversion: the file that was named, the model's own, or that of the start of its healing."""
    if options.manifest is not None:
        return read_manifest(options.manifest)
    own, start = options.model / MANIFEST, options.model / "start" / MANIFEST
    if own.is_file():
        return read_manifest(own)
    # loops that were trained before the healing say nothing of it
    return {**read_manifest(start), "trained_loops": None} if start.is_file() else None


def write(options: argparse.Namespace) -> Path:
    """Make the card and write it.

    Raises:
        ValueError: for files that are missing or do not fit, and for metadata that the Hub would refuse.
    """
    output = options.output or options.model / "README.md"
    if output.exists() and not options.force:
        raise ValueError(f"output={str(output)!r} exists: choose another file, or pass --force to replace it.")
    figures = options.report / FIGURES
    if not figures.is_file():
        raise ValueError(f"report={str(options.report)!r} holds no {FIGURES}: run conversion/report.py first.")
    config = AutoConfig.from_pretrained(options.model)
    if not isinstance(config, LoopedConfig):
        raise ValueError(
            f"model={str(options.model)!r} is of type {config.model_type!r}, and the card is for looped models."
        )
    manifest = manifest_of(options)
    maps = manifest is not None and ("plan" in manifest or "layers" in manifest)
    fields = CardFields(
        license=options.license,
        repo_id=options.repo_id or str(options.model),
        base_model=options.base_model,
        relation=options.relation,
        language=tuple(options.language),
        datasets=tuple(options.datasets),
        trained_loops=options.trained_loops,
        summary=options.summary,
        limits=None if options.limits is None else options.limits.read_text(encoding="utf-8"),
        prompt=options.prompt,
        license_name=options.license_name,
        license_link=options.license_link,
    )
    layers = layer_map_of(manifest, config) if manifest is not None and maps else None
    card = model_card(config, read_json(figures), fields, manifest=manifest, layers=layers)
    output.parent.mkdir(parents=True, exist_ok=True)
    card.save(output)
    return output


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = parse(arguments)
    try:
        print(f"written to {write(options)}")
    except (ValueError, OSError) as error:
        print(f"model_card.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
