"""Checkpoints that exist whole or not at all, and runs that go on from them to their end and no further."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

#: Folder inside the run's in which a checkpoint is written; no program takes what lies in it for a checkpoint.
UNFINISHED = "unfinished"


class WholeCheckpointsMixin(Trainer):
    """Writes every checkpoint beside the others and renames it when it is complete; takes no step after the last.

    `Trainer` writes into `checkpoint-N` itself. A process that is killed meanwhile leaves a folder there that
    `get_last_checkpoint` takes for the newest checkpoint, and that may lack the optimiser's state. Older checkpoints
    are deleted only once the new one stands under its name.

    `Trainer` looks after a step whether it was the last. One that goes on from the checkpoint of the last step would
    take another.
    """

    _staging = False

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        begun: Any = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir) / UNFINISHED) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            # not where it lies at the moment, but where it will
            self.state.best_model_checkpoint = str(best) if best.exists() or best == final else None
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            if final.exists():
                shutil.rmtree(final)
            staged.rename(final)
            staged.parent.rmdir()
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))


__all__ = ["UNFINISHED", "WholeCheckpointsMixin"]
