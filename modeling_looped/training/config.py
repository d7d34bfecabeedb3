"""Arguments of distillation: those of every training run, and what a teacher adds to them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .arguments import RecipeArguments, check_choice
from .losses import DIVERGENCES
from .parameters import TRAINABLE

STAGES = ("logits", "hidden")
HIDDEN_LOSSES = ("normalized_mse", "cosine")
GRANULARITIES = ("layer", "loop")


@dataclass
class DistillationConfig(RecipeArguments):
    r"""Arguments of [`DistillationTrainer`]: those of [`RecipeArguments`], and these.

    Names are those of TRL's GKD and GOLD configs where they have one.

    Attributes:
        teacher_model_name_or_path: folder or Hub id of the teacher, if none is passed to the trainer.
        teacher_model_revision: branch, tag or commit of a teacher on the Hub.
        teacher_model_init_kwargs: for `AutoModelForCausalLM.from_pretrained`; `dtype` is free.
        teacher_gguf_file: GGUF file in the teacher's folder; its weights are unpacked.
        stage: `logits`: match the teacher's next-token distribution end to end; `hidden`: match its hidden states,
            every layer or loop by itself from the teacher's own input to it, with no gradient between them.
        divergence: `forward_kl`, `reverse_kl` or `jensen_shannon`.
        beta: weight of the teacher in `jensen_shannon`, strictly between 0 and 1 (0.5: the usual one).
        temperature: divides both logits in the divergence, which then counts `temperature` squared times.
        cross_entropy_weight: share of the cross-entropy with the data in the loss, in [0, 1].
        loss_chunk_tokens: tokens whose loss is computed at a time; changes memory alone.
        hidden_weight: with `stage="logits"`, weight of the distance of hidden states, added to the loss.
        hidden_loss: `normalized_mse`: squared distance over the squared length of the teacher's state; or `cosine`.
        hidden_granularity: whether states are compared after every `layer`, or only after every `loop` of the core.
        layer_map: teacher boundary before each of the student's layer invocations and after the last one (boundary b
            lies before the teacher's layer b); `None`: worked out from how the student was made.
        trainable: `all`, `adapters`, `shared`, or a regular expression for names of parameters.
        disable_dropout: whether to set the student's dropouts to zero.
    """

    # `JSON` text on a command line, like the fields of this kind that TrainingArguments has
    _VALID_DICT_FIELDS = [*RecipeArguments._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of the teacher."})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments for the teacher's `from_pretrained`, as JSON."}
    )
    teacher_gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the teacher's folder."})
    stage: str = field(
        default="logits", metadata={"help": "`logits`: end to end; `hidden`: every layer or loop by itself."}
    )
    divergence: str = field(default="forward_kl", metadata={"help": "`forward_kl`, `reverse_kl` or `jensen_shannon`."})
    beta: float = field(
        default=0.5, metadata={"help": "Weight of the teacher in `jensen_shannon`, strictly between 0 and 1."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides both logits in the divergence."})
    cross_entropy_weight: float = field(
        default=0.0, metadata={"help": "Share of the cross-entropy with the data in the loss."}
    )
    loss_chunk_tokens: int = field(default=128, metadata={"help": "Tokens whose loss is computed at a time."})
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of hidden states beside the logits."}
    )
    hidden_loss: str = field(default="normalized_mse", metadata={"help": "`normalized_mse` or `cosine`."})
    hidden_granularity: str = field(
        default="layer", metadata={"help": "Compare states after every `layer` or every `loop`."}
    )
    layer_map: list[int] | None = field(
        default=None, metadata={"help": "Teacher boundary before each invocation and after the last."}
    )
    trainable: str = field(default="all", metadata={"help": "`all`, `adapters`, `shared`, or a regular expression."})
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to set the student's dropouts to zero."})
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "As in TrainingArguments, but one pass by default."}
    )
    include_num_input_tokens_seen: str | bool = field(
        default="non_padding", metadata={"help": "As in TrainingArguments, but on by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (
            ("stage", STAGES),
            ("divergence", DIVERGENCES),
            ("hidden_loss", HIDDEN_LOSSES),
            ("hidden_granularity", GRANULARITIES),
        ):
            check_choice(self, name, allowed)
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta={self.beta} must lie strictly between 0 and 1; at its ends are divergence='forward_kl' and "
                "'reverse_kl'."
            )
        if not self.temperature > 0.0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if not 0.0 <= self.cross_entropy_weight <= 1.0:
            raise ValueError(f"cross_entropy_weight={self.cross_entropy_weight} must lie in [0, 1].")
        if self.loss_chunk_tokens < 1:
            raise ValueError(f"loss_chunk_tokens={self.loss_chunk_tokens} must be at least 1.")
        if not self.hidden_weight >= 0.0:
            raise ValueError(f"hidden_weight={self.hidden_weight} must not be negative.")
        if self.trainable not in TRAINABLE:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise ValueError(
                    f"trainable={self.trainable!r} is neither one of {', '.join(TRAINABLE)} nor a regular expression: "
                    f"{error}."
                ) from error

    @property
    def compares_hidden_states(self) -> bool:
        """Whether the loss reads the teacher's hidden states."""
        return self.stage == "hidden" or self.hidden_weight > 0.0


__all__ = ["DistillationConfig"]
