"""What the models return beside what every Transformers model does.

B batch, S tokens, D hidden size, T loops.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.output_capturing import selected_hidden_states

from .depth import loops_of

#: The config field by which Transformers would count the hidden states of a call. There is none, since their number
#: depends on the call's `num_loops`: this leaves the counting to `hidden_states_of_the_call`.
NO_FIELD = "slots_of_the_call"


class LoopOutputs(NamedTuple):
    """What the base model gives for `config.loop_loss`.

    Attributes:
        hidden_states: what the head would read if the model ended with each supervised loop, K tensors [B, S, D].
        loops: those loops, from 0.
        depth: loops that each row [B, 1] or token [B, S] ran; `None`: `num_loops`.
        num_loops: T.
        exit_logits: of a gate, fp32 [B, S, T]; `None` without one.
    """

    hidden_states: tuple[Tensor, ...]
    loops: range
    depth: Tensor | None
    num_loops: int
    exit_logits: Tensor | None


@dataclasses.dataclass
class LoopFields:
    """What every output has beside the fields of Transformers' own, after them: a tuple begins as theirs does.

    Args:
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*, with `output_attentions=True` and
            `config.add_cross_attention`): weights [B, H, S, E] of each cross-attention over the encoder's E tokens, in
            the order of execution.
        loop_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_loop_hidden_states=True`):
            the state before the first loop and after each one, T + 1 tensors of shape [B, S, D]; with
            `config.core_group_size`, after each loop of each group; [B, S, n, D] where the loop carries n residual
            streams.
        exit_loops (`torch.LongTensor` of shape [B, S], *optional*, if `config.halting` chooses):
            number of loops after which each token halted; with a router, that each token took.
        exit_probabilities (`torch.FloatTensor` of shape [B, S, T], *optional*, as above):
            each token's distribution of exits over the loops, fp32 (weights that need not sum to one in the
            `universal` form of adaptive computation time).
        num_loops (`torch.LongTensor` of shape [B] or [B, S], *optional*, if the depth was drawn or given per row):
            loops that each sequence, or each token, ran (`config.depth_sampling`).
    """

    cross_attentions: tuple[Tensor, ...] | None = None
    loop_hidden_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None
    exit_probabilities: Tensor | None = None
    num_loops: Tensor | None = None


LOOP_FIELDS = tuple(field.name for field in dataclasses.fields(LoopFields))


def describes_loop_fields(cls: type) -> type:
    """Class decorator: the fields of `LoopFields` in the docstring too, in which `auto_docstring` looks for them."""
    _, shared = inspect.cleandoc(LoopFields.__doc__ or "Args:\n").split("Args:\n")
    intro, _, own = inspect.cleandoc(cls.__doc__ or "").partition("\n\nArgs:\n")
    cls.__doc__ = f"{intro}\n\nArgs:\n{shared}\n{own}".rstrip()
    return cls


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedModelOutput(LoopFields, BaseModelOutputWithPast):
    """Output of [`LoopedModel`].

    Args:
        loop_readings (`LoopOutputs`, *optional*, with `output_loop_readings=True`): what a head reads to compute
            `config.loop_loss`.
    """

    loop_readings: LoopOutputs | None = None

    def loop_fields(self) -> dict[str, Any]:
        """What a head passes on of [`LoopFields`]."""
        return {name: getattr(self, name) for name in LOOP_FIELDS}


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedCausalLMOutput(LoopFields, CausalLMOutputWithPast):
    """Output of [`LoopedForCausalLM`]."""


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedMaskedLMOutput(LoopFields, MaskedLMOutput):
    """Output of [`LoopedForMaskedLM`]."""


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedSequenceClassifierOutput(LoopFields, SequenceClassifierOutputWithPast):
    """Output of [`LoopedForSequenceClassification`]."""


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedTokenClassifierOutput(LoopFields, TokenClassifierOutput):
    """Output of [`LoopedForTokenClassification`]."""


# trf-ignore: TRF057 (described in full by hand)
@describes_loop_fields
@dataclasses.dataclass
class LoopedQuestionAnsweringOutput(LoopFields, QuestionAnsweringModelOutput):
    """Output of [`LoopedForQuestionAnswering`]."""


def hidden_states_of_the_call(forward: Callable) -> Callable:
    """Decorator around `capture_outputs`: `output_hidden_states=[-1]` means the last one of this call's loop count,
    and of several residual streams the mean is returned.
    """

    @functools.wraps(forward)
    def wrapper(self, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_hidden_states")
        selected = selected_hidden_states(self.config.output_hidden_states if asked is None else asked)
        if selected is not None:
            num_loops = kwargs.get("num_loops")
            num_loops = self.config.num_loops if num_loops is None else loops_of(num_loops)
            layout = self.config.slot_layout(num_loops)
            cut = layout.num_slots - self.config.slots_to_run(num_loops)  # early exit
            indices = range(layout.num_invocations - cut + 1)
            kwargs["output_hidden_states"] = [indices[i] for i in selected if -len(indices) <= i < len(indices)]
        if self.config.residual_streams["type"] == "none":
            return forward(self, *args, **kwargs)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        outputs = forward(self, *args, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            merge = self.residual_streams.merge
            outputs.hidden_states = tuple(None if x is None else merge(x) for x in outputs.hidden_states)
        return outputs if return_dict in (None, True) else outputs.to_tuple()

    return wrapper
