"""Distil: a converted model learns from the checkpoint it was made of.

    python conversion/distill.py --recipe configuration/recipes/smollm2_135m_compress_20.yaml --output_dir build/healed
    python conversion/distill.py --recipe ... --learning_rate 1e-3 --trainable adapters --max_train_tokens 500000
    accelerate launch --config_file configuration/accelerate/ddp.yaml conversion/distill.py --recipe ...

Any value of the recipe can be overridden. The same command goes on where a run stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import compress
import retrofit

from modeling_looped.conversion.output_folder import MANIFEST
from modeling_looped.training.config import DistillationConfig
from modeling_looped.training.recipe import RunConfig
from modeling_looped.training.run import distill, training_source
from modeling_looped.training.session import run_program

#: Programs of this folder that make a student.
PROGRAMS = {"compress": compress.main, "retrofit": retrofit.main}

#: Enough for 16,384 tokens of any tokenizer; `compress.py` reads as many of them as its options say.
CALIBRATION_CHARACTERS = 200_000


def make_student(run: RunConfig, args: DistillationConfig) -> str:
    """The student's folder; where the recipe says how it is made from the teacher, it is made, once.

    Raises:
        ValueError: if that fails, or the recipe names another program.
    """
    if not isinstance(run.student, dict):
        return str(run.student)
    program = run.student["program"]
    if program not in PROGRAMS:
        raise ValueError(f"student: program={program!r} must be one of: {', '.join(PROGRAMS)}.")
    start = Path(str(args.output_dir)) / "start"
    with args.main_process_first(desc="making the student"):
        if (start / MANIFEST).is_file():
            check_same_start(start, run.student)
        else:
            start.parent.mkdir(parents=True, exist_ok=True)
            note_of(start).write_text(json.dumps(run.student, indent=2) + "\n", encoding="utf-8")
            options = options_of(run, args, start)
            if options.get("adapter") == "fitted" and "calibration" not in options:
                options["calibration"] = calibration_text(run, args)
            if PROGRAMS[program](command_line(options)):
                raise ValueError(f"student: {program}.py could not make it.")
    return str(start)


def options_of(run: RunConfig, args: DistillationConfig, start: Path) -> dict[str, Any]:
    """The options of the program that makes the student in `start` from this run's teacher."""
    student: Any = run.student
    return {
        "teacher": args.teacher_model_name_or_path,
        "gguf-file": args.teacher_gguf_file,
        "revision": args.teacher_model_revision,
        "output": start,
        **student["options"],
    }


def note_of(start: Path) -> Path:
    """The file beside a student that says how the recipe had it made."""
    return start.with_name(f"{start.name}.json")


def check_same_start(start: Path, student: dict[str, Any]) -> None:
    """Raise ValueError if the student in `start` was made in another way than the recipe says."""
    note = note_of(start)
    made = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else student
    if made != json.loads(json.dumps(student)):
        raise ValueError(
            f"student={student} is not the one in {str(start)!r}, which was made by {made}: choose another "
            "output_dir, or remove that folder with the checkpoints of its run."
        )


def calibration_text(run: RunConfig, args: DistillationConfig) -> Path:
    """A file with the beginning of the text to train on, for a start that is fitted to text."""
    output = Path(str(args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    documents = training_source(run, args).beginning(CALIBRATION_CHARACTERS)
    file = output / "calibration.txt"
    file.write_text("\n\n".join(documents), encoding="utf-8")
    return file


def command_line(options: dict[str, Any]) -> list[str]:
    """`{"loops": 2, "force": True}` as `--loops 2 --force`."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{str(name).replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def make_and_distill(run: RunConfig, args: DistillationConfig, **options: Any) -> dict[str, Any]:
    """Make the student, where the recipe says how, and distil; `options` are those of `distill`."""
    run.student = make_student(run, args)
    return distill(run, args, **options)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_program("python conversion/distill.py", given, (RunConfig, DistillationConfig), make_and_distill)


if __name__ == "__main__":
    sys.exit(main())
