"""Looped language models for Hugging Face Transformers.

Importing the package registers the classes, so that `AutoModelForCausalLM.from_pretrained` and its siblings load
looped checkpoints.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_looped import LoopedConfig
from .modeling_looped import (
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
    LoopedModel,
    LoopedPreTrainedModel,
)
from .slots import SlotLayout
from .version import __version__

AutoConfig.register(LoopedConfig.model_type, LoopedConfig, exist_ok=True)
AutoModel.register(LoopedConfig, LoopedModel, exist_ok=True)
AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LoopedConfig, LoopedForMaskedLM, exist_ok=True)
AutoModelForQuestionAnswering.register(LoopedConfig, LoopedForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(LoopedConfig, LoopedForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LoopedConfig, LoopedForTokenClassification, exist_ok=True)

__all__ = [
    "LoopedConfig",
    "LoopedForCausalLM",
    "LoopedForMaskedLM",
    "LoopedForQuestionAnswering",
    "LoopedForSequenceClassification",
    "LoopedForTokenClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
    "SlotLayout",
    "__version__",
]
