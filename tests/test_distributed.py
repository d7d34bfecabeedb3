"""Two processes (gloo, CPU) compute what one does: DDP and FSDP2, checkpointed or not, fixed and random loop counts.

Each worker in `tests/distributed/` runs all of its cases in one launch; the tests here read what it measured.
"""

import json
from functools import partial

import pytest
import torch
from distributed.gradients import CASES
from distributed.guard import SPIKE
from distributed.guard import STEPS as STEPS_OF_GUARD
from distributed.launch import launch
from distributed.trainer import BATCH, OPTIMISER, STEPS, WAYS
from helpers import assert_close, random_tokens, tiny_model
from once import once_per_run
from safetensors.torch import load_file
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = once_per_run(tmp_path_factory, "distributed_gradients", partial(launch, "gradients.py"))
    return {"folder": folder, **json.loads((folder / "gradients.json").read_text())}


def case_id(case: tuple[str, ...]) -> str:
    return "/".join(case)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_equal_those_of_one_process(measured, case):
    """With `find_unused_parameters=False`: every parameter takes part in every step, whatever its loop count."""
    result = measured[case_id(case)]
    assert result["missing"] == []
    assert result["error"] <= 1e-5
    assert result["error_without_reduction"] > 1e-2
    assert case[2] == "fixed" or len(set(result["loops"])) > 1


def traffic(measured, strategy: str, loops: str) -> list[tuple[int, float]]:
    """Loop count and bytes gathered by every step, in multiples of all parameters."""
    result = measured[f"{strategy}/none/{loops}/plain"]
    return [
        (num_loops, gathered / result["parameter_bytes"])
        for num_loops, (gathered, _) in zip(result["loops"], result["moved"], strict=True)
    ]


@pytest.mark.parametrize("loops", ["fixed", "random"])
def test_bytes_gathered_by_fsdp(measured, loops, record_property):
    """Freed after forward, the core is gathered twice per loop; kept, once per loop; resident, once per step."""
    result = measured["fsdp/none/fixed/plain"]
    core = result["core_bytes"] / result["parameter_bytes"]
    expected = {
        "fsdp": lambda num_loops: 2 * (1 - core) + 2 * num_loops * core,
        "fsdp_kept": lambda num_loops: (1 - core) + num_loops * core,
    }
    if loops == "random":
        expected["fsdp_resident"] = lambda num_loops: 1.0
    for strategy, formula in expected.items():
        steps = traffic(measured, strategy, loops)
        record_property(strategy, steps)
        for num_loops, gathered in steps:
            assert gathered == pytest.approx(formula(num_loops), rel=1e-2)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_kept", "fsdp_resident"])
def test_a_shared_gradient_is_reduced_once_per_step(measured, strategy):
    """However many loops used the weight."""
    result = measured[f"{strategy}/none/random/plain"]
    for _, reduced in result["moved"]:
        assert reduced == pytest.approx(result["parameter_bytes"], rel=1e-2)


@pytest.mark.parametrize("variant", ["plain", "norms", "tied"])
def test_what_fsdp_saves_loads_in_one_process(measured, variant):
    """`save_pretrained` of the sharded model wrote the whole one, every shared layer once, with its code."""
    start, saved = measured["folder"] / "start" / variant, measured["folder"] / variant
    assert (saved / "modeling_looped.py").exists()
    tokens = random_tokens()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (start, saved)]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    names = [set(load_file(folder / "model.safetensors")) for folder in (start, saved)]
    # Transformers writes gathered tied weights twice (huggingface/transformers#48972); equal, so nothing is lost
    assert names[1] - names[0] == ({"lm_head.weight"} if variant == "tied" else set())
    assert names[0] <= names[1]


def train_in_two_processes(folder) -> None:
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder / "start")
    launch("trainer.py", folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same run in one process, and what the worker did in two."""
    folder = once_per_run(tmp_path_factory, "distributed_trainer", train_in_two_processes)
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    arguments = run_arguments(
        tmp_path_factory.mktemp("single"), max_steps=STEPS, per_device_train_batch_size=2 * BATCH, **OPTIMISER
    )
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    Trainer(model, arguments, train_dataset=sentence_dataset(), data_collator=collator).train()
    return {"folder": folder, "single": model, **json.loads((folder / "trainer.json").read_text())}


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_in_two_processes_equals_one(trained, way):
    """After three steps on the same tokens; the folder that it saved holds the whole model."""
    assert trained[way]["processes"] == 2
    assert trained[way]["is_ddp"] == way.startswith("ddp")
    assert (trained[way]["sharded_modules"] > 4) == way.startswith("fsdp")
    assert trained[way]["recomputes"] == way.endswith("loop")
    start = weights(AutoModelForCausalLM.from_pretrained(trained["folder"] / "start"))
    saved = weights(AutoModelForCausalLM.from_pretrained(trained["folder"] / way))
    for name, tensor in weights(trained["single"]).items():
        assert not torch.equal(tensor, start[name]), name
        assert_close(saved[name], tensor, atol=1e-5)


def test_processes_agree_on_a_spike_that_one_of_them_sees(tmp_path):
    """Else one would save while the other goes on, and both would wait for ever."""
    launch("guard.py", tmp_path)
    first, second = (json.loads((tmp_path / f"guard-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["spikes"] == [int(step == SPIKE) for step in range(1, STEPS_OF_GUARD + 1)]
    assert first["losses"][-1] == pytest.approx(4.6, rel=0.2)  # of all tokens: the log of 100 of them, or less
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == set(range(1, STEPS_OF_GUARD + 1)) - {SPIKE}
