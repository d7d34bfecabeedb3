r"""Matching of hidden states: what each part of a student makes of a state, against what the teacher makes of it.

B batch, S tokens, D hidden size.

With `forced=True` (stage 1) every part gets the teacher's own state at its beginning and learns the teacher's state
at its end. One forward of the teacher gives all of them, so that all parts learn at once, and since what a part hands
on is replaced by the teacher's state, no gradient passes from one part to another. With `forced=False` the student
runs as it does, and its states are compared on the way, with a gradient from end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.conversion.calibration import first_of
from modeling_looped.modeling_looped import LoopedForCausalLM


class HiddenStates:
    """Reads the states at a teacher's boundaries, L + 1 of them, in one forward.

    Args:
        teacher: a stacked causal language model whose layers are called `model.layers`.

    Raises:
        ValueError: for another one.
    """

    def __init__(self, teacher: nn.Module):
        self.layers: Any = dict(teacher.named_modules()).get("model.layers")
        if not isinstance(self.layers, nn.ModuleList) or not len(self.layers):
            raise ValueError(f"the teacher, a {type(teacher).__name__}, has no `model.layers` whose states to match.")
        self.states: list[Tensor] = []
        self.layers[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer in self.layers:
            layer.register_forward_hook(self._add)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states = [args[0] if args else kwargs["hidden_states"]]

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        # not what the model returns as its hidden states: there the last one has passed the final norm
        self.states.append(first_of(output))


class HiddenMatcher:
    """Compares a student's states with a teacher's, layer by layer or loop by loop.

    The last layer of a loop is compared after the loop's update, since that is what the next loop starts from.

    Args:
        student: the looped model, without wrappers.
        boundaries: its layer map.
        granularity: `layer`, or `loop`: prelude and coda layer by layer, the core after every loop.
        loss: `normalized_mse` or `cosine`.
        forced: see above.

    Raises:
        ValueError: for a student whose states have another width than its layers' residual stream, or a layer map that
            asks one layer for nothing.
    """

    def __init__(self, student: nn.Module, boundaries: Sequence[int], *, granularity: str, loss: str, forced: bool):
        if not isinstance(student, LoopedForCausalLM):
            raise ValueError(
                f"the student, a {type(student).__name__}, is no LoopedForCausalLM: its states cannot be matched."
            )
        config: LoopedConfig = student.config
        layout = config.slot_layout()
        refuse_other_loops(config)
        self.forced, self.measure = forced, MEASURES[loss]
        self.targets: list[Tensor] | None = None
        self.found: list[tuple[Tensor, int]] = []
        self.loops_ended = 0
        invocations = [layout.invocation(index) for index in range(layout.num_invocations)]
        self.after = {invocation: boundaries[index + 1] for index, invocation in enumerate(invocations)}
        ends = [(turn.layers[-1], turn.loop) for turn in layout.turns()]
        self.loop_ends: list[int] = [self.after[end] for end in ends]  # pyright: ignore[reportArgumentType] (a tuple)
        self.compared = {
            invocation
            for invocation in invocations
            if not config.is_core_layer(invocation.layer) or (granularity == "layer" and invocation not in ends)
        }
        idle = [
            index
            for index, invocation in enumerate(invocations)
            if invocation in self.compared and boundaries[index] == boundaries[index + 1]
        ]
        if forced and idle:
            raise ValueError(
                f"layer_map gives the student's layer invocations {idle} the same state to begin and to end with: it "
                "executes more layers than the teacher has there. Use hidden_granularity='loop'."
            )
        for layer in student.model.layers:
            layer.register_forward_hook(self._after_layer, with_kwargs=True)
        if ends:
            student.model.loop_update.register_forward_hook(self._after_loop)

    def begin(self, states: Sequence[Tensor]) -> None:
        """Compare the student's next forward with these states of the teacher, one per boundary, [B, S, D]."""
        # they stay until the next call: recomputing activations runs the layers again, in the backward pass
        self.targets, self.found, self.loops_ended = [state.detach() for state in states], [], 0

    def end(self) -> None:
        """Leave the student's forwards alone."""
        self.targets, self.found = None, []

    def distance(self, valid: Tensor) -> Tensor:
        """Distance of each token that counts (`valid`, bool [B, S]), mean over the places, [N], in fp32.

        Raises:
            RuntimeError: if the forward missed a place.
        """
        places = len(self.compared) + len(self.loop_ends)
        if len(self.found) != places or self.targets is None:
            raise RuntimeError(f"the forward passed {len(self.found)} places where states are compared, of {places}.")
        total = torch.zeros((), device=valid.device)
        for state, boundary in self.found:
            total = total + self.measure(state[valid].float(), self.targets[boundary][valid].float())
        return total / places

    def _after_layer(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        invocation = (module.layer, args[2] if len(args) > 2 else kwargs["loop_idx"])
        return self._compare(output, self.after[invocation]) if invocation in self.compared else None  # pyright: ignore[reportArgumentType]

    def _after_loop(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        boundary = self.loop_ends[self.loops_ended % len(self.loop_ends)]
        self.loops_ended += 1
        return self._compare(output, boundary)

    def _compare(self, output: Any, boundary: int) -> Any:
        """Note a state that stands for the teacher's at `boundary`; where states are forced, hand that on instead."""
        if self.targets is None:
            return None
        state = first_of(output)
        self.found.append((state, boundary))
        if not self.forced:
            return None
        target = self.targets[boundary].to(state.dtype)
        return (target, *output[1:]) if isinstance(output, tuple) else target


def normalized_mse(states: Tensor, targets: Tensor) -> Tensor:
    r"""\|h - H\|^2 / \|H\|^2 of each row: a few tokens have states a hundred times as long as the others."""
    lengths = targets.square().sum(-1).clamp(min=torch.finfo(targets.dtype).tiny)
    return (states - targets).square().sum(-1) / lengths


def cosine(states: Tensor, targets: Tensor) -> Tensor:
    """1 - cos(h, H) of each row."""
    return 1.0 - F.cosine_similarity(states, targets, dim=-1)


MEASURES = {"normalized_mse": normalized_mse, "cosine": cosine}


def refuse_other_loops(config: LoopedConfig) -> None:
    """Raise ValueError for loops whose states are not a teacher's: nested, of another width, or chosen per token."""
    for name, plain in (("schedule", "flat"), ("halting", "none")):
        kind = getattr(config, name)["type"]
        if kind != plain:
            raise ValueError(f"hidden states cannot be matched with {name}={kind!r}, only with {plain!r}.")
    if config.state_size != config.hidden_size:
        raise ValueError(
            f"hidden states cannot be matched: the state is {config.state_size} wide and the teacher's layers "
            f"{config.hidden_size}."
        )


__all__ = ["HiddenMatcher", "HiddenStates"]
