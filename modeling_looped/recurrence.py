"""The recurrence: the core's turns one after the other, and the layers that each runs.

B batch, S tokens, D hidden size, n residual streams, T loops, P, R, C layers of prelude, core and coda.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import LoopConditioning
from .configuration_looped import LoopedConfig
from .depth import Depth
from .depth_attention import DepthAttention
from .halting import Halting, Readings, Route, Step
from .injection import Injection, Prepared
from .layers import Held, KeyValue
from .loop_loss import LoopLoss
from .loop_update import LoopUpdate
from .outputs import LoopOutputs
from .readout import Readout
from .residual_streams import ResidualStreams
from .schedule import Schedule
from .slots import SlotLayout, Turn
from .state import StateInit


class LoopsOutput(NamedTuple):
    """What the recurrence gives.

    Attributes:
        readings: what has been read from it.
        states: before the first loop and after each one, [B, S, D]; or the first alone, where nobody asks for them.
        anchors: with depth attention, keys and values of all anchors, at the same places; or the last ones alone.
    """

    readings: Readings
    states: tuple[Tensor, ...]
    anchors: tuple[tuple[KeyValue, ...], ...]


class LayersOutput(NamedTuple):
    """What running layers gives.

    Attributes:
        hidden_states: the residual stream, or streams.
        held: what later loops of these layers read again.
        anchors: with depth attention, keys and values of all anchors so far, which later layers read.
    """

    hidden_states: Tensor
    held: tuple[Held, ...]
    anchors: tuple[KeyValue, ...]


class LoopedRecurrenceMixin:
    """What a model does between its embeddings and its head, with the strategies that its config names.

    `run` is always `_run_layers` with the arguments that stay the same throughout one forward.
    """

    config: LoopedConfig
    training: bool
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Any]
    layers: nn.ModuleList
    norm: nn.Module
    stored_types: list[str]
    residual_streams: ResidualStreams
    depth_attention: DepthAttention
    # of a model with a core
    prelude_norm: nn.Module | None
    injection: Injection
    state_init: StateInit
    loop_update: LoopUpdate
    loop_conditioning: LoopConditioning
    halting: Halting
    schedule: Schedule
    readout: Readout
    loop_loss: LoopLoss

    def _after_loops(
        self, state: Tensor, anchors: tuple[KeyValue, ...], layout: SlotLayout, run: Callable[..., LayersOutput]
    ) -> Tensor:
        """What follows the loops: from the state that they leave, and the anchors so far, to what the head reads."""
        _, core, coda = layout.stored_ranges()
        if core:
            state = self.readout(self.residual_streams.after_loops(state))
            if self.config.final_norm == "after_loops":
                state = self.norm(state)
        hidden_states = self.residual_streams.merge(run(state, coda, anchors=anchors).hidden_states)
        if not core or coda or self.config.final_norm != "every_loop":
            hidden_states = self.norm(hidden_states)
        return hidden_states

    def _read_loops(
        self,
        loops: LoopsOutput,
        hidden_states: Tensor,
        depth: Depth,
        layout: SlotLayout,
        run: Callable[..., LayersOutput],
    ) -> LoopOutputs:
        """What `config.loop_loss` reads; `hidden_states`: what the head reads."""
        supervised = self.loop_loss.supervised(depth.loops, depth.smallest)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.loop_loss.trains_gate_alone):
            # where every token is read from the last state, that has been done
            done = (hidden_states,) if self.halting.reads_last_state(depth.loops) else ()
            read = tuple(
                self._after_loops(loops.states[loop + 1], loops.anchors[loop + 1], layout, run)
                for loop in supervised[: len(supervised) - len(done)]
            )
        logits = loops.readings.logits
        return LoopOutputs(
            hidden_states=(*read, *done),
            loops=supervised,
            depth=None if depth.each is None else depth.each.squeeze(-1),
            num_loops=depth.loops,
            exit_logits=torch.stack(logits, dim=-1) if logits else None,
        )

    def _run_loops(
        self,
        prelude: Tensor,
        anchors: tuple[KeyValue, ...],
        initial_state: Tensor | None,
        positions: Tensor,
        valid: Tensor | None,
        num_slots: int,
        layout: SlotLayout,
        depth: Depth,
        run: Callable[..., LayersOutput],
        keep_states: bool,
    ) -> LoopsOutput:
        """The recurrence."""
        prelude = self.residual_streams.carry(prelude)
        if self.prelude_norm is not None:
            prelude = self.prelude_norm(prelude)
        injected = self.injection(prelude)
        state = self.residual_streams.start(self.state_init(prelude, positions))
        if initial_state is not None:
            if initial_state.ndim == 3:
                initial_state = self.residual_streams.start(initial_state)
            if initial_state.shape != state.shape:
                raise ValueError(
                    f"initial_state has the shape {tuple(initial_state.shape)} and must have {tuple(state.shape)}: "
                    "batch, tokens, width of the state."
                )
            state = initial_state.to(state)
        step = self._step
        if self.gradient_checkpointing and self.training and self.config.checkpoint_granularity == "loop":
            step = partial(self._gradient_checkpointing_func, step)

        turns = layout.turns(num_slots)
        while turns and not turns[-1].ends_loop:  # early exit in the middle of nested loops
            turns.pop()
        # Truncated backpropagation: the leading loops only find a state to start from.
        backprop_loops = self.config.backprop_loops if self.training else None
        first_with_graph = depth.first_loop_with_graph(backprop_loops)
        kept, kept_anchors = (state,), (anchors,)
        readings, streams = self.halting.start(state), self.schedule(state)
        held: dict[range, tuple[Held, ...]] = {}
        was_tracked = False
        for turn in turns:
            tracked = turn.outer_loop >= first_with_graph
            if tracked and not was_tracked:
                held = {}  # what loops without a graph hand on would never have a gradient
            was_tracked = tracked
            with torch.set_grad_enabled(torch.is_grad_enabled() and tracked):
                route = None
                if valid is not None:
                    route = self.halting.route(readings, streams[0], turn.loop, valid.to(streams[0].device))
                entering = self.schedule.read(streams, turn.state)
                taken, held[turn.layers], anchors = step(
                    entering,
                    streams[turn.state],
                    injected,
                    turn,
                    layout,
                    depth,
                    run,
                    positions,
                    held.get(turn.layers, ()),
                    anchors,
                    route,
                )
                if depth.each is not None:
                    state = depth.freeze(turn.outer_loop, streams[turn.state], taken.state)
                    taken = taken._replace(state=depth.truncate(turn.outer_loop, backprop_loops, state))
                streams = (*streams[: turn.state], taken.state, *streams[turn.state + 1 :])
                if turn.ends_loop:
                    is_last = turn is turns[-1]
                    readings = self.halting(readings.to(taken.state.device), taken, turn.outer_loop, is_last)
                    kept_anchors = (*kept_anchors, anchors) if keep_states else (anchors,)
                    kept = (*kept, taken.state) if keep_states else kept
        return LoopsOutput(readings if turns else Readings(state), kept, kept_anchors)

    def _step(
        self,
        entering: Tensor,
        previous: Tensor,
        injected: Prepared,
        turn: Turn,
        layout: SlotLayout,
        depth: Depth,
        run: Callable[..., LayersOutput],
        positions: Tensor,
        held: tuple[Held, ...],
        anchors: tuple[KeyValue, ...],
        route: Route | None,
    ) -> tuple[Step, tuple[Held, ...], tuple[KeyValue, ...]]:
        """One turn: from what enters it and the state that it will replace, both [B, S, D], the keys and values that
        loops share, and the anchors so far.
        """
        entering, mapping = self.residual_streams(entering, turn.loop)
        core_input = self.loop_conditioning(self.injection.inject(injected, entering, turn.loop), turn.loop, positions)
        # shared keys and values are every token's, so that nothing is to be hidden
        active = {} if route is None or self.config.kv_sharing != "none" else {"active": route.active}
        output, held, anchors = run(core_input, turn.layers, turn.loop, held, anchors, **active)
        # The core may end on another device than it started on.
        previous, core_input = previous.to(output.device), core_input.to(output.device)
        num_loops = depth.loops if depth.each is None else depth.own(output)
        state = self.loop_update(previous, output, turn.loop, num_loops, layout.group_of(turn.layers[0]))
        state = self.residual_streams.join_loop(previous, state, mapping)
        if self.config.final_norm == "every_loop":
            state = self.norm(state).to(output.device)
        if route is None:
            return Step(previous, core_input, state), held, anchors
        route = route.to(output.device)
        return Step(previous, core_input, self.halting.merge(route, previous, state), route.active), held, anchors

    def _run_layers(
        self,
        hidden_states: Tensor,
        layers: range,
        loop_idx: int = 0,
        held: tuple[Held, ...] = (),
        anchors: tuple[KeyValue, ...] = (),
        *,
        layout: SlotLayout,
        num_slots: int,
        masks: dict[str, Any],
        token_values: dict[int, Tensor],
        **kwargs: Any,
    ) -> LayersOutput:
        """Stored layers `layers`, in loop `loop_idx`, as far as the first `num_slots` slots go.

        Args:
            hidden_states: [B, S, D]; or streams [B, S, n, D], where the model carries several.
            layers: stored layers.
            loop_idx: from 0.
            held: where loops share keys and values, those of the first loop of each of these layers.
            anchors: with depth attention, keys and values of all anchors so far.
            layout, num_slots, masks, token_values, kwargs: of the forward.

        Returns:
            as `hidden_states`, and the keys and values for the next loop, or for later layers (none
            where nobody reads them again).
        """
        if not layers:
            return LayersOutput(hidden_states, held, anchors)
        handed_on: list[Held] = []
        hidden_states = self.residual_streams.spread(hidden_states, in_core=self.config.is_core_layer(layers[0]))
        for position, index in enumerate(layers):
            slot = layout.slot(index, loop_idx)
            if slot >= num_slots:
                break
            layer = self.layers[index]
            if token_values:
                kwargs["token_value"] = token_values.get(index)
            if self.depth_attention.mixes:
                kwargs["anchors"] = anchors
            shared = (held[position],) if held else ()
            mask = masks[self.stored_types[index]]
            output = layer(hidden_states, slot, loop_idx, *shared, attention_mask=mask, **kwargs)
            if not isinstance(output, tuple):
                hidden_states = output
                continue
            hidden_states, for_later = output
            if layer.is_anchor:
                anchors = (*anchors, for_later.attended)
                for_later = for_later._replace(attended=None)
            if layer.hands_on:
                handed_on.append(for_later)
        return LayersOutput(self.residual_streams.leave(hidden_states), held or tuple(handed_on), anchors)


__all__ = ["LayersOutput", "LoopedRecurrenceMixin", "LoopsOutput"]
