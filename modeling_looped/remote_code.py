"""What a saved folder carries so that it loads where this package is not installed.

Transformers copies the module of a custom class and what that module imports with one dot, but only for the class that
is being saved. `AUTO_MAP` names all classes, and `copy_code` puts all their files beside any saved config, so that a
folder written by `save_pretrained`, a `Trainer` checkpoint or a PEFT merge loads with every Auto class and
`trust_remote_code=True` where only torch and transformers are installed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.dynamic_module_utils import get_relative_import_files

if TYPE_CHECKING:
    # Never runs, but Transformers finds a file's companions by the text of such lines. A config's code, loaded alone,
    # is put in a folder of its own, where the model's files would be missing when the config is saved again.
    from .modeling_looped import LoopedModel as LoopedModel

#: Auto class -> "file.class" of the flat folder.
AUTO_MAP = {
    "AutoConfig": "configuration_looped.LoopedConfig",
    "AutoModel": "modeling_looped.LoopedModel",
    "AutoModelForCausalLM": "modeling_looped.LoopedForCausalLM",
    "AutoModelForMaskedLM": "modeling_looped.LoopedForMaskedLM",
    "AutoModelForQuestionAnswering": "modeling_looped.LoopedForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_looped.LoopedForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_looped.LoopedForTokenClassification",
}


def copy_code(folder: str | os.PathLike) -> list[Path]:
    """Copy the model's files into `folder` (made if missing) and return their paths there."""
    source = Path(__file__).with_name("modeling_looped.py")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    copies = []
    for file in {str(source), *get_relative_import_files(str(source))}:
        copy = target / Path(file).name
        if not (copy.exists() and copy.samefile(file)):
            shutil.copyfile(file, copy)
        copies.append(copy)
    return copies
