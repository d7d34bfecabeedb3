"""How close every imported checkpoint comes to its original, on the recordings in `tests/fixtures/`.

Those in `tests/fixtures/options/` are of single options, the others of whole checkpoints.

    python benchmarks/parity.py [--output benchmarks/results/parity.json]

Each row imports one tiny checkpoint that the original code made, runs it on the recorded tokens and prints the largest
absolute difference from the recorded logits (fp32) beside the original's own noise: its largest difference between
fp32 and fp64. A difference of the size of the noise says that only the order of floating-point operations differs.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fixtures.published import FAMILY_OF, described, imported_folder, load, recording
from fixtures.published_options import FOLDER, OPTIONS, option, option_folder
from safetensors.torch import load_file

from modeling_looped import LoopedForCausalLM
from modeling_looped.conversion import import_checkpoint
from modeling_looped.conversion.parity import compare_with_recording


def option_difference(name: str) -> float:
    """Largest difference of a logit, for the recording of one option."""
    described_as = option(name)
    with tempfile.TemporaryDirectory() as folder:
        source, output = option_folder(name, Path(folder) / "source"), Path(folder) / "imported"
        import_checkpoint(source, output, settings=described_as["settings"])
        model = LoopedForCausalLM.from_pretrained(output)
    tensors = load_file(FOLDER / name / "io.safetensors")
    with torch.no_grad():
        logits = model(tensors["input_ids"], use_cache=False).logits
    return (logits - tensors["logits"]).abs().max().item()


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    print("| checkpoint | family | largest difference | the original's own noise | ratio |")
    print("|---|---|---|---|---|")

    def add(name: str, family: str, difference: float, noise: float) -> None:
        rows[name] = {"family": family, "max_difference": difference, "noise_floor": noise}
        print(f"| {name} | {family} | {difference:.1e} | {noise:.1e} | {difference / noise:.2f} |")

    for name in sorted(FAMILY_OF):
        with tempfile.TemporaryDirectory() as folder:
            model = load(name, imported_folder(name, Path(folder)))
        difference = compare_with_recording(model, recording(name)).original["logits"]
        add(name, FAMILY_OF[name], difference, described(name)["run"]["noise_floor"])
    for name in OPTIONS:
        add(f"options/{name}", option(name)["family"], option_difference(name), option(name)["run"]["noise_floor"])
    if args.output:
        results = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
