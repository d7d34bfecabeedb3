"""Arguments and trainer of pretraining: a causal language model, looped or stacked, from random weights.

B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer import unwrap_peft_model

from modeling_looped.configuration_looped import LoopedConfig

from .arguments import RecipeArguments
from .checkpoints import WholeCheckpointsMixin
from .evaluation import TokenMeansMixin, cross_entropy_of_rows, next_tokens
from .optimizer import RecipeOptimizerMixin
from .recipe import DataConfig


@dataclass
class PretrainingRun(DataConfig):
    """Model, tokenizer and text of a pretraining run; how to train is in `PretrainingConfig`.

    Attributes:
        model: JSON file of a model's config (such as those in `configuration/`), a folder that has a `config.json`, or
            a mapping of its fields. `model_type` says which of Transformers' models it is; left out, it is a looped
            one. Of a folder only the config is read.
        model_config: fields of that to change, such as `{"num_loops": 4}`.
        attn_implementation: which of Transformers' attentions computes it (`sdpa`, `eager`, `flash_attention_2`, …);
            `None`: its own choice.
        tokenizer_name_or_path: an existing tokenizer's folder or Hub id; `None`: a byte-level BPE is trained on the
            run's text, once, into `output_dir/tokenizer`.
        tokenizer_vocab_size: tokens of the trained one; `None`: the model's `vocab_size`.
        tokenizer_max_characters: how much of the text it is trained on.
    """

    MAPPINGS: ClassVar[tuple[str, ...]] = ("model", "model_config", "eval_datasets")

    model: dict | str | None = field(
        default=None, metadata={"help": "Config of the model: a JSON file, a folder, or its fields as JSON."}
    )
    model_config: dict | str | None = field(default=None, metadata={"help": "Fields of that to change, as JSON."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: `sdpa`, `eager`, `flash_attention_2`, …"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "An existing tokenizer; by default one is trained."}
    )
    tokenizer_vocab_size: int | None = field(default=None, metadata={"help": "Tokens of the trained one."})
    tokenizer_max_characters: int = field(
        default=100_000_000, metadata={"help": "How much of the text a tokenizer is trained on."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model is None:
            raise ValueError("model is missing: a JSON file or folder with a model's config, or the fields of one.")
        self.check_mapping("model_config")
        self.check_positive("tokenizer_vocab_size", "tokenizer_max_characters")
        if self.tokenizer_name_or_path is not None and self.tokenizer_vocab_size is not None:
            raise ValueError(
                f"tokenizer_vocab_size={self.tokenizer_vocab_size} is of a tokenizer that is trained, and "
                f"tokenizer_name_or_path={self.tokenizer_name_or_path!r} names one that exists: leave one out."
            )


@dataclass
class PretrainingConfig(RecipeArguments):
    """Arguments of [`PretrainingTrainer`]: those of [`RecipeArguments`], and these.

    Attributes:
        eval_num_loops: loop counts at which evaluation measures the loss, beside the model's own.
    """

    eval_num_loops: list[int] | None = field(
        default=None, metadata={"help": "Loop counts at which the loss is measured, beside the model's own."}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "As in TrainingArguments, but one pass by default."}
    )
    include_num_input_tokens_seen: str | bool = field(
        default="non_padding", metadata={"help": "As in TrainingArguments, but on by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        counts = self.eval_num_loops or []
        if any(count < 1 for count in counts) or len(set(counts)) < len(counts):
            raise ValueError(f"eval_num_loops={counts} must be different numbers of at least 1.")


class PretrainingTrainer(WholeCheckpointsMixin, RecipeOptimizerMixin, TokenMeansMixin):
    r"""A `Trainer` with an optimiser for looped models, whole checkpoints and exact evaluation.

    The loss in training is the model's own. Evaluation reports the cross-entropy, with L the sum over all tokens, at
    the config's loop count and, with `eval_num_loops`, at others (`eval_loops_4_loss`, …):

    | metric | |
    |---|---|
    | `eval_loss` | L / tokens, in nats |
    | `eval_nats_per_byte` | L / bytes of the text that these tokens stand for |
    | `eval_bits_per_byte` | that divided by ln 2, which no tokenizer changes the meaning of |

    The end-of-text token counts in L, and as no byte. The two per byte are there if the data set has `target_bytes`.

    Args:
        args, kwargs: as for `Trainer`; the arguments are a `PretrainingConfig`.

    Raises:
        ValueError: for loop counts of a model without loops.
    """

    args: PretrainingConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_eval_loops(unwrap_peft_model(self.model).config, self.args)

    @property
    def extra_loops(self) -> list[int]:
        """Loop counts of evaluation beside the model's own."""
        own = getattr(unwrap_peft_model(self.model).config, "num_loops", None)
        return [count for count in self.args.eval_num_loops or [] if count != own]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the model's own loss, in evaluation the cross-entropy per token."""
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        targets = next_tokens(inputs)
        sums = [cross_entropy_of_rows(model(**inputs, use_cache=False).logits, targets)]
        for count in self.extra_loops:
            logits = model(**inputs, use_cache=False, num_loops=count).logits
            sums.append(cross_entropy_of_rows(logits, targets))
        tokens = targets.ne(-100).sum(dim=-1).double()
        self._evaluated.append(torch.stack([*sums, tokens], dim=-1))
        loss = (sums[0].sum() / tokens.sum().clamp(min=1)).float()
        return (loss, {"loss": loss}) if return_outputs else loss

    def token_metrics(self, sums: list[float], prefix: str, dataset: Any) -> dict[str, float]:
        *entropies, tokens = sums
        names = [prefix, *(f"{prefix}_loops_{count}" for count in self.extra_loops)]
        size = getattr(dataset, "target_bytes", None)
        metrics: dict[str, float] = {f"{prefix}_tokens": int(tokens)}
        if size:
            metrics[f"{prefix}_bytes"] = size
        for name, entropy in zip(names, entropies, strict=True):
            metrics[f"{name}_loss"] = entropy / max(tokens, 1)
            if size:
                metrics[f"{name}_nats_per_byte"] = entropy / size
                metrics[f"{name}_bits_per_byte"] = entropy / size / math.log(2)
        return metrics


def check_eval_loops(config: Any, args: PretrainingConfig) -> None:
    """Raise ValueError for `eval_num_loops` where the model of `config` has no loops."""
    looped = isinstance(config, LoopedConfig) and config.num_core_layers > 0
    if args.eval_num_loops and not looped:
        raise ValueError(
            f"eval_num_loops={args.eval_num_loops}: a model of type {config.model_type!r} without a core has no loops "
            "to count. Leave it out."
        )


__all__ = ["PretrainingConfig", "PretrainingRun", "PretrainingTrainer", "check_eval_loops"]
