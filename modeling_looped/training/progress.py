"""What a run tells while it goes on: one line per log entry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLines(TrainerCallback):
    """Reports step, losses, tokens per second and the time that is left, from the process that leads.

    Tokens per second and time left count training alone: evaluation and saving in between are taken out.

    Args:
        report: receives each line.
    """

    def __init__(self, report: Callable[[str], object]):
        self.report = report
        self.steps = 0
        self.seconds = 0.0
        self.tokens = 0
        self.began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of this session's training steps; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seen = state.num_input_tokens_seen
        if state.global_step:
            self.report(f"resuming at step {state.global_step} of {state.max_steps}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        self.tokens = state.num_input_tokens_seen - self.seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        place = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            left = (state.max_steps - state.global_step) * self.seconds / max(self.steps, 1)
            shown = [f"{name} {logs[name]:.4f}" for name in SHOWN if name in logs]
            self.report(
                f"{place}  {'  '.join(shown)}  lr {logs.get('learning_rate', 0.0):.2e}  "
                f"{self.tokens_per_second:,.0f} tokens/s  {clock(left)} left"
            )
            return
        measured = [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith(("_loss", "_kl"))]
        if measured and "train_loss" not in logs:
            self.report(f"{place}  {'  '.join(measured)}")


SHOWN = ("loss", "divergence", "cross_entropy", "hidden_distance", "grad_norm")


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


__all__ = ["ProgressLines"]
