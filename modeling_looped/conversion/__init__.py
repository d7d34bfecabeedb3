"""Conversion: how a checkpoint becomes a looped one, and the checks that prove it.

The programs in the repository's folder `conversion/` call these functions; nothing here travels to the Hub.
"""

from .checkpoint import Retrofitted, retrofit_checkpoint
from .exporting import export_checkpoint
from .importing import import_checkpoint
from .retrofit import check_split, identity_loops, retrofit, retrofit_config
from .special_tokens import align_special_tokens
from .teacher import TeacherFiles, find_teacher
from .verification import Comparison, ConversionError, compare_at_one_loop, loss_by_loops, text_windows

__all__ = [
    "Comparison",
    "ConversionError",
    "Retrofitted",
    "TeacherFiles",
    "align_special_tokens",
    "check_split",
    "compare_at_one_loop",
    "export_checkpoint",
    "find_teacher",
    "identity_loops",
    "import_checkpoint",
    "loss_by_loops",
    "retrofit",
    "retrofit_checkpoint",
    "retrofit_config",
    "text_windows",
]
