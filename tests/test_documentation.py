"""What the documentation says exists: linked files and headings, imported names, programs and their options."""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).parents[1]
#: Documents written by hand, with blocks and links of their own.
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "configuration/README.md",
    "conversion/README.md",
    "model_cards/README.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def text_of(document: str) -> str:
    """A document."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Its code blocks in a language."""
    return [code for name, code in BLOCK.findall(text_of(document)) if name == language]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    lost = []
    for link in LINK.findall(BLOCK.sub("", text_of(document))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_parses_and_imports_what_exists(document):
    for code in blocks(document, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def commands(document: str) -> list[list[str]]:
    """Words of the command lines that run a program of ours, in blocks and in the text."""
    text = text_of(document)
    lines = [line for code in blocks(document, "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]*)`", BLOCK.sub("", text).replace("\n", " "))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        programs = [i for i, word in enumerate(words) if word.endswith(".py")]
        if programs and "python" in words[: programs[0]]:
            found.append(words[programs[0] :])
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_programs_exist_and_know_the_options_they_are_shown_with(document):
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "modeling_looped").rglob("*.py")))
    trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    wrong = []
    for program, *words in commands(document):
        path = ROOT / program if (ROOT / program).exists() else (ROOT / document).parent / program
        if not path.exists():
            wrong.append(program)
            continue
        known = path.read_text(encoding="utf-8") + sources
        if path.parent.name == "benchmarks":
            known += (path.parent / "small_runs.py").read_text(encoding="utf-8")
        for word in words:
            # an option of argparse, or a field of a dataclass that becomes one
            name = word.removeprefix("--").partition("=")[0]
            is_known = f'"--{name}"' in known or name in trainer or re.search(rf"^ +{name}: ", known, re.MULTILINE)
            if word.startswith("--") and not is_known:
                wrong.append(f"{program} {word}")
    assert not wrong
