"""Worker: the guard against explosions in two processes, of which the first alone sees a spike in a step that saves.

`python -m torch.distributed.run … guard.py FOLDER`. Writes `FOLDER/guard-<rank>.json`: the losses that each process
judged by, and its spikes at every step.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_model
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from distributed.leave import leave
from modeling_looped.training import ExplosionGuardCallback

STEPS = 6
SPIKE = 4


class SpikeInFirstProcess(TrainerCallback):
    """Its head is another one while step SPIKE computes its loss; comes before the guard."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == SPIKE and dist.get_rank() == 0:
            self.before = model.lm_head.weight.detach().clone()
            with torch.no_grad():
                model.lm_head.weight.mul_(-100.0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == SPIKE and dist.get_rank() == 0:
            with torch.no_grad():
                model.lm_head.weight.copy_(self.before)


class Notes(TrainerCallback):
    def __init__(self, guard: ExplosionGuardCallback):
        self.guard, self.spikes = guard, []

    def on_step_end(self, args, state, control, **kwargs):
        self.spikes.append(self.guard.spikes)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = run_arguments(
        folder / "run",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        save_strategy="steps",
        save_steps=1,
        ddp_find_unused_parameters=False,
    )
    torch.manual_seed(0)
    guard = ExplosionGuardCallback(spike_factor=1.5, spike_window=2)
    notes = Notes(guard)
    trainer = Trainer(
        tiny_model().train(),
        arguments,
        train_dataset=sentence_dataset(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        callbacks=[SpikeInFirstProcess(), guard, notes],
    )
    trainer.train()
    result = {"spikes": notes.spikes, "losses": list(guard.losses)}
    (folder / f"guard-{dist.get_rank()}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
