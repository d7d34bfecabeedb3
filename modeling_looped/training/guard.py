"""Stopping a run before an explosion reaches its weights or its checkpoints."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from modeling_looped.depth_sampling import is_shared
from modeling_looped.halting import Step

from .observer import Place, evaluating, is_compiled_whole, looped_models, token_norms, watch_loops

logger = logging.get_logger(__name__)


class Finding(NamedTuple):
    """What is wrong.

    Attributes:
        what: in words, with value and threshold.
        loop: in which it was seen, from 1; `None`: in none.
        value, threshold: numbers; a threshold of infinity means that the value had to be finite.
    """

    what: str
    loop: int | None
    value: float
    threshold: float


class ExplosionError(RuntimeError):
    """What `ExplosionGuardCallback` raises.

    Attributes:
        step: number of the step in which it was found, from 1.
        loop: loop in which it was found, from 1; `None`: loss, gradient or weights.
        value: what was found.
        threshold: what it may be at most; infinity: anything finite.
        checkpoint: folder of the last good checkpoint; `None`: there is none.
    """

    def __init__(self, finding: Finding, step: int, checkpoint: str | None, advice: str):
        self.step, self.loop = step, finding.loop
        self.value, self.threshold = finding.value, finding.threshold
        self.checkpoint = checkpoint
        kept = "There is no checkpoint of this run yet."
        if checkpoint is not None:
            kept = (
                f"The last good checkpoint is {checkpoint}: go on with trainer.train(resume_from_checkpoint="
                f"{checkpoint!r}), which restores the learning rate as it was, or load the model from it in a new run."
            )
        super().__init__(f"step {step}: {finding.what}. The run stops before more is lost. {kept} {advice}")


class ExplosionGuardCallback(TrainerCallback):
    r"""Stops a run with an `ExplosionError` when states, loss or gradients explode.

    - States, before the optimiser's step: the largest norm of a token's state after each loop is finite and at most
      `max_state_norm`.
    - Loss, before the optimiser's step: finite, and no spike, that is, at most `spike_factor` times the median of the
      last `spike_window` losses; `spike_patience` spikes in a row stop the run.
    - Gradients, before every step of the optimiser: all finite.
    - Weights, before every checkpoint: finite; and on the batch seen last, in evaluation, states pass as above, and
      the loss is at most `spike_factor` times the largest of such losses before, of which the first is of the weights
      that the run began with. (Losses in training are no measure for it: they may be of other loops and have other
      scales.)

    It raises, instead of asking the `Trainer` to stop: a `Trainer` that is asked takes the optimiser's step all the
    same, may save at the end of that step, and returns as if all were well. An exception in front of the step leaves
    the weights as they were, saves nothing, and ends the process with an error. Where several processes train, all
    raise together. No checkpoint is written without having passed, so that the last one is good, whichever older ones
    `save_total_limit` has deleted; while the loss spikes none is written.

    The loss is the model's own (`outputs.loss`, summed over the micro-batches of a step and, for tokens counted over
    all processes, over these; else their mean). Where a trainer computes it
    outside of the model (`DistillationTrainer`), the losses that it logs are checked instead. Gradients of float16
    training are left to its scaler, which skips steps of infinite ones.

    A step that is checked costs the largest norm of every state, once per loop, the norm of the gradients, and one
    wait for the device; a checkpoint one forward, and so does the first step. Where the whole model is compiled,
    states and the model's own loss cannot be seen (a hook would be compiled into the graphs, or ignored): gradients,
    weights and the logged loss are checked, and a warning says so. `trainer.save_model()` is the caller's own and is
    not checked.

    Args:
        max_state_norm: L2 norm of a token's state, of all its residual streams together. `None`: any finite one.
        spike_factor: above 1. `None`: no check for spikes.
        spike_window: losses whose median counts, at least 2; before there are as many, no spike is found.
        spike_patience: spikes in a row that stop the run, at least 1.
        every_n_steps: how often states and loss are checked.
    """

    def __init__(
        self,
        *,
        max_state_norm: float | None = 1e5,
        spike_factor: float | None = 4.0,
        spike_window: int = 32,
        spike_patience: int = 3,
        every_n_steps: int = 1,
    ):
        if max_state_norm is not None and not max_state_norm > 0.0:
            raise ValueError(f"max_state_norm={max_state_norm} must be None or above 0.")
        if spike_factor is not None and not spike_factor > 1.0:
            raise ValueError(f"spike_factor={spike_factor} must be None or above 1.")
        for name, value, least in (
            ("spike_window", spike_window, 2),
            ("spike_patience", spike_patience, 1),
            ("every_n_steps", every_n_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.max_state_norm = math.inf if max_state_norm is None else max_state_norm
        self.spike_factor = spike_factor
        self.spike_patience = spike_patience
        self.every_n_steps = every_n_steps
        self.losses: deque[float] = deque(maxlen=spike_window)
        self.spikes = 0
        self._saved: list[str] = []
        self._models: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self._norms: dict[Place, Tensor] = {}
        self._loss: Tensor | None = None
        self._knows_loss = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._worst_evaluation: float | None = None
        self._has_evaluated = False
        self._compiled = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_watching()
        self._models = looped_models(kwargs["model"])
        self._compiled = is_compiled_whole(args, kwargs["model"])
        self._inputs, self._knows_loss, self.spikes = None, False, 0
        self._worst_evaluation, self._has_evaluated = None, False
        self.losses.clear()
        # what the run goes on from
        self._saved = [self._folder(args, state)] if state.global_step else []
        if isinstance(args.resume_from_checkpoint, str):
            self._saved.append(args.resume_from_checkpoint)
        if self._compiled:
            logger.warning(
                "ExplosionGuardCallback: the whole model is compiled, so states and the model's own loss cannot be "
                "watched; gradients, weights and the logged loss are."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_watching()
        self._norms, self._loss = {}, None
        if self._compiled or (state.global_step + 1) % self.every_n_steps:
            return
        self._hooks = [watch_loops(name, base, self._see) for name, base in self._models.items()]
        self._hooks.append(kwargs["model"].register_forward_hook(self._note_call, with_kwargs=True))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._stop_watching()
        finding = self._finding_of_states() or self._finding_of_loss(args)
        if finding is None and getattr(kwargs.get("optimizer"), "scaler", None) is None:
            norm = norm_of(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
            if not math.isfinite(norm):
                finding = Finding(f"the norm of the gradients is {norm}", None, norm, math.inf)
        self._raise_on_all(finding, state.global_step + 1, args)
        if self._inputs is not None and not self._has_evaluated:  # what later checkpoints are compared with
            self._raise_on_all(self._finding_of_forward(kwargs["model"]), state.global_step + 1, args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_save(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_save(args, state, control, kwargs["model"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_strategy == SaveStrategy.BEST:  # whether it will be saved is decided after this event
            self._check_weights(args, state, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved.append(self._folder(args, state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and not self._knows_loss:
            self._raise_on_all(self._judged(float(logs["loss"])), state.global_step, args)
            control.should_save = control.should_save and not self.spikes

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_watching()
        self._inputs = None

    @property
    def checkpoint(self) -> str | None:
        """The last good checkpoint that still exists."""
        return next((folder for folder in reversed(self._saved) if Path(folder).is_dir()), None)

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> str:
        """Where the checkpoint of this step is."""
        return str(Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _see(self, place: Place, step: Step) -> None:
        largest = token_norms(step.state).max()
        before = self._norms.get(place)
        self._norms[place] = largest if before is None else torch.maximum(before, largest)

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        self._inputs = (args, kwargs)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor):
            self._knows_loss = True
            # a copy: the Trainer multiplies the loss by the number of processes, in place
            loss = loss.detach().to(torch.float32, copy=True)
            self._loss = loss if self._loss is None else self._loss + loss

    def _finding_of_states(self) -> Finding | None:
        """The first loop whose states are not as they should be."""
        if not self._norms:
            return None
        device = next(iter(self._norms.values())).device
        values = torch.stack([norm.to(device) for norm in self._norms.values()]).tolist()
        for place, value in zip(self._norms, values, strict=True):
            if math.isfinite(value) and value <= self.max_state_norm:
                continue
            where = f"{place.model}, loop {place.loop}" if place.model else f"loop {place.loop}"
            allowed = f"max_state_norm={self.max_state_norm:g}"
            what = f"{where}: the largest norm of a token's state is {value:g}, and {allowed}"
            return Finding(what, place.loop, value, self.max_state_norm)
        return None

    def _finding_of_loss(self, args: TrainingArguments) -> Finding | None:
        """What is wrong with the loss of this step: of all processes, so that all of them decide alike."""
        if self._loss is None:
            return None
        loss = self._loss.to(args.device)
        if is_shared():
            dist.all_reduce(loss)
            _, inputs = self._inputs or ((), {})
            # a process that divides by the tokens of all has a part of their mean, any other a mean of its own
            if not args.average_tokens_across_devices or inputs.get("num_items_in_batch") is None:
                loss = loss / dist.get_world_size()
        return self._judged(loss.item())

    def _judged(self, loss: float) -> Finding | None:
        """What is wrong with the loss of a step, if it is; it joins those whose median counts otherwise."""
        if not math.isfinite(loss):
            return Finding(f"the loss is {loss}", None, loss, math.inf)
        limit = self._limit()
        if loss <= limit:
            self.losses.append(loss)
            self.spikes = 0
            return None
        self.spikes += 1
        if self.spikes < self.spike_patience:
            return None
        what = (
            f"the loss is {loss:g}, above spike_factor={self.spike_factor:g} times the median of the last "
            f"{len(self.losses)}, {median(self.losses):g}, {self.spikes} times in a row"
        )
        return Finding(what, None, loss, limit)

    def _limit(self) -> float:
        """Above which a loss is a spike."""
        if self.spike_factor is None or len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        return self.spike_factor * median(self.losses)

    def _check_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        """Before a checkpoint is written: raise for damaged weights, and leave it out in the middle of a spike."""
        if not control.should_save:
            return
        if self.spikes:
            logger.warning("step %d: no checkpoint while the loss spikes.", state.global_step)
            control.should_save = False
            return
        try:
            self._check_weights(args, state, model)
        except ExplosionError:
            control.should_save = False
            raise

    def _check_weights(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Raise if the weights are not finite, or if a forward on the last batch does not pass."""
        finding = None
        norm = norm_of(model.parameters())
        if not math.isfinite(norm):
            finding = Finding(f"after this step the norm of the weights is {norm}", None, norm, math.inf)
        elif self._inputs is not None:
            finding = self._finding_of_forward(model)
            finding = finding and finding._replace(what=f"after the update of this step, {finding.what}")
        self._raise_on_all(finding, state.global_step, args)

    def _finding_of_forward(self, model: nn.Module) -> Finding | None:
        """What is wrong with a forward on the batch seen last."""
        args, kwargs = self._inputs or ((), {})
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"} | {"use_cache": False}
        self._norms = {}
        hooks = [watch_loops(name, base, self._see) for name, base in self._models.items()]
        try:
            with evaluating(model):
                loss = getattr(model(*args, **kwargs), "loss", None)
        finally:
            for hook in hooks:
                hook.remove()
        self._has_evaluated = True
        finding = self._finding_of_states()
        if finding is None and isinstance(loss, Tensor) and has_targets(kwargs.get("labels")):
            finding = self._compared(loss.item())
        return finding

    def _compared(self, loss: float) -> Finding | None:
        """What is wrong with the loss of an evaluation, if it is; it joins those that later ones are compared with."""
        worst, factor = self._worst_evaluation, self.spike_factor
        limit = math.inf if worst is None or factor is None else factor * worst
        if not math.isfinite(loss) or loss > limit:
            what = f"the loss of the last batch, in evaluation, is {loss:g}, of at most {limit:g}"
            return Finding(what, None, loss, limit)
        self._worst_evaluation = loss if worst is None else max(worst, loss)
        return None

    def _raise_on_all(self, finding: Finding | None, step: int, args: TrainingArguments) -> None:
        """Raise on every process if one of them found something."""
        found = finding is not None
        if is_shared():
            flag = torch.tensor(int(found), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            if flag.item() and finding is None:
                finding = Finding("another process found an explosion", None, math.nan, math.nan)
        if finding is not None:
            raise ExplosionError(finding, step, self.checkpoint, advice(args, self._models))

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def has_targets(labels: Any) -> bool:
    """Whether a loss has something to be the mean of; the first position of a sequence is nobody's next token."""
    if not isinstance(labels, Tensor):
        return True
    return bool((labels[:, 1:] if labels.dim() > 1 else labels).ne(-100).any())


def norm_of(tensors: Any) -> float:
    """L2 norm of all tensors together, in fp32; 0 for none."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    if not norms:
        return 0.0
    # gathered, where weights are sharded
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole])).item()


def advice(args: TrainingArguments, models: dict[str, Any]) -> str:
    """What to try, given how the run and its models are configured."""
    tips = [f"a smaller learning_rate (now {args.learning_rate:g})"]
    if not args.warmup_steps:
        tips.append("warmup_steps")
    if not 0.0 < args.max_grad_norm <= 1.0:
        tips.append(f"max_grad_norm=1.0 (now {args.max_grad_norm:g})")
    for base in models.values():
        config = base.config
        if config.injection["type"] != "diagonal":
            tips.append(f"injection='diagonal', whose linear part cannot grow (now {config.injection['type']!r})")
        if not config.prelude_norm and config.injection["type"] != "none":
            tips.append("prelude_norm=True")
        if config.norm_placement == "pre" and config.final_norm != "every_loop":
            tips.append("norm_placement='sandwich' or final_norm='every_loop'")
        if config.backprop_loops is None:
            tips.append("fewer loops with a graph (backprop_loops)")
    return f"What to try: {'; '.join(dict.fromkeys(tips))}."


__all__ = ["ExplosionError", "ExplosionGuardCallback"]
