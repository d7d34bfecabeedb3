"""Types of command-line options that several conversion programs have."""

import argparse

#: What `--dtype` takes; `auto`: as the checkpoint is.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def positive(text: str) -> float:
    """A number above 0.

    Raises:
        argparse.ArgumentTypeError: for any other; argparse names the option.
    """
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


__all__ = ["DTYPES", "positive"]
