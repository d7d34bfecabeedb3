"""TRL's stock trainers on a looped model: no subclass, default arguments (which checkpoint activations)."""

import pytest
import torch
from datasets import Dataset
from helpers import VARIANTS, assert_close, tiny_model
from peft import LoraConfig
from training import SENTENCES, run_arguments, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_looped.training import ExplosionGuardCallback, LoopTelemetryCallback

pytestmark = [
    pytest.mark.slow,
    # TRL calls them by their names before Transformers 5.23.
    pytest.mark.filterwarnings(
        r"ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning:transformers\.modeling_utils"
    ),
]

TEXT = Dataset.from_list([{"text": sentence} for sentence in SENTENCES])
CHAT = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": sentence}],
            "completion": [{"role": "assistant", "content": sentence.upper()}],
        }
        for sentence in SENTENCES
    ]
)
PREFERENCES = Dataset.from_list(
    [{"prompt": sentence[:8], "chosen": sentence[8:], "rejected": "no"} for sentence in SENTENCES]
)
PROMPTS = Dataset.from_list([{"prompt": sentence[:6]} for sentence in SENTENCES])


def same_model(**overrides):
    """The same tiny model at every call."""
    torch.manual_seed(0)
    return tiny_model(**overrides)


def sft(tmp_path, dataset: Dataset = TEXT, model=None, peft_config=None, **arguments) -> SFTTrainer:
    trainer = SFTTrainer(
        same_model() if model is None else model,
        run_arguments(tmp_path, SFTConfig, **{"save_strategy": "no", **arguments}),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def logged(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("granularity", ["layer", "loop"])
@pytest.mark.parametrize("dataset", [TEXT, CHAT], ids=["text", "chat"])
def test_supervised_fine_tuning_lowers_the_loss(dataset, granularity, tmp_path):
    model = same_model(checkpoint_granularity=granularity)
    trainer = sft(tmp_path, dataset, model, learning_rate=2e-2, logging_steps=1)
    assert model.is_activation_checkpointing
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_a_fine_tuned_model_is_saved_whole(tmp_path):
    trainer = sft(tmp_path, save_strategy="steps", save_steps=5, learning_rate=1e-2)
    loaded = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5"))
    before = weights(same_model())
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(loaded[name], tensor), name
        assert not torch.equal(before[name], tensor), name


def test_a_loss_over_loops_trains_where_the_trainer_takes_the_models_loss(tmp_path):
    """TRL's fused head reads the last loop alone; a subclass that computes the loss as `Trainer` does reads them all.
    Guard and telemetry work with either.
    """

    class TakesTheModelsLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    found = {}
    for cls in (SFTTrainer, TakesTheModelsLoss):
        trainer = cls(
            same_model(loop_loss="deep_supervision", std=1.0),
            run_arguments(tmp_path, SFTConfig, save_strategy="no", max_steps=1, logging_steps=1, bf16=False),
            train_dataset=TEXT,
            processing_class=tiny_tokenizer(),
            callbacks=[ExplosionGuardCallback()],
        )
        LoopTelemetryCallback().attach(trainer)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXT))])
        model = same_model(loop_loss="deep_supervision", std=1.0).train()
        of_all = model(**batch).loss.item()
        trainer.args.per_device_train_batch_size = len(TEXT)
        trainer._train_batch_size = len(TEXT)
        trainer.train()
        found[cls] = (logged(trainer)[0], of_all, model.eval()(**batch).loss.item())
        assert logged(trainer, "loop/gradient_norm_1")[0] > 0
    assert found[TakesTheModelsLoss][0] == pytest.approx(found[TakesTheModelsLoss][1], rel=1e-4)
    assert found[SFTTrainer][0] == pytest.approx(found[SFTTrainer][2], rel=1e-4)
    assert found[SFTTrainer][1] != pytest.approx(found[SFTTrainer][2], rel=1e-3)


@pytest.mark.parametrize("variant", ["parcae", "capped", "sandwich", "halting_gate"])
def test_trls_fused_head_computes_the_models_loss(variant, tmp_path):
    """TRL replaces the head by one of its own, which reads logit scale and soft cap from the config."""
    settings = VARIANTS[variant]
    trainer = sft(tmp_path, model=same_model(**settings), max_steps=1, per_device_train_batch_size=1, bf16=False)
    model, row = same_model(**settings).train(), next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        fused = trainer.model(**row, fused_lm_head=True).loss
        trained = dict(trainer.model.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name])
        assert_close(fused, model(**row).loss)


def test_padding_free_batches_train_what_padded_ones_do(tmp_path):
    """One row with restarting positions: no sequence may see another in any loop."""
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_length": None}
    settings["bf16"] = False  # TRL's default, whose rounding would hide small differences
    padded = weights(sft(tmp_path, **settings).model)
    packed = weights(sft(tmp_path, padding_free=True, **settings).model)
    start = weights(same_model())
    for name, tensor in padded.items():
        assert not torch.equal(tensor, start[name]), name
        assert_close(packed[name], tensor, atol=1e-5)


def test_packed_batches_train(tmp_path):
    trainer = sft(tmp_path, packing=True, max_length=48, learning_rate=1e-2, logging_steps=1, max_steps=4)
    assert len(trainer.train_dataset) < len(TEXT)
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_fine_tuning_an_adapter_leaves_the_shared_weights_alone(tmp_path):
    before = weights(same_model())
    trainer = sft(tmp_path, peft_config=LoraConfig(), learning_rate=1e-2, logging_steps=1)
    assert logged(trainer)[-1] < logged(trainer)[0]
    for name, tensor in weights(trainer.model.unload()).items():
        assert torch.equal(tensor, before[name]), name


def test_preference_optimisation_raises_the_reward_of_the_chosen_text(tmp_path):
    """The reference model is a second copy of the folder that the policy came from."""
    same_model().save_pretrained(tmp_path / "start")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "start"),
        args=run_arguments(tmp_path, DPOConfig, learning_rate=1e-2, logging_steps=1, save_strategy="no"),
        train_dataset=PREFERENCES,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 0


def count_high_characters(completions: list[str], **kwargs) -> list[float]:
    """A reward that differs between almost any two completions."""
    return [float(sum(map(ord, completion))) for completion in completions]


def test_policy_optimisation_generates_and_moves_the_policy(tmp_path):
    model = same_model()
    before = weights(model)
    trainer = GRPOTrainer(
        model,
        reward_funcs=count_high_characters,
        args=run_arguments(
            tmp_path,
            GRPOConfig,
            max_steps=3,
            num_generations=2,
            max_completion_length=6,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=PROMPTS,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert all(0 < length <= 6 for length in logged(trainer, "completions/mean_length"))
    assert all(rate < 1 for rate in logged(trainer, "frac_reward_zero_std"))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
