"""The whole product once: loop a real checkpoint, chat with it at several loop counts, save it, load it again.

    python conversion/demo.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --output build/demo

The middle four layers of the teacher become the core. `make demo` brings a teacher along.
"""

import argparse
import functools
import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from modeling_looped import LoopedForCausalLM, __version__
from modeling_looped.conversion import ConversionError, find_teacher, retrofit_checkpoint

PROMPT = "Name three things that a plant needs to grow."
LOOPS = (1, 2, 4)
CORE = 4
NEW_TOKENS = 48

say = functools.partial(print, flush=True)  # line by line also where the output is a pipe


def main() -> int:
    """Run the demo; returns its exit status."""
    start = time.perf_counter()
    options = parse()
    say(f"modeling_looped {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")

    say(f"1. Loop {options.teacher}\n")
    try:
        teacher = find_teacher(options.teacher, gguf_file=options.gguf_file)
        say("reading how many layers it has")
        around = teacher.config.num_hidden_layers - CORE
        model, tokenizer, _ = retrofit_checkpoint(
            teacher,
            options.output,
            prelude=around // 2,
            core=CORE,
            coda=around - around // 2,
            loops=2,
            overwrite=True,
            command=shlex.join(["python", *sys.argv]),
            report=say,
        )
    except (ValueError, OSError, ConversionError) as error:
        say(f"demo.py: {error}")
        return 1

    say(f"\n2. Ask it, with 1, 2 and 4 loops of the same weights\n\n> {PROMPT}\n")
    answers = {}
    for loops in LOOPS:
        asked = time.perf_counter()
        answers[loops] = answer(model, tokenizer, loops)
        speed = len(answers[loops]) / (time.perf_counter() - asked)
        text = tokenizer.decode(answers[loops], skip_special_tokens=True)
        say(f"num_loops={loops} ({speed:.0f} tokens/s): {text}\n")

    say(f"3. Load {options.output} with AutoModelForCausalLM in a new process, and ask again")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new_process:
        reloaded = new_process.submit(answers_of_saved, options.output).result()
    for loops in LOOPS:
        same = "the same tokens" if reloaded[loops] == answers[loops] else f"OTHER TOKENS: {reloaded[loops]}"
        say(f"   num_loops={loops}: {same}")
    if reloaded != answers:
        return 1
    say(f"\nDone in {time.perf_counter() - start:.0f} s. {options.output}/looped_manifest.json says what was done.")
    return 0


def answer(model: LoopedForCausalLM, tokenizer: PreTrainedTokenizerBase, loops: int) -> list[int]:
    """The tokens that the model answers PROMPT with, greedily."""
    prompt = PROMPT
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": PROMPT}]
        prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    # a chat template writes the special tokens itself
    inputs = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    settings = {"num_loops": loops, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = model.generate(**inputs, **settings)  # pyright: ignore[reportAttributeAccessIssue] (self is a protocol)
    return tokens[0, inputs.input_ids.shape[1] :].tolist()


def answers_of_saved(folder: Path) -> dict[int, list[int]]:
    """Load what is in `folder` and answer with every loop count: runs in a process that has seen nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if not isinstance(model, LoopedForCausalLM):
        raise TypeError(f"AutoModelForCausalLM made a {type(model).__name__} of {folder}.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {loops: answer(model, tokenizer, loops) for loops in LOOPS}


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, metavar="PATH_OR_ID", help="folder or Hub id of the checkpoint to loop")
    add("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write; an earlier result is replaced")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
