"""Evaluation whose means count every token once, however batches and processes cut the data.

B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer


class TokenMeansMixin(Trainer):
    """Sums what was evaluated row by row, and makes metrics of the sums.

    `Trainer` averages the means of batches, in which a short last batch counts as much as any other, and rows that
    several processes evaluate twice count twice.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        #: For each row of this evaluation, what `token_metrics` wants the sums of, each [B, columns] in fp64.
        self._evaluated: list[Tensor] = []

    @abstractmethod
    def token_metrics(self, sums: list[float], prefix: str, dataset: Any) -> dict[str, float]:
        """Metrics, their names with `prefix` and an underscore before them, from the sums over all rows."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in `Trainer`, and always with the last batch: `dataloader_drop_last` is for training alone."""
        with self._keeping_last_batch():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._keeping_last_batch():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _keeping_last_batch(self) -> Iterator[None]:
        before = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = before

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with means over tokens."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if not self._evaluated:
            return output
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        sums = torch.cat(self._evaluated).sum(0).tolist()
        self._evaluated = []
        metrics = self.token_metrics(sums, prefix, getattr(dataloader, "dataset", None))
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; what other processes evaluated is gathered, without the rows that fill up a last batch."""
        result = super().prediction_step(*args, **kwargs)
        if self._evaluated:
            gathered: Any = self.accelerator.gather_for_metrics(self._evaluated[-1])
            self._evaluated[-1] = gathered
        return result

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # without a mask there is no padding; the base class would say that it cannot know, in every step
        masked = "attention_mask" in inputs
        super()._track_num_input_tokens(
            inputs if masked else {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        )


def next_tokens(inputs: dict[str, Any]) -> Tensor:
    """The token after each position, -100 where none counts, [B, S]; takes the labels out of `inputs`.

    Raises:
        ValueError: if there are no labels.
    """
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None:
        return shifted
    if labels is None:
        raise ValueError(
            f"the batch has no labels, only {', '.join(inputs)}: they say which tokens count. Use a collator that "
            "makes them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def cross_entropy_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each row, summed over its tokens, in nats, fp64 [B].

    Args:
        logits: [B, S, V]; one row at a time is brought to fp32.
        targets: [B, S], -100 where none counts.
    """
    rows = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(row.float(), target, reduction="sum").double() for row, target in rows])


__all__ = ["TokenMeansMixin", "cross_entropy_of_rows", "next_tokens"]
