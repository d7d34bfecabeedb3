"""Training helpers: distillation of a teacher into a student, looped or stacked; telemetry of the loop; a guard.

Nothing here travels to the Hub, and the model files import nothing of it.
"""

from .config import DistillationConfig
from .guard import ExplosionError, ExplosionGuardCallback
from .losses import DIVERGENCES, TopK, distillation_loss
from .optimizer import MuonAdamW
from .parameters import parameter_groups, select_trainable
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
    "TopK",
    "distillation_loss",
    "parameter_groups",
    "select_trainable",
]
