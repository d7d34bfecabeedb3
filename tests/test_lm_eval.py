"""`lm_eval --model hf` on a looped model: stock, no subclass, the loop count in `--model_args`.

Fifty items of two local tasks give what the model's own API gives for each item alone, at the loop count asked for.
"""

import json
import os
import subprocess
import sys
from functools import partial

import lm_eval
import pytest
import torch
from helpers import tiny_model
from lm_eval.tasks import TaskManager
from once import once_per_run
from training import tiny_tokenizer
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1.0
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["z"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
TASKS = ("local_choice", "local_generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return once_per_run(tmp_path_factory, "lm_eval", prepare)


def prepare(folder) -> None:
    """Save a model that answers differently at every loop count, and two tasks on fifty items of unequal lengths."""
    torch.manual_seed(0)
    tiny_model(std=1.0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"question": f"{7 * a} and {13 * b} make", "choices": [str(7 * a + 13 * b), "nothing", "9"], "answer": 0}
        for a in range(5)
        for b in range(10)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, rest in zip(TASKS, (CHOICE, GENERATE), strict=True):
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "data.jsonl") + rest)


def evaluate_here(folder, num_loops: int, factory) -> dict:
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder / 'model'},num_loops={num_loops},dtype=float32",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=8,
        log_samples=True,
        bootstrap_iters=0,
    )


def evaluate_by_command(folder, num_loops: int, factory) -> dict:
    """As a user types it, in a process where nobody imports the package: the folder's own code runs."""
    output = once_per_run(factory, f"lm_eval_{num_loops}", partial(run_command, folder, num_loops))
    (written,) = output.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (file,) = output.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return {**json.loads(written.read_text()), "samples": samples}


def run_command(folder, num_loops: int, output) -> None:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    model_args = f"pretrained={folder / 'model'},num_loops={num_loops},dtype=float32,trust_remote_code=True"
    command += ["--model_args", model_args, "--tasks", *TASKS, "--include_path", str(folder / "tasks")]
    command += ["--output_path", str(output), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


WAYS = {"here_4": (evaluate_here, 4), "by_command_1": (evaluate_by_command, 1)}


@pytest.fixture(scope="module", params=WAYS)
def evaluated(request, folder, tmp_path_factory):
    """(results, the model and its tokenizer at the default loop count, the loop count asked for)."""
    evaluate, num_loops = WAYS[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert model.config.num_loops not in {count for _, count in WAYS.values()}
    return evaluate(folder, num_loops, tmp_path_factory), model, num_loops


def log_likelihood(model, tokenizer, question: str, choice: str, num_loops: int) -> float:
    ids = tokenizer(question + choice, return_tensors="pt")["input_ids"]
    start = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        log_probabilities = model(ids, num_loops=num_loops).logits.log_softmax(-1)
    return float(log_probabilities[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum())


def test_log_likelihoods_equal_those_of_each_item_alone(evaluated):
    results, model, num_loops = evaluated
    tokenizer, differs = tiny_tokenizer(), 0.0
    assert len(results["samples"]["local_choice"]) == 50
    for sample in results["samples"]["local_choice"]:
        for choice, response in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            question = sample["doc"]["question"]
            expected = log_likelihood(model, tokenizer, question, " " + choice, num_loops)
            assert float(response[0]) == pytest.approx(expected, abs=1e-3)
            at_default = log_likelihood(model, tokenizer, question, " " + choice, model.config.num_loops)
            differs = max(differs, abs(at_default - expected))
    assert differs > 0.1


def test_generations_equal_those_of_each_item_alone(evaluated):
    results, model, num_loops = evaluated
    tokenizer, differs = tiny_tokenizer(), 0
    assert len(results["samples"]["local_generate"]) == 50
    for sample in results["samples"]["local_generate"]:
        inputs = tokenizer(sample["doc"]["question"], return_tensors="pt", return_token_type_ids=False)
        texts = []
        for count in (num_loops, model.config.num_loops):
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_loops=count)
            texts.append(
                tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split("z")[0]
            )
        assert sample["filtered_resps"] == [texts[0]]
        differs += texts[0] != texts[1]
    assert differs > 5


def test_the_results_record_the_loop_count(evaluated):
    results, _, num_loops = evaluated
    arguments = results["config"]["model_args"]
    recorded = arguments if isinstance(arguments, str) else json.dumps(arguments).replace('": ', "=").replace('"', "")
    assert f"num_loops={num_loops}" in recorded
