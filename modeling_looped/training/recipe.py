"""Recipes: everything that a training run depends on, as YAML, with any value overridden on a command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_pt_utils import AcceleratorConfig


@dataclass
class DataConfig:
    """Text of a run.

    Attributes:
        dataset_name: file, folder, or Hub id of the text to train on.
        dataset_config, dataset_split: of a Hub data set.
        dataset_text_field: column that holds the text.
        dataset_streaming: whether text is read as it is needed.
        eval_datasets: name -> file, folder or Hub id, or a mapping with `path`, `config`, `split`, `text_field`.
        max_length: tokens in a block.
        max_train_tokens: tokens to train on; `None`: all of them, once, unless `num_train_epochs` or `max_steps` says
            otherwise.
        max_eval_tokens: tokens of each evaluation set.
    """

    #: Fields that hold a mapping, which a command line gives as JSON.
    MAPPINGS: ClassVar[tuple[str, ...]] = ("eval_datasets",)

    dataset_name: str | None = field(default=None, metadata={"help": "File, folder or Hub id of the training text."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether text is read as it is needed."})
    eval_datasets: dict | str | None = field(
        default=None, metadata={"help": "Name and place of each evaluation set, as JSON."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens in a block."})
    max_train_tokens: int | None = field(default=None, metadata={"help": "Tokens to train on."})
    max_eval_tokens: int = field(default=65536, metadata={"help": "Tokens of each evaluation set."})

    def __post_init__(self):
        for name in self.MAPPINGS:
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                setattr(self, name, from_json(name, value))
        if self.dataset_name is None:
            raise ValueError("dataset_name is missing: a file, a folder or a Hub id of the text to train on.")
        self.check_mapping("eval_datasets")
        self.check_positive("max_length", "max_train_tokens", "max_eval_tokens")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2: one token has no next one.")

    def check_mapping(self, name: str) -> None:
        """Raise ValueError if the field `name` holds text that is no mapping."""
        if isinstance(getattr(self, name), str):
            raise ValueError(f"{name}={getattr(self, name)!r} must be a mapping (on a command line: JSON).")

    def check_positive(self, *names: str) -> None:
        """Raise ValueError unless the fields `names` are `None` or at least 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


@dataclass
class RunConfig(DataConfig):
    """Student and data of a distillation run; the teacher and how to train are in `DistillationConfig`.

    Attributes:
        student: folder or Hub id of the model that learns; or, as a mapping, how it is made from the teacher:
            `{"program": "compress", "options": {"loops": 2, ...}}` with the options of `conversion/compress.py` or
            `conversion/retrofit.py`.
        student_gguf_file: GGUF file in the student's folder.
        student_config: fields of the student's config to change, such as `{"num_loops": 4}`.
        student_dtype: of the student's weights while they train.
        student_attn_implementation: which of Transformers' attentions computes it (`sdpa`, `eager`, …); `None`:
            its own choice.
        teacher_targets: folder for the teacher's distributions, computed once before training; `None`: the teacher
            runs beside the student.
        top_k: entries that are kept of each distribution.
    """

    MAPPINGS: ClassVar[tuple[str, ...]] = ("student", "student_config", "eval_datasets")

    student: dict | str | None = field(
        default=None, metadata={"help": "Folder or Hub id, or as JSON how it is made from the teacher."}
    )
    student_gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the student's folder."})
    student_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the student's config to change, as JSON."}
    )
    student_dtype: str = field(default="float32", metadata={"help": "Dtype of the student's weights."})
    student_attn_implementation: str | None = field(
        default=None, metadata={"help": "The student's attention: `sdpa`, `eager`, `flash_attention_2`, …"}
    )
    teacher_targets: str | None = field(
        default=None, metadata={"help": "Folder for the teacher's distributions, computed once."}
    )
    top_k: int = field(default=64, metadata={"help": "Entries that are kept of each distribution."})

    def __post_init__(self):
        super().__post_init__()
        if self.student is None:
            raise ValueError("student is missing: a folder, a Hub id, or how it is made from the teacher.")
        if isinstance(self.student, dict) and set(self.student) != {"program", "options"}:
            raise ValueError(f"student={self.student} must have the keys `program` and `options`.")
        self.check_mapping("student_config")
        self.check_positive("top_k")
        if self.dataset_streaming and self.teacher_targets is not None:
            raise ValueError(
                "teacher_targets belong to blocks that are known before training, and dataset_streaming=True makes "
                "them as it goes: leave one of the two out."
            )


def from_json(name: str, text: str) -> Any:
    """A mapping from JSON text; raises ValueError that names the field."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={text!r} is not JSON: {error}.") from error


def parse_recipe(arguments: Sequence[str], configs: Any, prog: str = "") -> Any:
    """A recipe from a command line: `--recipe FILE` and any field of the dataclasses `configs`.

    A later value wins: those of the command line over those of the file.

    Args:
        arguments: the command line.
        configs: dataclasses, of which one is a `TrainingArguments`, such as `(RunConfig, DistillationConfig)`.
        prog: what `--help` calls the program.

    Returns:
        an instance of each of `configs`.

    Raises:
        ValueError: for a name that no field has, with the nearest that one has, and for values that make no sense.
    """
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    head.add_argument("--recipe", type=Path, help="YAML file with the values of any options below")
    options, rest = head.parse_known_args(arguments)
    parser: Any = HfArgumentParser(configs, parents=[head], allow_abbrev=False, prog=prog or None)
    actions = {action.dest: action for action in parser._actions}
    given = read_recipe(options.recipe, configs) if options.recipe else {}
    for action in actions.values():
        if action.dest != "help":
            action.default, action.required = argparse.SUPPRESS, False
    parsed, unknown = parser.parse_known_args(rest)
    check_names([name.partition("=")[0].lstrip("-") for name in unknown if name.startswith("--")], actions, "--")
    if unknown:
        raise ValueError(f"the command line has values that belong to no option: {' '.join(unknown)}.")
    merged = {**given, **vars(parsed)}
    merged.pop("recipe", None)
    if "output_dir" not in merged:
        raise ValueError("output_dir is missing: the folder for checkpoints and the result.")
    return parser.parse_dict(merged)


def read_recipe(path: Path, configs: Iterable[type]) -> dict[str, Any]:
    """The values in a YAML file, in the types of the fields of the dataclasses `configs`.

    Raises:
        ValueError: if it is not a mapping, or for a name or a value that no field takes.
    """
    if not path.is_file():
        raise ValueError(f"recipe={str(path)!r} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines.")
    hints = {name: hint for config in configs for name, hint in get_type_hints(config).items()}
    known = [entry.name for config in configs for entry in dataclasses.fields(config) if entry.init]
    names = [str(name) for name in values]
    check_names(names, known, str(path))
    typed = {}
    for name, value in zip(names, values.values(), strict=True):
        field_name = name.replace("-", "_")
        if field_name in typed:
            raise ValueError(f"{path} has {field_name!r} twice.")
        try:
            typed[field_name] = in_type(value, hints[field_name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}={value!r} must be {error}.") from error
    return typed


def in_type(value: Any, hint: Any) -> Any:
    """A value of a YAML file as a field with this type hint takes it: `'1e-3'`, which YAML reads as text, as a number.

    Raises:
        ValueError: if it takes no such value; says what it takes.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None:
        if type(None) not in members:
            raise ValueError("given: it has no value here")
        return None
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if value is False and any("no" in [choice.value for choice in enum] for enum in enums):
        return "no"  # which YAML takes for its word for false
    rest = [member for member in members if member is not type(None)]
    if rest == [bool]:
        return as_flag(value)
    if rest in ([int], [float]):
        return as_number(value, rest[0])
    if rest == [str]:
        if isinstance(value, (bool, list, dict)):
            raise ValueError("text")
        return str(value)
    if len(rest) == 1 and get_origin(rest[0]) is list:
        (kind,) = get_args(rest[0])
        return [in_type(item, kind) for item in (value if isinstance(value, list) else [value])]
    return value


def as_flag(value: Any) -> bool:
    """True or false, or a word for it; raises ValueError for anything else."""
    if isinstance(value, str):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return string_to_bool(value)
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def as_number(value: Any, kind: type) -> int | float:
    """A number as an `int` or a `float`; raises ValueError for what is none, or not a whole one."""
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = int(value) if isinstance(value, int) else float(value)
    if kind is int and not float(number).is_integer():
        raise ValueError("an integer")
    if math.isnan(number):
        raise ValueError("a number")
    return int(number) if kind is int else number


def check_names(names: Iterable[str], known: Iterable[str], place: str) -> None:
    """Raise ValueError for names that do not exist, with the nearest that do."""
    known = list(known)
    unknown = [name for name in names if name.replace("-", "_") not in known]
    if unknown:
        near = [difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5) for name in unknown]
        hints = [
            f"{name!r}" + (f" (did you mean {match[0]!r}?)" if match else "")
            for name, match in zip(unknown, near, strict=True)
        ]
        raise ValueError(f"{place}: no option is called {', '.join(hints)}.")


def changed_values(config: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values are not their defaults, as JSON can hold them."""
    values = config.to_dict() if isinstance(config, TrainingArguments) else dataclasses.asdict(config)
    changed = {}
    for entry in dataclasses.fields(config):
        if entry.name not in values or entry.name == "hub_token":
            continue
        value = values[entry.name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if entry.name == "accelerator_config":  # becomes an object, with defaults of its own
            plain = AcceleratorConfig().to_dict()
            value = {name: setting for name, setting in dict(value or {}).items() if setting != plain.get(name)}
        if value != default and not (empty(value) and empty(default)):
            changed[entry.name] = value
    return changed


def empty(value: Any) -> bool:
    """Whether a field says nothing; 0 says something."""
    return value is None or value is False or value in ("", [], {})


__all__ = ["DataConfig", "RunConfig", "changed_values", "parse_recipe"]
