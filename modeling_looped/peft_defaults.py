"""What PEFT targets in a looped model when the user names nothing.

PEFT keeps one table per method, from model types to module names, and has no hook for a new type. The projections
carry Llama's names, so its entries fit.
"""

from __future__ import annotations

import sys


def offer_peft_defaults(model_type: str) -> None:
    """Enter `model_type` into PEFT's tables, if PEFT has been imported. (Importing it here would cost every user
    seconds; without an entry PEFT asks for `target_modules`.)
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table.setdefault(model_type, table["llama"])
