"""Worker: the stock `Trainer` in two processes. `accelerate launch --config_file … trainer.py FOLDER [granularity]`.

Trains a tiny model for three steps with default arguments, saves it as the `Trainer` does, and writes what it trained to
`FOLDER/trained.pt`, gathered.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_model
from torch.distributed.tensor import DTensor
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer


def main(folder: Path, granularity: str | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_model(checkpoint_granularity=granularity or "layer").train()
    arguments = run_arguments(
        folder / "run",
        max_steps=3,
        save_steps=3,
        optim="sgd",
        learning_rate=0.1,
        activation_checkpointing=granularity is not None,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    parameters = dict(trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in parameters.items()}
    if trainer.accelerator.is_main_process:
        wrapper = type(trainer.model_wrapped).__name__
        torch.save({"weights": whole, "wrapper": wrapper, "world": arguments.world_size}, folder / "trained.pt")
    dist.barrier() if dist.is_initialized() else None
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
