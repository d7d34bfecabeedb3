"""The guard against explosions: what it stops, what it leaves behind, and that it changes nothing else."""

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainerCallback

from modeling_looped.training import (
    DistillationConfig,
    DistillationTrainer,
    ExplosionError,
    ExplosionGuardCallback,
)
from modeling_looped.training.guard import norm_of

SMALL = {"num_core_layers": 1, "num_coda_layers": 0}


def small_model(**settings):
    torch.manual_seed(0)
    return tiny_model(**{**SMALL, **settings}).train()


def trainer_of(model, folder: Path, *callbacks: TrainerCallback, **arguments) -> Trainer:
    defaults = {"logging_steps": 1, "max_steps": 6, "save_strategy": "no", "learning_rate": 1e-3}
    return Trainer(
        model,
        run_arguments(folder, **{**defaults, **arguments}),
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=list(callbacks),
    )


class At(TrainerCallback):
    """Does something to the model at the beginning of a step, from 1."""

    def __init__(self, step: int, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.change(model)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def test_an_exploding_run_stops_and_its_last_checkpoint_resumes(tmp_path):
    """A state that is added to without a norm, and a learning rate that grows it: no hand on the weights."""
    exploding = {"injection": "add", "num_loops": 6, "prelude_norm": False}
    settings = {"learning_rate": 3.0, "max_steps": 30, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 2}
    guard = ExplosionGuardCallback(max_state_norm=2e3, spike_factor=None)
    trainer = trainer_of(small_model(**exploding), tmp_path, guard, **settings, optim="sgd", warmup_steps=8)
    with pytest.raises(ExplosionError) as caught:
        trainer.train()
    error = caught.value
    assert error.step >= 2
    assert error.checkpoint == str(tmp_path / max(saved(tmp_path), key=lambda name: int(name.split("-")[1])))
    assert all(part in str(error) for part in (f"step {error.step}", error.checkpoint, "learning_rate", "'add'"))
    assert all(tensor.isfinite().all() for tensor in load_file(f"{error.checkpoint}/model.safetensors").values())
    loaded = AutoModelForCausalLM.from_pretrained(error.checkpoint)
    assert loaded(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    # what resuming restores are learning rate and schedule too: another limit on the gradients tames them
    settings |= {"max_grad_norm": 1e-4, "max_steps": error.step + 1, "optim": "sgd", "warmup_steps": 8}
    again = trainer_of(small_model(**exploding), tmp_path, ExplosionGuardCallback(max_state_norm=2e3), **settings)
    again.train(resume_from_checkpoint=error.checkpoint)
    assert again.state.global_step == error.step + 1
    assert math.isfinite(losses(again)[-1])


def blow_up(model) -> None:
    model.model.layers[1].mlp.down_proj.weight.mul_(1e7)


def poison(model) -> None:
    model.lm_head.weight[5] = math.nan


def test_a_state_is_named_by_its_loop_before_the_optimiser_steps(tmp_path):
    trainer = trainer_of(
        small_model(), tmp_path, At(3, blow_up), ExplosionGuardCallback(), lr_scheduler_type="constant"
    )
    with pytest.raises(ExplosionError, match=r"step 3: loop 1: the largest norm .* max_state_norm=100000") as caught:
        trainer.train()
    assert (caught.value.step, caught.value.loop, caught.value.threshold) == (3, 1, 1e5)
    assert caught.value.value > 1e5
    assert caught.value.checkpoint is None
    assert "no checkpoint" in str(caught.value)
    expected = small_model()
    trainer_of(expected, tmp_path / "straight", max_steps=2, lr_scheduler_type="constant").train()
    blown_up = "model.layers.1.mlp.down_proj.weight"
    kept = {name: tensor for name, tensor in weights(trainer.model).items() if name != blown_up}
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in kept.items())  # two steps, no third


@pytest.mark.parametrize("every_n_steps", [1, 100])
def test_what_is_not_finite_never_reaches_the_weights(every_n_steps, tmp_path):
    """Seen in the loss or, in a step whose loss is not looked at, in the gradients."""
    model = small_model()
    guard = ExplosionGuardCallback(every_n_steps=every_n_steps)
    trainer = trainer_of(model, tmp_path, At(2, poison), guard)
    with pytest.raises(ExplosionError, match=r"step 2: the (loss|norm of the gradients) is nan") as caught:
        trainer.train()
    assert caught.value.loop is None
    others = {name: tensor for name, tensor in weights(model).items() if name != "lm_head.weight"}
    assert all(tensor.isfinite().all() for tensor in others.values())


def test_a_checkpoint_of_damaged_weights_is_never_written(tmp_path):
    """The update itself does the damage, in a step whose loss and gradients are in order, and the step saves."""

    class Damage(TrainerCallback):
        def __init__(self, change):
            self.change = change

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 4:
                with torch.no_grad():
                    self.change(model)

    for change, message in (
        (poison, "norm of the weights is nan"),
        (blow_up, "after the update of this step, loop 1"),
    ):
        folder = tmp_path / change.__name__
        arguments = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        trainer = trainer_of(small_model(), folder, Damage(change), ExplosionGuardCallback(), **arguments)
        with pytest.raises(ExplosionError, match=f"step 4: .*{message}") as caught:
            trainer.train()
        assert saved(folder) == {"checkpoint-2"}
        assert caught.value.checkpoint == str(folder / "checkpoint-2")


def test_an_update_that_destroys_the_model_is_not_saved_though_every_number_is_finite(tmp_path):
    class Scramble(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == 2:
                with torch.no_grad():
                    model.lm_head.weight.mul_(-200.0)

    trainer = trainer_of(
        small_model(), tmp_path, Scramble(), ExplosionGuardCallback(), save_strategy="steps", save_steps=2
    )
    with pytest.raises(ExplosionError, match=r"step 2: after the update .* loss of the last batch, in evaluation, is"):
        trainer.train()
    assert not saved(tmp_path)


@pytest.mark.parametrize("tokens_of", ["one process", "eight processes"])
@pytest.mark.parametrize("loss", ["output", "exit_gate"])
def test_checkpoints_of_sound_runs_are_written_whatever_the_scale_of_their_training_loss(tokens_of, loss, tmp_path):
    """A process that divides by the tokens of all eight has an eighth of the loss; a gate's is a binary one."""

    class Share(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            samples, items = super().get_batch_samples(*args, **kwargs)
            return samples, items * 8 if tokens_of == "eight processes" else items

    model = small_model(**({"halting": "gate", "loop_loss": "exit_gate"} if loss == "exit_gate" else {}))
    if loss == "exit_gate":
        model.requires_grad_(False)
        model.model.halting.requires_grad_(True)
    trainer = Share(
        model,
        run_arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=6, learning_rate=1e-3),
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=[ExplosionGuardCallback(spike_window=4)],
    )
    trainer.train()
    assert saved(tmp_path) == {"checkpoint-6", "checkpoint-12"}


def test_a_micro_batch_without_targets_is_no_explosion(tmp_path):
    """It adds nothing to the loss of its step, and has none in evaluation."""

    def without_targets(rows):
        batch = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    arguments = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    trainer = trainer_of(small_model(), tmp_path, ExplosionGuardCallback(), **arguments)
    mixed = [trainer.data_collator, without_targets]
    calls = iter(range(100))
    trainer.data_collator = lambda rows: mixed[next(calls) % 2](rows)
    trainer.train()
    assert saved(tmp_path) == {"checkpoint-3", "checkpoint-6"}


def test_only_spikes_in_a_row_stop_a_run_and_none_is_saved(tmp_path):
    def shuffle(model) -> None:
        model.lm_head.weight.mul_(-40.0)

    guard = ExplosionGuardCallback(spike_factor=1.5, spike_window=3, spike_patience=3)
    arguments = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-5}
    trainer = trainer_of(small_model(), tmp_path, At(6, shuffle), guard, **arguments)
    with pytest.raises(ExplosionError, match=r"step 8: the loss is .* above spike_factor=1.5 .*, 3 times in a row"):
        trainer.train()
    assert saved(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_a_single_spike_is_outlived():
    guard = ExplosionGuardCallback(spike_factor=2.0, spike_window=2, spike_patience=2)
    assert [guard._judged(loss) for loss in (1.0, 1.2, 9.0, 1.1, 9.0)] == [None] * 5
    assert list(guard.losses) == [1.2, 1.1]
    assert guard._judged(9.0).value == 9.0
    assert guard._judged(math.inf).threshold == math.inf


def test_losses_and_weights_are_bit_equal_with_and_without_it(tmp_path):
    settings = {"attention_dropout": 0.1, "state_init": "normal", "injection": "add",
                "depth_sampling": {"type": "poisson", "mean": 2}}  # fmt: skip
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    runs = []
    for callbacks in ((), (ExplosionGuardCallback(),)):
        model = small_model(**settings)
        torch.manual_seed(7)
        trainer = trainer_of(model, tmp_path / str(len(callbacks)), *callbacks, **arguments)
        trainer.train()
        runs.append((losses(trainer), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())


def test_a_loss_that_the_trainer_computes_is_judged_by_what_it_logs(tmp_path):
    guard = ExplosionGuardCallback(spike_factor=1.5, spike_window=2, spike_patience=1, max_state_norm=None)
    arguments = {"logging_steps": 1, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-6}

    def sharpen(model) -> None:
        model.lm_head.weight.mul_(60.0)

    trainer = DistillationTrainer(
        small_model(),
        small_model(num_loops=2),
        run_arguments(tmp_path, DistillationConfig, **arguments),
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=[At(4, sharpen), guard],
    )
    with pytest.raises(ExplosionError, match=r"step 4: the loss is .* above spike_factor=1.5"):
        trainer.train()
    assert saved(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_state_norm": 0.0}, "max_state_norm=0.0 must be None or above 0"),
        ({"spike_factor": 1.0}, "spike_factor=1.0 must be None or above 1"),
        ({"spike_window": 1}, "spike_window=1 must be at least 2"),
        ({"spike_patience": 0}, "spike_patience=0 must be at least 1"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExplosionGuardCallback(**arguments)


def test_norms_do_not_overflow_in_half_precision():
    assert norm_of([torch.full((100,), 6e4, dtype=torch.float16)]) == pytest.approx(6e5, rel=1e-3)
    assert norm_of([]) == 0.0
