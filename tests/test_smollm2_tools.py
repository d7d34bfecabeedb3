"""The stock training and evaluation tools, unmodified, on a real checkpoint: SmolLM2-135M, its middle run twice."""

import json
import shutil

import lm_eval
import pytest
import torch
from datasets import Dataset
from helpers import assert_close
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from training import SENTENCES, run_arguments, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, pipeline
from trl import SFTConfig, SFTTrainer

from modeling_looped import LoopedForCausalLM

pytest_plugins = ("smollm2",)
pytestmark = pytest.mark.slow

#: Its logits reach 40, ten times those of the tiny models.
ATOL = 1e-3


@pytest.fixture(scope="module")
def tokenizer(looped_smollm2_dir):
    return AutoTokenizer.from_pretrained(looped_smollm2_dir)


def load(folder) -> LoopedForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is LoopedForCausalLM
    return model


def logged(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_trainer_takes_five_steps_and_resumes_bit_exactly(looped_smollm2_dir, tokenizer, tmp_path):
    rows = Dataset.from_list([{"input_ids": tokenizer(sentence)["input_ids"]} for sentence in SENTENCES])

    def train(resume=None, **arguments):
        trainer = Trainer(
            load(looped_smollm2_dir),
            run_arguments(tmp_path, per_device_train_batch_size=1, logging_steps=1, **arguments),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train(save_steps=3)
    assert len(logged(straight)) == 5
    expected = weights(straight.model)
    shutil.rmtree(tmp_path / "checkpoint-5")
    resumed = train(save_strategy="no", resume=str(tmp_path / "checkpoint-3"))
    assert logged(resumed) == logged(straight)
    assert [name for name, tensor in weights(resumed.model).items() if not torch.equal(tensor, expected[name])] == []
    shutil.rmtree(tmp_path / "checkpoint-3")


def test_lora_has_one_adapter_per_stored_projection_and_merges(looped_smollm2_dir, tokenizer):
    model = get_peft_model(load(looped_smollm2_dir), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    assert sum(isinstance(module, BaseTunerLayer) for module in model.modules()) == 30 * 7
    tokens = tokenizer(SENTENCES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        unmerged = {num_loops: model(tokens, num_loops=num_loops).logits for num_loops in (1, 2, 3)}
        merged = model.merge_and_unload()
        for num_loops, logits in unmerged.items():
            assert_close(merged(tokens, num_loops=num_loops).logits, logits, atol=ATOL)


def test_supervised_fine_tuning_lowers_the_loss(looped_smollm2_dir, tokenizer, tmp_path):
    chats = [[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": SENTENCES[0]}]] * 5
    trainer = SFTTrainer(
        load(looped_smollm2_dir),
        run_arguments(
            tmp_path,
            SFTConfig,
            per_device_train_batch_size=1,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-4,
            bf16=False,  # TRL's default takes minutes on a CPU that has to emulate it; the tiny models use it
        ),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("num_loops", [1, 2])
def test_the_pipeline_answers(looped_smollm2_dir, num_loops):
    answer = pipeline("text-generation", model=str(looped_smollm2_dir))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = answer(chat, max_new_tokens=12, do_sample=False, num_loops=num_loops)[0]["generated_text"][-1]["content"]
    assert "Paris" in text


TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: cities
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Germany": "Berlin", "Italy": "Rome"}


@pytest.mark.parametrize("num_loops", [1, 3])
def test_lm_eval_scores_it_at_the_loop_count_asked_for(looped_smollm2_dir, tokenizer, tmp_path, num_loops):
    cities = list(CAPITALS.values())
    rows = [{"country": country, "cities": cities, "answer": i} for i, country in enumerate(CAPITALS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={looped_smollm2_dir},num_loops={num_loops},dtype=float32",
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=5,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results["results"]["capitals"]["acc,none"] >= 0.8
    assert f"num_loops={num_loops}" in results["config"]["model_args"]
    model = load(looped_smollm2_dir).eval()
    for sample in results["samples"]["capitals"][:2]:
        for city, (score, _) in zip(cities, sample["filtered_resps"], strict=True):
            question = f"The capital of {sample['doc']['country']} is"
            ids = tokenizer(f"{question} {city}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                predicted = model(ids, num_loops=num_loops).logits.log_softmax(-1)[0, start - 1 : -1]
            assert score == pytest.approx(float(predicted.gather(1, ids[0, start:, None]).sum()), abs=5e-3)
