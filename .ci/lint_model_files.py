"""Run `transformers-mlinter` on the model files: every rule, except those that `pyproject.toml` switches off.

The `mlinter` command cannot switch a rule off, and reads only files named like `modeling_*.py`: all its rules look at
the name. Our model is spread over one file per idea, so this program hands each to the linter under such a name.

    python .ci/lint_model_files.py
"""

import sys
import tomllib
from pathlib import Path

from mlinter.mlinter import FILE_PREFIXES, TRF_RULES, analyze_file

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_looped"
NOT_MODEL_CODE = {"__init__.py", "version.py"}


def linted_name(name: str) -> str:
    """The name under which the linter sees a file: `injection.py` becomes `modeling_injection.py`."""
    return name if name.startswith(FILE_PREFIXES) else f"modeling_{name}"


def main() -> int:
    """Print one line per finding; returns 1 if there is any, 0 otherwise."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        switched_off = tomllib.load(file)["tool"]["modeling-looped"]["mlinter-off"]
    problems = [f"pyproject.toml: mlinter has no rule {rule}" for rule in switched_off if rule not in TRF_RULES]

    files = [path for path in sorted(PACKAGE.glob("*.py")) if path.name not in NOT_MODEL_CODE]
    unneeded = set(switched_off) & set(TRF_RULES)
    for path in files:
        text = path.read_text(encoding="utf-8")
        for found in analyze_file(path.with_name(linted_name(path.name)), text, enabled_rules=set(TRF_RULES)):
            if found.rule_id in switched_off:
                unneeded.discard(found.rule_id)
            else:
                problems.append(f"{path.relative_to(ROOT)}:{found.line_number}: {found.message}")
    problems += [f"pyproject.toml: {rule} is off but finds nothing: switch it on" for rule in sorted(unneeded)]

    summary = f"mlinter: {len(files)} files, {len(TRF_RULES) - len(switched_off)} rules, {len(problems)} findings"
    print("\n".join([*problems, summary]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
