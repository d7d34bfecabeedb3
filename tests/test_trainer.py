"""The stock `Trainer` on a looped model: no subclass, no callback, default arguments."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, randomise, tiny_config, tiny_model
from training import run_arguments, sentence_dataset, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer
from transformers.trainer_utils import get_last_checkpoint

from modeling_looped import (
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
)
from modeling_looped.configuration_looped import STRATEGY_FIELDS
from modeling_looped.remote_code import copy_code

#: Settings whose training draws random numbers: resuming must restore them too.
RANDOM = {"state_init": "normal", "injection": "add", "attention_dropout": 0.1}


def fresh_model(**overrides) -> LoopedForCausalLM:
    torch.manual_seed(0)
    return tiny_model(**overrides).train()


def train(model, output_dir: Path, *, resume: bool = False, **arguments) -> Trainer:
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    trainer = Trainer(
        model,
        run_arguments(output_dir, **arguments),
        train_dataset=sentence_dataset(),
        eval_dataset=sentence_dataset(),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    expected = weights(second)
    assert [name for name, tensor in weights(first).items() if not torch.equal(tensor, expected[name])] == []


def test_five_steps_with_default_arguments_lower_the_loss_and_move_every_weight(tmp_path):
    model = fresh_model()
    before = weights(model)
    trainer = train(model, tmp_path, learning_rate=1e-2, logging_steps=1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert [name for name, tensor in weights(model).items() if torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize("settings", [{}, RANDOM], ids=["plain", "random"])
def test_resuming_is_bit_exact(settings, tmp_path):
    """Two steps and two more after a resume, in a new `Trainer`, equal four steps: weights, optimiser and schedule."""
    straight = train(fresh_model(**settings), tmp_path / "straight", max_steps=4)
    train(fresh_model(**settings), tmp_path / "resumed", max_steps=4, save_steps=2)
    halfway = tmp_path / "resumed" / "checkpoint-2"
    (tmp_path / "resumed" / "checkpoint-4").rename(tmp_path / "not-found-by-resume")
    assert get_last_checkpoint(tmp_path / "resumed") == str(halfway)
    # another start, to see that everything comes from the checkpoint
    start = randomise(fresh_model(**settings), seed=5)
    resumed = train(start, tmp_path / "resumed", max_steps=4, save_steps=2, resume=True)
    assert resumed.state.global_step == straight.state.global_step == 4
    assert_same_weights(resumed.model, straight.model)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, straight)]
    for index, state in moments[1].items():
        assert all(torch.equal(moments[0][index][key], value) for key, value in state.items())


def test_a_checkpoint_carries_the_code_and_loads_by_itself(tmp_path):
    trainer = train(fresh_model(), tmp_path / "run", max_steps=1, save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    code = {file.name for file in copy_code(tmp_path / "code")}
    assert code <= {file.name for file in checkpoint.iterdir()}
    assert_same_weights(AutoModelForCausalLM.from_pretrained(checkpoint), trainer.model)


@pytest.mark.parametrize("tied", [False, True])
def test_accumulated_steps_equal_one_large_batch(tied, tmp_path):
    """Batches hold unequal numbers of tokens: only a loss divided by all of them makes the two alike."""
    settings = {"max_steps": 2, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0}
    runs = {
        (size, steps): train(
            fresh_model(tie_word_embeddings=tied),
            tmp_path / f"{size}x{steps}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **settings,
        )
        for size, steps in ((8, 1), (2, 4), (1, 8))
    }
    start, large = weights(fresh_model(tie_word_embeddings=tied)), weights(runs[8, 1].model)
    for trainer in runs.values():
        for name, tensor in weights(trainer.model).items():
            torch.testing.assert_close(tensor - start[name], large[name] - start[name], rtol=1e-3, atol=1e-7)


def test_accumulated_steps_of_a_classifier_equal_one_large_batch(tmp_path):
    """Transformers' generic heads take no `num_items_in_batch`; the `Trainer` must know, or it adds the losses up."""
    results = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = randomise(LoopedForSequenceClassification(tiny_config(num_labels=2)))
        start = weights(model)
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(random_tokens(8))]
        args = run_arguments(tmp_path / str(size), max_steps=1, optim="sgd", max_grad_norm=0.0, **arguments)
        Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(tiny_tokenizer())).train()
        results.append({name: tensor - start[name] for name, tensor in weights(model).items()})
    for name, step in results[0].items():
        torch.testing.assert_close(results[1][name], step, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("granularity", ["layer", "loop"])
def test_checkpointing_leaves_every_weight_bit_equal(granularity, tmp_path):
    settings = {**RANDOM, "checkpoint_granularity": granularity}
    plain = train(fresh_model(**settings), tmp_path / "plain", max_steps=3)
    recomputed = train(fresh_model(**settings), tmp_path / "recomputed", max_steps=3, activation_checkpointing=True)
    assert recomputed.model.is_activation_checkpointing
    assert_same_weights(recomputed.model, plain.model)


@pytest.mark.parametrize("granularity", ["layer", "loop"])
def test_bf16_autocast_trains_fp32_weights(granularity, tmp_path):
    model = fresh_model(checkpoint_granularity=granularity)
    trainer = train(model, tmp_path, bf16=True, max_steps=3, logging_steps=1, activation_checkpointing=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    in_bf16 = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer = train(fresh_model(), tmp_path, max_steps=3, logging_steps=1)
    in_fp32 = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert in_bf16 != in_fp32
    assert in_bf16 == pytest.approx(in_fp32, rel=2e-2)


def test_pure_bf16_weights_train(tmp_path):
    model = fresh_model().to(torch.bfloat16)
    before = weights(model)
    train(model, tmp_path, learning_rate=1e-2, max_steps=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_evaluation_loss_is_the_mean_over_tokens_of_unpadded_sentences(tmp_path):
    """Padding and its labels do not count; one batch of all sentences equals each sentence alone."""
    trainer = train(fresh_model(), tmp_path, max_steps=1, per_device_eval_batch_size=8)
    total = count = 0
    model = copy.deepcopy(trainer.model).eval()
    with torch.no_grad():
        for row in sentence_dataset():
            ids = torch.tensor([row["input_ids"]])
            total += model(ids, labels=ids).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total / count), rel=1e-5)


@pytest.mark.parametrize("halting", list(STRATEGY_FIELDS["halting"]))
def test_prediction_returns_one_logit_tensor(halting, tmp_path):
    """The cache, per-loop states and exits stay out of what the `Trainer` gathers over a data set."""
    trainer = train(fresh_model(halting=halting), tmp_path, max_steps=1)
    prediction = trainer.predict(sentence_dataset().select(range(2)))
    assert prediction.predictions.shape[0] == 2
    assert prediction.predictions.shape[-1] == 97


@pytest.mark.parametrize(
    ("head", "width"),
    [
        (LoopedForCausalLM, 97),
        (LoopedForMaskedLM, 97),
        (LoopedForTokenClassification, 2),
        (LoopedForSequenceClassification, 2),
    ],
)
def test_prediction_reads_a_column_of_depths_and_returns_one_logit_tensor(head, width, tmp_path):
    """The `Trainer` drops columns that no argument of the forward is called after."""
    model = randomise(head(tiny_config(is_causal=head is not LoopedForMaskedLM)))
    trainer = Trainer(model, run_arguments(tmp_path), data_collator=DataCollatorWithPadding(tiny_tokenizer()))
    rows = [{"input_ids": row, "num_loops": 1 + i} for i, row in enumerate(random_tokens(2))]
    predictions = trainer.predict(rows).predictions
    assert predictions.shape[-1] == width
    for row, logits in zip(rows, predictions, strict=True):
        alone = trainer.model(row["input_ids"][None], num_loops=row["num_loops"]).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits), alone, rtol=0, atol=1e-5)
