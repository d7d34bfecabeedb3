"""Telemetry of the loop in the logs of a stock `Trainer`: its values, what it costs, and that it changes nothing."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import entering, random_tokens, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.tensorboard import SummaryWriter
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer, TrainerCallback

import modeling_looped.training.telemetry as telemetry
from modeling_looped.injection import INJECTIONS
from modeling_looped.registry import BuildContext
from modeling_looped.training import DistillationConfig, DistillationTrainer, LoopTelemetryCallback

SMALL = {"num_core_layers": 1, "num_coda_layers": 0}


def small_model(**settings) -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_model(**{**SMALL, **settings}).train()


def trainer_of(model, folder: Path, *, callbacks: tuple = (), **arguments) -> Trainer:
    return Trainer(
        model,
        run_arguments(folder, **{"logging_steps": 1, "max_steps": 3, "save_strategy": "no", **arguments}),
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=list(callbacks),
    )


def entries(trainer: Trainer, prefix: str = "loop/") -> list[dict[str, float]]:
    """What the log entries of training hold under these keys."""
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith(prefix)} for entry in found]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class KeepLogs(TrainerCallback):
    """What a reporter sees."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_values_equal_those_of_a_hand_written_step(tmp_path):
    """One step of two micro-batches: norms, changes and gradients from the states of the same forwards."""
    batches = []

    class NoteBatches(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_of(small_model(), tmp_path, max_steps=1, gradient_accumulation_steps=2)
    trainer.__class__ = NoteBatches
    LoopTelemetryCallback().attach(trainer)
    trainer.train()
    (logged,) = entries(trainer)

    model = small_model()
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    norms, changes, squares = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for batch in batches:
        output = model(**batch, num_items_in_batch=items, output_loop_hidden_states=True)
        states = output.loop_hidden_states
        gradients = torch.autograd.grad(output.loss, states[1:])
        for t in range(3):
            norms[t] += states[t + 1].norm(dim=-1).mean() / 2
            changes[t] += ((states[t + 1] - states[t]).norm(dim=-1) / states[t + 1].norm(dim=-1)).mean() / 2
            squares[t] += gradients[t].square().sum()
    for t in range(3):
        assert logged[f"loop/state_norm_{t + 1}"] == pytest.approx(norms[t].item(), rel=1e-5)
        assert logged[f"loop/state_change_{t + 1}"] == pytest.approx(changes[t].item(), rel=1e-5)
        assert logged[f"loop/gradient_norm_{t + 1}"] == pytest.approx(math.sqrt(squares[t].item()), rel=1e-4)
    assert logged["loop/spectral_radius"] == pytest.approx(model.model.injection.decay().max().item())
    assert [logged[f"loop/depth_{name}"] for name in ("mean", "min", "max")] == [3.0, 3.0, 3.0]
    assert logged["loop/tokens_per_second"] > 0


def test_gradients_of_a_scaled_loss_are_unscaled(tmp_path):
    """With the scaler of float16 training; in fp32, which a CPU has."""
    logged = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        trainer = trainer_of(small_model(), tmp_path / str(len(logged)), max_steps=1, max_grad_norm=0.0)
        trainer.accelerator.scaler = scaler
        LoopTelemetryCallback().attach(trainer)
        trainer.train()
        logged.append(entries(trainer, "loop/gradient_norm")[0])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert len(logged[0]) == 3


def test_losses_are_bit_equal_with_and_without_it(tmp_path):
    """With sampled depths, dropout, truncated and checkpointed backpropagation and accumulated gradients."""
    sampling = {"type": "uniform", "min_loops": 1, "max_loops": 4, "granularity": "sequence"}
    settings = {"depth_sampling": sampling, "attention_dropout": 0.1, "backprop_loops": 2}
    runs = []
    for watched in (False, True):
        model = small_model(**settings, checkpoint_granularity="loop")
        arguments = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
        trainer = trainer_of(model, tmp_path / str(watched), **arguments)
        if watched:
            LoopTelemetryCallback().attach(trainer)
        torch.manual_seed(7)
        trainer.train()
        runs.append((losses(trainer), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
    for logged in entries(trainer):
        assert 1 <= logged["loop/depth_min"] <= logged["loop/depth_mean"] <= logged["loop/depth_max"] <= 4


def test_steps_that_are_not_sampled_have_no_hooks_and_no_keys(tmp_path):
    hooks = []

    class CountHooks(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            hooks.append(sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()))

    callback = LoopTelemetryCallback(every_n_steps=2)
    trainer = trainer_of(small_model(), tmp_path, callbacks=(CountHooks(),), max_steps=4)
    callback.attach(trainer)
    trainer.train()
    assert hooks == [0, 1, 0, 1]
    assert [bool("loop/state_norm_1" in logged) for logged in entries(trainer)] == [False, True, False, True]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())


def test_no_graph_and_no_state_outlives_a_step(tmp_path):
    """After three steps, what the callback holds are scalars, and as many tensors with a graph live as without it."""
    alive = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < 3:
                return
            gc.collect()
            alive.append(sum(issubclass(type(x), torch.Tensor) and x.grad_fn is not None for x in gc.get_objects()))

    counts = {}
    for watched in (False, True):
        alive.clear()
        trainer = trainer_of(small_model(), tmp_path / str(watched), callbacks=(Count(),), logging_steps=4)
        callback = LoopTelemetryCallback(every_n_steps=1)
        if watched:
            callback.attach(trainer)
        trainer.train()
        counts[watched] = list(alive)
        held = [v for found in callback._values.values() for v in found]
        assert len(held) == (3 * (3 * 3 + 1) if watched else 0)
        assert all(v.ndim == 0 and not v.requires_grad for v in held)
    assert counts[True] == counts[False]


def test_reporters_see_the_values_only_behind_an_attached_callback(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(telemetry.logger, "warning", lambda *message: said.append(message[0] % message[1:]))
    behind, front = KeepLogs(), KeepLogs()
    trainer = trainer_of(small_model(), tmp_path / "late", callbacks=(behind, LoopTelemetryCallback()), max_steps=1)
    trainer.args.report_to = ["tensorboard"]
    trainer.train()
    assert "loop/state_norm_1" not in behind.seen[0]
    assert "loop/state_norm_1" in entries(trainer)[0]
    assert "tensorboard will not see" in said[0]
    trainer = trainer_of(small_model(), tmp_path / "early", callbacks=(front,), max_steps=1)
    LoopTelemetryCallback().attach(trainer)
    trainer.train()
    assert front.seen[0]["loop/state_norm_1"] == entries(trainer)[0]["loop/state_norm_1"]
    assert len(said) == 1


def test_tensorboard_gets_the_values(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda self, key, value, *a, **k: written.update({key: value}))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(small_model(), tmp_path, report_to=["tensorboard"], max_steps=1)
    LoopTelemetryCallback(prefix="looped").attach(trainer)
    trainer.train()
    logged = entries(trainer, "looped/")[0]
    assert len(logged) == 14
    assert logged.items() <= {key.removeprefix("train/"): value for key, value in written.items()}.items()


def test_a_lora_run_and_a_distillation_are_watched(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["halting"])
    adapted = trainer_of(get_peft_model(small_model(halting="gate"), config), tmp_path / "lora", max_steps=1)
    arguments = run_arguments(tmp_path / "distilled", DistillationConfig, logging_steps=1, max_steps=1)
    distilled = DistillationTrainer(
        small_model(),
        small_model(num_loops=2),
        arguments,
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    for trainer in (adapted, distilled):
        LoopTelemetryCallback().attach(trainer)
        trainer.train()
        assert {"loop/state_norm_3", "loop/gradient_norm_1", "loop/spectral_radius"} <= entries(trainer)[0].keys()
    json.loads((tmp_path / "distilled" / "checkpoint-1" / "trainer_state.json").read_text())


def test_a_compiled_model_runs_sampled_steps_eagerly_and_compiles_nothing_anew(tmp_path):
    torch._dynamo.reset()
    ran = []

    def backend(graph, inputs):
        def run(*args):
            ran.append(True)
            return graph(*args)

        return run

    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(len(ran))

    model = small_model(num_loops=2, num_prelude_layers=0)
    model.compile(backend=backend)
    trainer = trainer_of(model, tmp_path, callbacks=(Count(),), max_steps=4)
    row = {"input_ids": random_tokens(1, 8)[0].tolist()}
    trainer.train_dataset = [row] * 8
    LoopTelemetryCallback(every_n_steps=2).attach(trainer)
    trainer.train()
    assert counts[0] > 0  # compiled and run
    assert counts[1] == counts[0]  # sampled: not compiled
    assert counts[2] == 2 * counts[0]
    assert counts[3] == counts[2]
    assert ["loop/state_norm_1" in logged for logged in entries(trainer)] == [False, True, False, True]
    torch._dynamo.reset()


def test_what_cannot_be_watched_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every_n_steps=0 must be None .* or at least 1"):
        LoopTelemetryCallback(every_n_steps=0)
    stacked = trainer_of(small_model(num_core_layers=0), tmp_path, callbacks=(LoopTelemetryCallback(),))
    with pytest.raises(ValueError, match="holds no looped model with a core"):
        stacked.train()
    epochs = trainer_of(small_model(), tmp_path, callbacks=(LoopTelemetryCallback(),), logging_strategy="epoch")
    with pytest.raises(ValueError, match=r"every_n_steps=None.*logging_strategy='epoch'"):
        epochs.train()


def test_groups_of_layers_have_keys_of_their_own(tmp_path):
    settings = {"core_group_size": 1, "num_core_layers": 2, "injection": "none", "state_init": "input", "num_loops": 2}
    trainer = trainer_of(small_model(**settings), tmp_path, max_steps=1)
    LoopTelemetryCallback().attach(trainer)
    trainer.train()
    norms = [key for key in entries(trainer)[0] if "state_norm" in key]
    assert norms == [f"loop/state_norm_{name}" for name in ("1", "2", "group_2_1", "group_2_2")]
    assert entries(trainer)[0]["loop/depth_max"] == 2.0


@pytest.mark.parametrize("name", ["diagonal", "add", "none", "concat"])
def test_the_spectral_radius_is_the_largest_absolute_eigenvalue(name):
    context = BuildContext(hidden_size=6, num_core_layers=1, initializer_range=0.4, rms_norm_eps=1e-6)
    injection = INJECTIONS.build(INJECTIONS.normalise(name), context)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(generator=generator)
    zero = torch.zeros(1, 1, 6)
    columns = [
        entering(injection, zero, row.view(1, 1, 6), 1) - entering(injection, zero, zero, 1) for row in torch.eye(6)
    ]
    system = torch.cat(columns).view(6, 6).T.double()
    radius = torch.linalg.eigvals(system).abs().max().item()
    assert injection.spectral_radius().item() == pytest.approx(radius, rel=1e-2 if name == "concat" else 1e-5)


def test_a_system_that_forgets_its_state_has_radius_zero():
    model = tiny_model(injection="concat")
    with torch.no_grad():
        model.model.injection.weight[:, :32] = 0.0
    assert model.model.injection.spectral_radius().item() == 0.0
