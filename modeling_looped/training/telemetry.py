"""What the loop does in training, in the logs of any `Trainer`."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from modeling_looped.depth import Depth
from modeling_looped.halting import Step

from .observer import Place, is_compiled_whole, looped_models, token_norms, watch_loops

logger = logging.get_logger(__name__)


class LoopTelemetryCallback(TrainerCallback):
    r"""Adds to a `Trainer`'s logs what the loop does, in every `every_n_steps`-th step (all micro-batches of it):

    - `loop/spectral_radius`: that of A in the injection x = A s + B e, before the step's update: exact for `diagonal`,
      1 for `add` and `none`, from above and within about 1 % for `concat`; absent with nested loops, which have two
      states.
    - `loop/state_norm_<t>`: L2 norm of a token's state after loop t, mean over tokens.
    - `loop/state_change_<t>`: \|s_t - s_{t-1}\| / \|s_t\|, mean over tokens, which
      the halting rule `state_change` reads.
    - `loop/gradient_norm_<t>`: L2 norm of the gradient of the step's loss, as this process backpropagates it, with
      respect to the states after loop t, of all tokens together; absent for loops that keep no graph.
    - `loop/depth_mean`, `_min`, `_max`: loops of the rows or tokens since the last log entry, of every step where
      `config.depth_sampling` draws them, else of the sampled steps.
    - `loop/tokens_per_second`: tokens of all processes per second since the last log entry, data, evaluation and
      saving included. Exact with `include_num_input_tokens_seen`; else padding is included, and all steps are taken to
      have as many as the sampled ones.

    A value is the mean over the steps that were sampled since the last log entry, on the process that logs. Tokens of
    padding count. Groups of layers that loop one after the other (`core_group_size`) have keys of their own
    (`loop/state_norm_group_2_<t>`), as have the encoder and decoder of an `EncoderDecoderModel`.

    Training is not changed: the callback only reads, and keeps scalars, never a graph. A step that is not sampled
    costs nothing (with `depth_sampling`, one note of the depth per forward). A sampled one costs two norms of every
    state and one of its gradient per loop; with `concat` 12 products of [D, D] matrices. Where the whole model is
    compiled, sampled steps run without the compiled graphs (`torch.compiler.set_stance("force_eager")`), since those
    cannot see hooks that come and go: they are slower and equal up to rounding, and nothing is compiled anew.

    Reporters (TensorBoard, Trackio, ...) run before the callbacks that a `Trainer` is given, so that what those add to
    the logs comes too late for them. `attach` puts this one in front:

    ```python
    trainer = Trainer(model, args, ...)
    LoopTelemetryCallback().attach(trainer)
    ```

    With `callbacks=[LoopTelemetryCallback()]` the values are in `state.log_history` (`trainer_state.json`), in the
    progress bar and in later callbacks only, and a warning says so if there are reporters.

    Args:
        every_n_steps: how often a step is sampled. `None`: those that log.
        prefix: in front of the keys.

    Raises:
        ValueError: at the start of training, if the model has no loop, or if `every_n_steps` is `None` and logging
            does not go by steps.
    """

    def __init__(self, every_n_steps: int | None = None, *, prefix: str = "loop"):
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be None (the steps that log) or at least 1.")
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._is_first = False
        self._models: dict[str, Any] = {}
        self._compiled = False
        self._hooks: list[RemovableHandle] = []
        self._depth_hooks: list[RemovableHandle] = []
        self._stance = ExitStack()
        self._forget(0)
        self._squares: dict[str, Tensor] = {}
        self._tokens = 0

    def attach(self, trainer: Trainer) -> Self:
        """Make this the first callback of `trainer`, in front of its reporters."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._is_first = True
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        by = IntervalStrategy(args.logging_strategy)
        if self.every_n_steps is None and by != IntervalStrategy.STEPS:
            raise ValueError(
                f"every_n_steps=None samples the steps that log, and logging_strategy={by.value!r} does not go by "
                "steps: give LoopTelemetryCallback(every_n_steps=...)."
            )
        if not self._is_first and args.report_to:
            logger.warning(
                "%s will not see the values of LoopTelemetryCallback, which comes after them: use "
                "LoopTelemetryCallback(...).attach(trainer) in place of callbacks=[...].",
                ", ".join(args.report_to),
            )
        self._stop()
        self._models = looped_models(kwargs["model"])
        self._compiled = is_compiled_whole(args, kwargs["model"])
        note: Any = torch.compiler.disable(self._note_draw)
        for base in self._models.values():
            if base.config.depth_sampling["type"] != "fixed":
                self._depth_hooks.append(base.depth_sampling.register_forward_hook(note))
        self._forget(state.global_step, state.num_input_tokens_seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if self.every_n_steps is not None:
            sampled = step % self.every_n_steps == 0
        else:
            sampled = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if not sampled:
            return
        self._stop_watching()
        if self._compiled:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._squares, self._tokens = {}, 0
        self._hooks = [watch_loops(name, base, self._see) for name, base in self._models.items()]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._hooks:
            return
        self._stop_watching()
        scaler = getattr(optimizer, "scaler", None)  # of float16, whose gradients are too large by a factor
        scale = 1.0 if scaler is None else scaler.get_scale()
        for key, squares in self._squares.items():
            self._values[key].append(squares.sqrt() / scale)
        for name, base in self._models.items():
            radius = None if base.config.schedule["type"] == "nested" else base.injection.spectral_radius()
            if radius is not None:
                # gathered, where weights are sharded
                full: Any = getattr(radius, "full_tensor", lambda value=radius: value)
                self._values[f"{self.prefix}/{name + '_' if name else ''}spectral_radius"].append(full())
        self._sampled_tokens.append(self._tokens)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        values = {key: torch.stack([v.float().cpu() for v in found]).mean().item() for key, found in
                  self._values.items()}  # fmt: skip
        values |= self._depths() | self._speed(args, state)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # the Trainer has put a copy there
        self._forget(state.global_step, state.num_input_tokens_seen)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _see(self, place: Place, step: Step) -> None:
        norms = token_norms(step.state)
        change = token_norms(step.state.detach() - step.previous.detach().to(step.state.device))
        self._values[place.key(self.prefix, "state_norm")].append(norms.mean())
        relative = change / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        self._values[place.key(self.prefix, "state_change")].append(relative.mean())
        batch, length = step.state.shape[:2]
        if place.group == 0 and place.loop == 1:
            self._tokens += batch * length
            self._loops.append(0)
        self._loops[-1] = place.loop
        if step.state.requires_grad:
            step.state.register_hook(self._reader_of_gradient(place.key(self.prefix, "gradient_norm")))

    def _reader_of_gradient(self, key: str) -> Any:
        def read(gradient: Tensor) -> None:
            square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            self._squares[key] = self._squares[key] + square.to(self._squares[key]) if key in self._squares else square

        return read

    def _note_draw(self, module: nn.Module, arguments: tuple[Any, ...], depth: Depth) -> None:
        """Keep what the next log entry says of a depth that was drawn: mean, smallest, largest."""
        if depth.each is None:
            self._draws.append(torch.full((3,), float(depth.loops)))
        else:
            each = depth.each.detach().float()
            self._draws.append(torch.stack((each.mean(), each.min(), each.max())))

    def _depths(self) -> dict[str, float]:
        """Loops since the last log entry: those drawn, or those that the sampled steps ran."""
        rows = self._draws or [torch.full((3,), float(loops)) for loops in self._loops]
        if not rows:
            return {}
        table = torch.stack([row.cpu() for row in rows])
        return {
            f"{self.prefix}/depth_mean": table[:, 0].mean().item(),
            f"{self.prefix}/depth_min": table[:, 1].min().item(),
            f"{self.prefix}/depth_max": table[:, 2].max().item(),
        }

    def _speed(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Tokens per second since the last log entry, where they are known."""
        tokens = float(state.num_input_tokens_seen - self._seen_before)
        if args.include_num_input_tokens_seen == "no":
            if not self._sampled_tokens:
                return {}
            per_step = sum(self._sampled_tokens) / len(self._sampled_tokens)
            tokens = per_step * (state.global_step - self._step_before) * args.world_size
        seconds = time.perf_counter() - self._began
        return {f"{self.prefix}/tokens_per_second": tokens / seconds}

    def _forget(self, step: int, tokens_seen: int = 0) -> None:
        """Start anew after a log entry."""
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._draws: list[Tensor] = []
        self._loops: list[int] = []
        self._sampled_tokens: list[int] = []
        self._step_before, self._seen_before = step, tokens_seen
        self._began = time.perf_counter()

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._stance.close()

    def _stop(self) -> None:
        self._stop_watching()
        for hook in self._depth_hooks:
            hook.remove()
        self._depth_hooks = []


__all__ = ["LoopTelemetryCallback"]
