"""Worker: the stock `Trainer` in two processes. `python -m torch.distributed.run … trainer.py FOLDER`.

Starts from `FOLDER/start`, trains a few steps in every way of WAYS, and saves to `FOLDER/<way>` as the `Trainer` does.
Writes `FOLDER/trainer.json`, way -> how the model was wrapped.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer
from transformers.distributed import DistributedConfig

import modeling_looped  # noqa: F401  (registers the Auto classes)
from distributed.leave import leave

#: way -> (how the model is loaded, granularity of checkpointing)
WAYS = {
    "ddp": ({}, None),
    "ddp_loop": ({}, "loop"),
    "fsdp": ({"distributed_config": DistributedConfig(fsdp_size=2)}, None),
    "fsdp_loop": ({"distributed_config": DistributedConfig(fsdp_size=2)}, "loop"),
}

STEPS = 3
BATCH = 2
OPTIMISER = {"optim": "sgd", "learning_rate": 0.1}


def run(way: str, folder: Path) -> dict:
    loading, granularity = WAYS[way]
    model = AutoModelForCausalLM.from_pretrained(folder / "start", **loading)
    model.config.checkpoint_granularity = granularity or "layer"
    arguments = run_arguments(
        folder / "runs" / way,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        activation_checkpointing=granularity is not None,
        save_strategy="no",
        ddp_find_unused_parameters=False,
        **OPTIMISER,
    )
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    trainer = Trainer(model, arguments, train_dataset=sentence_dataset(), data_collator=collator)
    trainer.train()
    trainer.save_model(str(folder / way))
    wrapped = trainer.model_wrapped
    return {
        "processes": arguments.world_size,
        "is_ddp": isinstance(wrapped, DistributedDataParallel),
        "sharded_modules": sum(type(module).__name__.startswith("FSDP") for module in wrapped.modules()),
        "recomputes": model.is_activation_checkpointing,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run_arguments(folder / "runs")  # sets the process group up
    results = {way: run(way, folder) for way in WAYS}
    if dist.get_rank() == 0:
        (folder / "trainer.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
