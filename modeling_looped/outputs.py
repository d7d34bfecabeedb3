"""What the models return beside what every Transformers model does.

B batch, S tokens, D hidden size, T loops.
"""

import dataclasses

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


# trf-ignore: TRF057 (described in full by hand)
@dataclasses.dataclass
class LoopedModelOutput(BaseModelOutputWithPast):
    """Output of [`LoopedModel`].

    Args:
        loop_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_loop_hidden_states=True`):
            the state before the first loop and after each one, T + 1 tensors of shape [B, S, D].
        exit_loops (`torch.LongTensor` of shape [B, S], *optional*, if `config.halting` chooses):
            number of loops after which each token halted.
    """

    loop_hidden_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None


# trf-ignore: TRF057 (described in full by hand)
@dataclasses.dataclass
class LoopedCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`LoopedForCausalLM`].

    Args:
        loop_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_loop_hidden_states=True`):
            the state before the first loop and after each one, T + 1 tensors of shape [B, S, D].
        exit_loops (`torch.LongTensor` of shape [B, S], *optional*, if `config.halting` chooses):
            number of loops after which each token halted.
    """

    loop_hidden_states: tuple[Tensor, ...] | None = None
    exit_loops: Tensor | None = None
