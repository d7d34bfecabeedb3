"""Arguments that every training run here has beside those of `TrainingArguments`: optimiser and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .guard import ExplosionGuardCallback
from .observer import looped_models
from .telemetry import LoopTelemetryCallback

OPTIM_RECIPES = ("adamw", "muon", "trainer")
MUON_SCALES = ("match_rms_adamw", "original")
DECAY_SCHEDULES = ("constant", "linear")

#: Values of `optim` that name what `optim_recipe="adamw"` makes.
ADAMW = ("adamw_torch", "adamw_torch_fused")

#: Schedule with a cooldown, in Transformers' words.
COOLDOWN_SCHEDULE = "warmup_stable_decay"


@dataclass
class RecipeArguments(TrainingArguments):
    r"""`TrainingArguments`, with an optimiser that knows what each parameter of a looped model is.

    Attributes:
        optim_recipe: `adamw` or `muon` (Muon for hidden matrices, AdamW for the rest), with groups that keep weight
            decay off the loop system's own parameters; `trainer`: whatever `optim` says.
        muon_learning_rate: of Muon's matrices; `None`: `learning_rate`.
        muon_learning_rate_scale: what a matrix of shape [rows, columns] multiplies that rate by. `match_rms_adamw`:
            0.2 \sqrt{max(rows, columns)}, which makes its steps as large as AdamW's (arXiv 2502.16982); `original`:
            \sqrt{max(1, rows / columns)}, for which Parcae's rates are made (GPT-2's matrices are stored transposed).
        muon_momentum: of Muon.
        muon_momentum_warmup_steps: steps in which the momentum rises to that, linearly from 0.85 (Parcae's code: 300).
        muon_weight_decay: of Muon's matrices; `None`: `weight_decay`.
        muon_weight_decay_schedule: `constant`, or `linear`: from that value at the first step to 0 after the last.
        adapter_learning_rate: of loop adapters, bridges, gates and injection; `None`: `learning_rate`.
        embedding_learning_rate: of token embeddings and head; `None`: `learning_rate`.
        cooldown_steps: with `lr_scheduler_type="warmup_stable_decay"`, the last steps, in which the rate falls to 0,
            linearly unless `lr_scheduler_kwargs` says otherwise: their number, or below 1 their share of all steps.
        telemetry: whether a looped model's states, gradients and depths are logged (`LoopTelemetryCallback`).
        telemetry_steps: how often; `None`: in the steps that log.
        explosion_guard: whether a run is stopped, before it loses its weights, when states, loss or gradients explode
            (`ExplosionGuardCallback`).
        max_state_norm: largest norm of a token's state that the guard lets pass.
    """

    optim_recipe: str = field(
        default="adamw", metadata={"help": "`adamw`, `muon`, or `trainer`: whatever `optim` says."}
    )
    muon_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of Muon's matrices."})
    muon_learning_rate_scale: str = field(
        default="match_rms_adamw", metadata={"help": "`match_rms_adamw` or `original`: what its rate means."}
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon."})
    muon_momentum_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which Muon's momentum rises from 0.85."}
    )
    muon_weight_decay: float | None = field(default=None, metadata={"help": "Weight decay of Muon's matrices."})
    muon_weight_decay_schedule: str = field(
        default="constant", metadata={"help": "`constant`, or `linear`: to 0 at the end."}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of loop adapters, bridges and gates."}
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of token embeddings and head."}
    )
    cooldown_steps: float | None = field(
        default=None, metadata={"help": "Last steps, in which the rate falls to 0; below 1 a share of all steps."}
    )
    telemetry: bool = field(default=False, metadata={"help": "Whether the loop's states and gradients are logged."})
    telemetry_steps: int | None = field(default=None, metadata={"help": "How often; by default in steps that log."})
    explosion_guard: bool = field(default=False, metadata={"help": "Whether an explosion stops the run."})
    max_state_norm: float = field(default=1e5, metadata={"help": "Largest norm of a state that the guard lets pass."})

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (
            ("optim_recipe", OPTIM_RECIPES),
            ("muon_learning_rate_scale", MUON_SCALES),
            ("muon_weight_decay_schedule", DECAY_SCHEDULES),
        ):
            check_choice(self, name, allowed)
        for name, unread in (("optim", ADAMW), ("optim_args", (None,)), ("optim_target_modules", (None,))):
            value = getattr(self, name)
            if self.optim_recipe != "trainer" and value not in unread:
                raise ValueError(
                    f"{name}={str(getattr(value, 'value', value))!r} needs optim_recipe='trainer', not "
                    f"{self.optim_recipe!r}, which makes an optimiser of its own."
                )
        for name in (
            "learning_rate",
            "muon_learning_rate",
            "muon_weight_decay",
            "muon_momentum_warmup_steps",
            "adapter_learning_rate",
            "embedding_learning_rate",
            "cooldown_steps",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(f"{name}={value} must not be negative.")
        if not 0.0 <= self.muon_momentum < 1.0:
            raise ValueError(f"muon_momentum={self.muon_momentum} must lie in [0, 1).")
        if self.telemetry_steps is not None and self.telemetry_steps < 1:
            raise ValueError(
                f"telemetry_steps={self.telemetry_steps} must be None (the steps that log) or at least 1."
            )
        if not self.max_state_norm > 0.0:
            raise ValueError(f"max_state_norm={self.max_state_norm} must be above 0.")
        if self.cooldown_steps is not None and self.lr_scheduler_type != COOLDOWN_SCHEDULE:
            raise ValueError(
                f"cooldown_steps={self.cooldown_steps} needs lr_scheduler_type={COOLDOWN_SCHEDULE!r}, not "
                f"{str(getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type))!r}."
            )

    def watch(self, trainer: Any) -> None:
        """Give a `Trainer` the callbacks that these arguments ask for.

        Raises:
            ValueError: for telemetry of a model that has no loop.
        """
        asked = [name for name in ("telemetry", "explosion_guard") if getattr(self, name)]
        if not asked:
            return
        try:
            looped_models(trainer.model)
        except ValueError as error:
            raise ValueError(f"{asked[0]}=True: {error}") from error
        if self.telemetry:
            LoopTelemetryCallback(self.telemetry_steps).attach(trainer)
        if self.explosion_guard:
            trainer.add_callback(ExplosionGuardCallback(max_state_norm=self.max_state_norm))

    def scheduler_kwargs(self, num_training_steps: int) -> dict[str, Any] | None:
        """`lr_scheduler_kwargs`, with the cooldown where there is one.

        Raises:
            ValueError: if warm-up and cooldown are longer than the run.
        """
        given: Any = self.lr_scheduler_kwargs
        if self.cooldown_steps is None:
            return given
        share = self.cooldown_steps < 1
        steps = int(num_training_steps * self.cooldown_steps) if share else int(self.cooldown_steps)
        warmup = self.get_warmup_steps(num_training_steps)
        if warmup + steps > num_training_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} are {warmup} and {steps} "
                f"steps, together more than the {num_training_steps} steps of the run."
            )
        return {"decay_type": "linear", **(given or {}), "num_decay_steps": steps}


def check_choice(config: Any, name: str, allowed: Any) -> None:
    """Raise ValueError unless the field `name` has one of the values `allowed`."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name}={getattr(config, name)!r} must be one of: {', '.join(allowed)}.")


__all__ = ["RecipeArguments", "check_choice"]
