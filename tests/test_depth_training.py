"""Sampled depth under the stock `Trainer`: no subclass, no callback of ours; and in two processes."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed.depth import CASES
from distributed.launch import launch
from helpers import random_tokens, randomise, tiny_model
from once import once_per_run
from peft import LoraConfig, PeftModel, get_peft_model
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

SAMPLED = {"type": "poisson", "mean": 3, "curriculum": "linear", "curriculum_steps": 6, "seed": 4}


class Killed(Exception):
    """What ends a run in the middle."""


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def fresh_model(seed: int = 0, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_model(seed=seed, **overrides).train()


def adapted_model(seed: int = 0, **overrides) -> torch.nn.Module:
    """The same base at every call; the start of the adapter is what `seed` changes."""
    config = LoraConfig(
        target_modules=["q_proj", "up_proj"], modules_to_save=["depth_sampling"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(fresh_model(**overrides), config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    randomise(torch.nn.ParameterList(trainable), seed=seed)
    return model


def trainer_of(model, output_dir: Path, *, callbacks: tuple = (), **arguments) -> Trainer:
    return Trainer(
        model,
        run_arguments(output_dir, learning_rate=1e-2, logging_steps=1, **arguments),
        train_dataset=sentence_dataset(),
        eval_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def step_of(model: torch.nn.Module) -> int:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return int(base.model.depth_sampling.step)


@pytest.mark.parametrize(
    ("make", "granularity"),
    [(fresh_model, "batch"), (fresh_model, "token"), (adapted_model, "sequence")],
    ids=["batch", "token", "lora-sequence"],
)
def test_a_killed_run_resumes_with_the_losses_of_one_that_was_not(make, granularity, tmp_path):
    """Killed after two steps of two micro-batches beyond its last checkpoint; a LoRA run's has the adapter alone."""
    settings = {"depth_sampling": {**SAMPLED, "granularity": granularity}, "backprop_loops": 2}
    arguments = {"max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    straight = trainer_of(make(**settings), tmp_path / "straight", **arguments)
    straight.train()
    killed = trainer_of(make(**settings), tmp_path / "killed", callbacks=(KillAt(3),), **arguments)
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer_of(make(seed=5, **settings), tmp_path / "killed", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert step_of(resumed.model) == step_of(straight.model) == 12
    expected = weights(straight.model)
    assert [name for name, tensor in weights(resumed.model).items() if not torch.equal(tensor, expected[name])] == []


def test_each_micro_batch_draws_anew_and_evaluation_never(tmp_path):
    model = fresh_model(depth_sampling={"type": "uniform", "max_loops": 9})
    depths = []
    hook = model.register_forward_hook(lambda module, args, output: depths.append(output.num_loops))
    trainer = trainer_of(
        model, tmp_path, max_steps=3, gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    drawn = [depth.tolist() for depth in depths if depth is not None]
    assert len(drawn) == step_of(model) == 12
    assert len({depth for rows in drawn for depth in rows}) > 3
    assert all(len(set(rows)) == 1 for rows in drawn)
    assert [depth is None for depth in depths].count(True) == 3  # one evaluation batch after each step
    assert model.config.max_trained_loops == max(map(max, drawn))
    hook.remove()
    fixed = fresh_model()
    fixed.load_state_dict(model.state_dict(), strict=False)
    assert trainer.evaluate()["eval_loss"] == trainer_of(fixed, tmp_path / "fixed").evaluate()["eval_loss"]
    assert trainer.predict(sentence_dataset().select(range(2))).predictions.shape[-1] == 97


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
def test_accumulated_steps_equal_one_large_batch_when_every_draw_is_the_same(granularity, tmp_path):
    """2 x 1 = 1 x 2, of batches that hold unequal numbers of tokens, at a depth that is not `num_loops`."""
    spec = {"type": "uniform", "granularity": granularity, "min_loops": 5, "max_loops": 5}
    steps = []
    for size, accumulated in ((2, 1), (1, 2)):
        model = fresh_model(depth_sampling=spec, backprop_loops=2)
        start = weights(model)
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer_of(model, tmp_path / str(size), max_steps=1, optim="sgd", max_grad_norm=0.0, **batches).train()
        steps.append({name: tensor - start[name] for name, tensor in weights(model).items()})
    for name, step in steps[0].items():
        assert step.any(), name
        torch.testing.assert_close(steps[1][name], step, rtol=1e-3, atol=1e-7)


# torch's own, about a tensor that crosses the break between two graphs
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("granularity", ["batch", "sequence"])
def test_compiled_training_draws_as_the_plain_model_does(granularity):
    """The draw stays outside of the graphs, of which there is one set per depth."""
    spec = {"type": "uniform", "granularity": granularity, "max_loops": 3}
    tokens = random_tokens(2, 6)
    plain = fresh_model(depth_sampling=spec)
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    for _ in range(5):
        expected, output = plain(tokens, labels=tokens), compiled(tokens, labels=tokens)
        assert torch.equal(output.num_loops, expected.num_loops)
        torch.testing.assert_close(output.loss, expected.loss)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = once_per_run(tmp_path_factory, "distributed_depth", partial(launch, "depth.py"))
    return json.loads((folder / "depth.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "granularity"), CASES, ids=map("/".join, CASES))
def test_two_processes_agree_on_the_loops_and_compute_what_one_does(measured, strategy, granularity):
    """Each with rows of its own, of another length than the other's; under FSDP another count would hang."""
    result = measured[f"{strategy}/{granularity}"]
    assert len(result["loops"]) == 3
    assert all(len(set(ranks)) == 1 for ranks in result["loops"])
    assert len({ranks[0] for ranks in result["loops"]}) > 1
    depths_differ = [first != second for first, second in result["depths"]]
    assert any(depths_differ) == (granularity != "batch")
    assert result["error"] <= 1e-5
    assert result["error_without_reduction"] > 1e-2


@pytest.mark.slow
def test_ranks_that_stand_at_different_steps_are_told_so(measured):
    for message in measured["refused"]:
        assert "loops on one rank and" in message
