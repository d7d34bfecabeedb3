"""A `Trainer` whose student learns from a teacher.

B batch, S tokens, V vocabulary, k entries kept of a precomputed distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import unwrap_peft_model

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.teacher import find_teacher

from .checkpoints import WholeCheckpointsMixin
from .config import DistillationConfig
from .evaluation import TokenMeansMixin, next_tokens
from .hidden_states import HiddenMatcher, HiddenStates
from .layer_map import check_map, default_map
from .losses import DistillationTerms, TopK, distillation_loss
from .optimizer import RecipeOptimizerMixin
from .parameters import select_trainable

#: Columns of a data set that hold a teacher's distributions, computed before; see `TopK`.
TARGET_COLUMNS = ("teacher_indices", "teacher_log_probs")

#: What is averaged over tokens between two log entries, and its name there.
LOGGED = ("divergence", "cross_entropy", "hidden_distance")


class DistillationTrainer(WholeCheckpointsMixin, RecipeOptimizerMixin, TokenMeansMixin):
    """Trains a student, looped or stacked, to match a teacher of the same vocabulary.

    The teacher stays in evaluation mode, in its own dtype, on the student's device, without gradients; it is no part
    of the student, of its checkpoints or of its optimiser. Every feature of `Trainer` works: gradient accumulation
    (the loss is a mean over all tokens of a step that count, however they are spread over batches and processes),
    resuming, several processes, mixed precision, checkpointing of activations, PEFT.

    Evaluation reports the student's cross-entropy per token as `eval_loss`, and with a teacher `eval_kl`, the
    KL(teacher || student) per token at temperature 1; both are exact means over tokens, padding excluded.

    Args:
        model: the student.
        teacher_model: the teacher, its folder or its Hub id; `None`: what `args` names; where it names none either,
            the training data must hold the teacher's distributions (see `targets.py`), unless the loss is the
            cross-entropy alone.
        args: a `DistillationConfig`.
        kwargs: for `Trainer`.

    Raises:
        ValueError: for a teacher that does not fit the student, or arguments that do not fit together.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: DistillationConfig | None = None,
        **kwargs: Any,
    ):
        args = DistillationConfig() if args is None else args
        if kwargs.get("compute_loss_func") is not None or args.label_smoothing_factor:
            raise ValueError("compute_loss_func and label_smoothing_factor replace the loss, which is the teacher's.")
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        teacher = load_teacher(args) if teacher_model is None else teacher_model
        if isinstance(teacher, str):
            teacher = load_teacher(args, teacher)
        refuse_loop_loss(model)
        if teacher is not None:
            check_vocabulary(model, teacher)
        if args.disable_dropout:
            disable_dropout(model)
        self.trainable_names = select_trainable(model, args.trainable)
        if args.stage == "hidden" and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # the final norm and the head take no part
        super().__init__(model=model, args=args, **kwargs)
        # what the base class finds out from the student's own loss is settled here: ours counts shifted labels
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = nn.Module.to(teacher.requires_grad_(False).eval(), args.device)
        self.matcher: HiddenMatcher | None = None
        if args.compares_hidden_states:
            self.matcher, self.teacher_states = self._matcher()
        self._sums = torch.zeros(len(LOGGED) + 1, dtype=torch.float64, device=args.device)

    def _matcher(self) -> tuple[HiddenMatcher, HiddenStates]:
        """What compares the student's states with the teacher's; raises ValueError where that makes no sense."""
        args, student = self.args, unwrap_peft_model(self.model)
        if self.teacher is None:
            raise ValueError(
                f"stage={args.stage!r} with hidden_weight={args.hidden_weight} compares hidden states, and there is "
                "no teacher whose states they could be: pass teacher_model."
            )
        states = HiddenStates(self.teacher)
        config, theirs, num_layers = student.config, self.teacher.config, len(states.layers)
        if config.hidden_size != theirs.hidden_size:
            raise ValueError(
                f"hidden states cannot be matched: the student's hidden_size={config.hidden_size} is not the "
                f"teacher's {theirs.hidden_size}."
            )
        if not isinstance(config, LoopedConfig):
            raise ValueError(
                f"hidden states can be matched for looped students only, not for a {type(student).__name__}."
            )
        layout = config.slot_layout()
        boundaries = args.layer_map or default_map(layout, num_layers)
        check_map(boundaries, layout, num_layers)
        forced = args.stage == "hidden"
        matcher = HiddenMatcher(
            student, boundaries, granularity=args.hidden_granularity, loss=args.hidden_loss, forced=forced
        )
        return matcher, states

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *TARGET_COLUMNS]))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the distillation loss, in evaluation the student's cross-entropy; means over tokens."""
        inputs = dict(inputs)
        targets = next_tokens(inputs)
        known = known_distributions(inputs)
        items = targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        if not model.training:
            return self._evaluate_batch(model, inputs, targets, known, return_outputs)

        valid = targets.ne(-100)
        # stage 1 has no use for logits, of which the last row must do
        less = {"logits_to_keep": 1} if self.args.stage == "hidden" else {}
        teacher = known if known is not None and self.matcher is None else self._teacher_logits(inputs, **less)
        if self.matcher is None:
            outputs = model(**inputs, use_cache=False)
        else:
            self.matcher.begin(self.teacher_states.states)
            num_loops = unwrap_peft_model(self.model).config.num_loops  # what the layer map is made for
            outputs = model(**inputs, use_cache=False, num_loops=num_loops, **less)
        if self.args.stage == "hidden":
            zero = torch.zeros_like(targets[valid], dtype=torch.float32)
            terms = DistillationTerms(zero.sum(), zero, zero)
        else:
            if teacher is None and self.args.cross_entropy_weight < 1.0:
                raise ValueError(
                    f"cross_entropy_weight={self.args.cross_entropy_weight} leaves a part of the loss to a teacher, "
                    "and there is none: pass teacher_model, or data with its distributions, or cross_entropy_weight=1."
                )
            terms = self._terms(outputs.logits, known if known is not None else teacher, targets)
        loss, distance = terms.loss, torch.zeros_like(terms.divergence)
        if self.matcher is not None:
            distance = self.matcher.distance(valid)
            loss = loss + (1.0 if self.args.stage == "hidden" else self.args.hidden_weight) * distance.sum()
        parts = [terms.divergence.sum(), terms.cross_entropy.sum(), distance.detach().sum(), valid.sum()]
        self._sums += torch.stack([part.double() for part in parts])
        loss = loss / items
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which gradients are averaged over
        return (loss, outputs) if return_outputs else loss

    def _evaluate_batch(
        self, model: nn.Module, inputs: dict[str, Any], targets: Tensor, known: TopK | None, return_outputs: bool
    ) -> Any:
        """The student's cross-entropy, and what `evaluation_loop` needs to sum it over all batches."""
        if self.matcher is not None:
            self.matcher.end()
        outputs = model(**inputs, use_cache=False)
        teacher = known if known is not None else self._teacher_logits(inputs)
        terms = self._terms(outputs.logits, teacher, targets, evaluating=True)
        self._evaluated.append(sums_by_row(terms, targets, teacher is not None))
        loss = terms.cross_entropy.mean() if len(terms.cross_entropy) else terms.loss
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def _teacher_logits(self, inputs: dict[str, Any], **kwargs: Any) -> Tensor | None:
        """The teacher's logits [B, S, V] for the student's inputs; `None` without a teacher."""
        if self.teacher is None:
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        with torch.no_grad():
            given = {name: inputs[name] for name in names if name in inputs}
            return self.teacher(**given, use_cache=False, **kwargs).logits

    def _terms(
        self, logits: Tensor, teacher: Tensor | TopK | None, targets: Tensor, *, evaluating: bool = False
    ) -> DistillationTerms:
        args = self.args
        settings = {
            "divergence": args.divergence,
            "beta": args.beta,
            "temperature": args.temperature,
            "cross_entropy_weight": args.cross_entropy_weight,
        }
        return distillation_loss(
            logits.flatten(0, 1),
            teacher.flatten(0, 1) if isinstance(teacher, Tensor) else teacher,
            targets.flatten(),
            chunk_tokens=args.loss_chunk_tokens,
            **({} if evaluating else settings),
        )

    def token_metrics(self, sums: list[float], prefix: str, dataset: Any) -> dict[str, float]:
        entropy, kl, with_teacher, tokens = sums
        metrics = {f"{prefix}_loss": entropy / max(tokens, 1), f"{prefix}_tokens": int(tokens)}
        return {**metrics, f"{prefix}_kl": kl / with_teacher} if with_teacher else metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; entries of training get the parts of the loss, each a mean over tokens."""
        if "loss" in logs:
            sums: Any = self.accelerator.reduce(self._sums, reduction="sum")
            values = dict(zip(LOGGED, (sums[:-1] / sums[-1].clamp(min=1)).tolist(), strict=True))
            if not self.args.compares_hidden_states:
                del values["hidden_distance"]
            if self.args.stage == "hidden":
                del values["divergence"], values["cross_entropy"]
            logs = {**logs, **values}
            self._sums.zero_()
        super().log(logs, start_time)


def known_distributions(inputs: dict[str, Any]) -> TopK | None:
    """The teacher's distributions that came with the batch, if any; takes them out of `inputs`."""
    indices, log_probs = (inputs.pop(name, None) for name in TARGET_COLUMNS)
    if indices is None or log_probs is None:
        return None
    return TopK(indices.flatten(0, 1), log_probs.flatten(0, 1))


def sums_by_row(terms: DistillationTerms, targets: Tensor, has_teacher: bool) -> Tensor:
    """For each row of a batch: cross-entropy, KL, tokens with a teacher and tokens, [B, 4] in fp64."""
    valid = targets.ne(-100)
    rows = valid.nonzero()[:, 0]
    sums = torch.zeros(len(targets), 4, dtype=torch.float64, device=targets.device)
    values = torch.stack((terms.cross_entropy, terms.divergence), dim=-1).double()
    sums[:, :2].index_add_(0, rows, values)
    sums[:, 3] = valid.sum(-1)
    sums[:, 2] = sums[:, 3] * has_teacher
    return sums


def load_teacher(args: DistillationConfig, name: str | None = None) -> PreTrainedModel | None:
    """The teacher that `args` describe, or `None` if they name none.

    Raises:
        ValueError: if it cannot be found or loaded.
    """
    name = name or args.teacher_model_name_or_path
    if name is None:
        return None
    given: Any = args.teacher_model_init_kwargs or {}
    if args.teacher_gguf_file is not None or set(given) <= {"dtype"}:
        unknown = sorted(set(given) - {"dtype"})
        if unknown:
            raise ValueError(f"teacher_model_init_kwargs: {', '.join(unknown)} do not go with teacher_gguf_file.")
        files = find_teacher(
            name,
            gguf_file=args.teacher_gguf_file,
            revision=args.teacher_model_revision,
            field="teacher_model_name_or_path",
        )
        return files.model(dtype=given.get("dtype", "auto"))
    revision = {} if args.teacher_model_revision is None else {"revision": args.teacher_model_revision}
    return AutoModelForCausalLM.from_pretrained(name, **revision, **given)


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless both have equally many tokens."""
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher's vocab_size={sizes[1]} is not the student's {sizes[0]}: distillation compares their "
            "distributions token by token, so both must share one tokenizer."
        )


def refuse_loop_loss(student: nn.Module) -> None:
    """Raise ValueError for a student with a loss of its own, which distillation would leave out without a word."""
    loss = getattr(getattr(unwrap_peft_model(student), "config", None), "loop_loss", None)
    if loss is not None and loss["type"] != "output":
        raise ValueError(
            f"loop_loss={loss['type']!r} replaces the loss, which is the teacher's here: load the student with "
            "loop_loss='output'."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to zero, those that its attention applies included."""
    for module in model.modules():
        attention: Any = module
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(attention, "attention_dropout", None), float):
            attention.attention_dropout = 0.0


__all__ = ["TARGET_COLUMNS", "DistillationTrainer", "disable_dropout", "load_teacher"]
