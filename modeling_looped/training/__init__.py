"""Training helpers: pretraining from random weights; distillation of a teacher into a student; telemetry of the loop;
a guard against explosions.

Nothing here travels to the Hub, and the model files import nothing of it.
"""

from .arguments import RecipeArguments
from .config import DistillationConfig
from .guard import ExplosionError, ExplosionGuardCallback
from .losses import DIVERGENCES, TopK, distillation_loss
from .optimizer import MuonAdamW
from .parameters import parameter_groups, select_trainable
from .pretraining import PretrainingConfig, PretrainingTrainer
from .telemetry import LoopTelemetryCallback
from .trainer import DistillationTrainer

__all__ = [
    "DIVERGENCES",
    "DistillationConfig",
    "DistillationTrainer",
    "ExplosionError",
    "ExplosionGuardCallback",
    "LoopTelemetryCallback",
    "MuonAdamW",
    "PretrainingConfig",
    "PretrainingTrainer",
    "RecipeArguments",
    "TopK",
    "distillation_loss",
    "parameter_groups",
    "select_trainable",
]
