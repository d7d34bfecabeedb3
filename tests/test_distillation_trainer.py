"""`DistillationTrainer`: its loss, what the teacher may not become, and every feature of `Trainer` that it keeps."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from teachers import tiny_teacher
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import DataCollatorForLanguageModeling
from transformers.trainer_utils import get_last_checkpoint

from modeling_looped.training import DistillationConfig, DistillationTrainer
from modeling_looped.training.checkpoints import UNFINISHED


def student(**overrides):
    torch.manual_seed(0)
    return tiny_model(**overrides).train()


def distill(model, output_dir, *, teacher=None, resume=False, evaluate_on=None, **arguments):
    trainer = trainer_of(model, output_dir, teacher=teacher, evaluate_on=evaluate_on, **arguments)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def trainer_of(model, output_dir, *, teacher=None, evaluate_on=None, **arguments):
    return DistillationTrainer(
        model,
        tiny_teacher("llama") if teacher is None else teacher,
        run_arguments(output_dir, DistillationConfig, **arguments),
        train_dataset=sentence_dataset(),
        eval_dataset=evaluate_on or sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )


def batch_of_all():
    rows = [dict(row) for row in sentence_dataset()]
    return DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)(rows)


def naive_terms(model, teacher, batch):
    """Sums over tokens of KL(teacher || student) and cross-entropy, and the number of tokens."""
    labels = batch["labels"][:, 1:]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    q, p = (torch.log_softmax(m(**inputs).logits[:, :-1], dim=-1)[labels != -100] for m in (model, teacher))
    labels = labels[labels != -100]
    return (p.exp() * (p - q)).sum(), F.nll_loss(q, labels, reduction="sum"), len(labels)


def test_the_loss_falls_and_the_teacher_stays_as_it_was(tmp_path):
    teacher = tiny_teacher("llama").train()
    before = weights(teacher)
    trainer = distill(student(), tmp_path, teacher=teacher, learning_rate=1e-2, logging_steps=1, save_steps=5)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["divergence"] < entries[0]["divergence"]
    assert entries[0]["loss"] == pytest.approx(entries[0]["divergence"], rel=1e-5)
    assert entries[-1]["num_input_tokens_seen"] > entries[0]["num_input_tokens_seen"] > 0
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(teacher).items())
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert set(saved) <= set(trainer.model.state_dict())


def test_the_first_step_follows_the_gradient_of_the_definition(tmp_path):
    """One batch of unequal rows: SGD's step is the gradient of the mean over all tokens that count."""
    teacher, model = tiny_teacher("llama"), student()
    reference = copy.deepcopy(model)
    kl, entropy, tokens = naive_terms(reference, teacher, batch_of_all())
    ((0.75 * kl + 0.25 * entropy) / tokens).backward()
    settings = {"optim": "sgd", "optim_recipe": "trainer", "max_grad_norm": 0.0, "learning_rate": 1.0, "max_steps": 1}
    start = weights(model)
    distill(
        model,
        tmp_path,
        teacher=teacher,
        per_device_train_batch_size=8,
        cross_entropy_weight=0.25,
        lr_scheduler_type="constant",
        **settings,
    )
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(start[name] - weights(model)[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_accumulated_steps_equal_one_large_batch(divergence, tmp_path):
    """Batches hold unequal numbers of tokens: only a loss divided by all of them makes the two alike."""
    settings = {"max_steps": 1, "optim": "sgd", "optim_recipe": "trainer", "max_grad_norm": 0.0}
    start = weights(student())
    runs = [
        distill(
            student(),
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            divergence=divergence,
            temperature=2.0,
            learning_rate=1e-3,
            **settings,
        )
        for size in (8, 2)
    ]
    large, accumulated = (weights(trainer.model) for trainer in runs)
    for name in start:
        torch.testing.assert_close(accumulated[name] - start[name], large[name] - start[name], rtol=1e-3, atol=1e-7)


def test_evaluation_is_the_mean_over_tokens_of_unpadded_sentences(tmp_path):
    teacher = tiny_teacher("llama")
    trainer = trainer_of(student(), tmp_path, teacher=teacher, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    with torch.no_grad():
        kl, entropy, tokens = naive_terms(trainer.model, teacher, batch_of_all())
    assert metrics["eval_tokens"] == tokens
    assert metrics["eval_loss"] == pytest.approx(float(entropy / tokens), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(float(kl / tokens), rel=1e-5)
    named = trainer_of(student(), tmp_path, evaluate_on={"a": sentence_dataset(), "b": sentence_dataset()}).evaluate()
    assert named["eval_a_loss"] == named["eval_b_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert trainer.predict(sentence_dataset()).predictions.shape[-1] == 97


@pytest.mark.parametrize("recipe", ["adamw", "muon"])
def test_resuming_is_bit_exact(recipe, tmp_path):
    settings = {"optim_recipe": recipe, "learning_rate": 1e-2, "adapter_learning_rate": 3e-2, "max_steps": 4}
    straight = distill(student(), tmp_path / "straight", **settings)
    distill(student(), tmp_path / "run", save_steps=2, **settings)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "not-found-by-resume")
    (tmp_path / "run" / UNFINISHED / "checkpoint-3").mkdir(parents=True)
    assert get_last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    resumed = distill(randomise(student(), seed=5), tmp_path / "run", save_steps=2, resume=True, **settings)
    assert resumed.state.global_step == 4
    assert all(torch.equal(t, weights(straight.model)[name]) for name, t in weights(resumed.model).items())
    states = [trainer.optimizer.state_dict() for trainer in (straight, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][index][key]) for key, value in state.items())
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_checkpoints_rotate_and_the_best_one_is_named_where_it_lies(tmp_path):
    settings = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_total_limit": 1, "max_steps": 3}
    trainer = distill(student(), tmp_path, load_best_model_at_end=True, learning_rate=1e-2, **settings)
    best = trainer.state.best_model_checkpoint
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert best is not None
    assert best.rpartition("/")[2] in kept
    state = json.loads((tmp_path / kept[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert len(kept) <= 2


def test_bf16_and_recomputed_activations_train_alike(tmp_path):
    teacher = tiny_teacher("llama", dtype=torch.bfloat16)
    losses = {}
    for name, settings in {"fp32": {}, "bf16": {"bf16": True}, "again": {"activation_checkpointing": True}}.items():
        trainer = distill(student(), tmp_path / name, teacher=teacher, max_steps=3, logging_steps=1, **settings)
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses["again"] == losses["fp32"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=3e-2)


def test_a_peft_student_trains_its_adapter_alone(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(student(), config)
    before = weights(model)
    distill(model, tmp_path, learning_rate=1e-2, save_steps=5, optim_recipe="muon")
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert (tmp_path / "checkpoint-5" / "adapter_model.safetensors").is_file()


def test_training_without_any_teacher_needs_the_cross_entropy_alone(tmp_path):
    arguments = run_arguments(tmp_path, DistillationConfig, max_steps=1)
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    data = {"train_dataset": sentence_dataset(), "eval_dataset": sentence_dataset(), "data_collator": collator}
    with pytest.raises(ValueError, match="there is none: pass teacher_model"):
        DistillationTrainer(student(), None, arguments, **data).train()
    arguments.cross_entropy_weight = 1.0
    trainer = DistillationTrainer(student(), None, arguments, **data)
    trainer.train()
    assert "eval_kl" not in trainer.evaluate()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' must be one of: forward_kl"),
        ({"beta": 1.0}, "beta=1.0 must lie strictly between"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"cross_entropy_weight": 1.5}, "cross_entropy_weight=1.5"),
        ({"stage": "3"}, "stage='3' must be one of: logits, hidden"),
        ({"trainable": "("}, "neither one of all, adapters, shared nor a regular expression"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate=-1.0 must not be negative"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_arguments(tmp_path, DistillationConfig, **wrong)


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=80 is not the student's 97"):
        trainer_of(student(), tmp_path, teacher=tiny_teacher("llama", vocab_size=80))
    with pytest.raises(ValueError, match="trainable='nothing_like_this' leaves no parameter to train"):
        trainer_of(student(), tmp_path, trainable="nothing_like_this")
    with pytest.raises(ValueError, match="neither a folder nor"):
        trainer_of(student(), tmp_path, teacher=str(tmp_path / "missing" / "folder"))
