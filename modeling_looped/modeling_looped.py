"""Looped language models: prelude, a core that runs `num_loops` times, coda.

B batch, S tokens, D hidden size, T loops, P, R, C layers of prelude, core and coda; N = P + R*T + C slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .conditioning import LOOP_CONDITIONINGS
from .configuration_looped import LoopedConfig, refuse_foreign_loop_names
from .generation import LoopedGenerationMixin
from .halting import HALTINGS, Readings
from .injection import INJECTIONS
from .inputs import attention_masks, default_position_ids, refuse_cache_in_recompute, refuse_foreign_cache
from .layers import LoopedAttention, LoopedDecoderLayer, LoopedRMSNorm, LoopedRotaryEmbedding
from .loop_adapter import LOOP_ADAPTERS, LoopLoRA
from .loop_update import LOOP_UPDATES
from .outputs import NO_FIELD, LoopedCausalLMOutput, LoopedModelOutput, hidden_states_of_the_call
from .peft_defaults import offer_peft_defaults
from .readout import READOUTS
from .registry import BuildContext, Strategy
from .slots import SlotLayout, checked_num_loops
from .state import STATE_INITS
from .unrolling import unroll

logger = logging.get_logger(__name__)


@auto_docstring
class LoopedPreTrainedModel(PreTrainedModel):
    config: LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(LoopedDecoderLayer, num_hidden_layers_key=NO_FIELD),
        "attentions": LoopedAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module.

        | what | how | why |
        |---|---|---|
        | linear and embedding weights | N(0, initializer_range) | Transformers' default |
        | biases | 0 | |
        | norms | 1 | |
        | strategies, loop adapters | their own `init_weights`, documented there | |
        | rotary tables | recomputed | they are not in the checkpoint |
        """
        super()._init_weights(module)
        if isinstance(module, Strategy | LoopLoRA):
            module.init_weights()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        if enable and self.config.checkpoint_granularity == "loop":
            for module in self.modules():
                if isinstance(module, LoopedDecoderLayer) and self.config.is_core_layer(module.layer):
                    module.gradient_checkpointing = False  # the loop around it is recomputed as a whole

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, *args: Any, **kwargs: Any):
        """As in Transformers, except that `use_reentrant=True` is refused.

        Raises:
            ValueError: for `use_reentrant=True`: its hooks fire once per use of a parameter, and a looped layer's are
                used several times, which DistributedDataParallel rejects in the middle of a step.
        """
        given = activation_checkpointing_kwargs or {}
        if given.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True does not work with layers that run several times in one forward (under "
                "DistributedDataParallel it fails with 'marked as ready twice'). Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or leave it out.'
            )
        # torch reads a missing `use_reentrant` as True, so other options must not leave it out
        super().activation_checkpointing_enable({**given, "use_reentrant": False}, *args, **kwargs)

    def compile_blocks(self, **kwargs: Any) -> None:
        """Compile the two halves of every layer (up to attention, and after it), the documented way to use
        `torch.compile` with a loop count that varies: the graphs do not depend on it.

        The dispatch of attention stays outside of the graphs, since the module that does it differs in every loop.

        Args:
            kwargs: passed to `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, LoopedDecoderLayer):
                module.self_attn.project = torch.compile(module.self_attn.project, **kwargs)
                module.feed_forward = torch.compile(module.feed_forward, **kwargs)


@auto_docstring
class LoopedModel(LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)

        context = BuildContext(
            hidden_size=config.hidden_size,
            num_core_layers=config.num_core_layers,
            initializer_range=config.initializer_range,
            rms_norm_eps=config.rms_norm_eps,
        )
        conditioning = LOOP_CONDITIONINGS.build(config.loop_conditioning, context)
        adapter = LOOP_ADAPTERS.build(config.loop_adapter, context)
        # One list of the stored layers, so that the names, plans and regular expressions that the ecosystem writes for
        # `model.layers.<i>` mean the physical layers here too.
        self.layers = nn.ModuleList(
            LoopedDecoderLayer(config, layer, conditioning.norm_rows, adapter)
            if config.is_core_layer(layer)
            else LoopedDecoderLayer(config, layer)
            for layer in range(config.num_stored_layers)
        )
        if config.num_core_layers > 0:
            self.prelude_norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps) if config.prelude_norm else None
            self.injection = INJECTIONS.build(config.injection, context)
            self.state_init = STATE_INITS.build(config.state_init, context)
            self.loop_update = LOOP_UPDATES.build(config.loop_update, context)
            self.loop_conditioning = conditioning
            self.halting = HALTINGS.build(config.halting, context)
            self.readout = READOUTS.build(config.readout, context)
        self.norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LoopedRotaryEmbedding(config)
        self.stored_types = [config.stored_layer_type(layer) for layer in range(config.num_stored_layers)]
        self.gradient_checkpointing = False
        self.post_init()
        offer_peft_defaults(config.model_type)

    @merge_with_config_defaults
    @hidden_states_of_the_call
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        initial_state: torch.FloatTensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedModelOutput:
        r"""
        num_loops (`int`, *optional*):
            How often the core runs in this call; `None`: `config.num_loops`. A cache belongs to one loop count.
        initial_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            State before the first loop, in place of what `config.state_init` makes.
        output_loop_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to return `loop_hidden_states`, the state before the first loop and after each one.
        """
        refuse_foreign_loop_names(kwargs, "forward")
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        layout = self._layout(num_loops)
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_scale != 1.0:
            embeds = embeds * self.config.embedding_scale

        if not self.config.is_causal:
            use_cache, past_key_values = False, None
        given_cache = past_key_values
        if use_cache and past_key_values is None:
            sized = self.config if layout.loops == self.config.num_loops else self.config.with_num_loops(layout.loops)
            past_key_values = DynamicCache(config=sized)
        num_slots = self.config.slots_to_run(layout.loops)
        if past_key_values is not None:
            refuse_foreign_cache(past_key_values, num_slots, layout)
            if self.gradient_checkpointing and self.training:
                refuse_cache_in_recompute()

        positions: Tensor | None = position_ids
        if positions is None:
            positions = default_position_ids(embeds, attention_mask, given_cache, kwargs.get("cu_seq_lens_q"))
        # Only the caller's cache: the mask functions look for packed sequences where there is none, and one made above
        # is still empty.
        masks = attention_masks(self.config, self.stored_types, embeds, attention_mask, positions, given_cache)
        cos, sin = self.rotary_emb(embeds, positions)
        run = partial(
            self._run_layers,
            layout=layout,
            num_slots=num_slots,
            masks=masks,
            position_embeddings=(cos.unsqueeze(1), sin.unsqueeze(1)),  # one for all heads
            position_ids=positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )

        prelude, core, coda = layout.stored_ranges()
        hidden_states, states, exit_loops = run(embeds, prelude), None, None
        if core:
            readings, states = self._run_loops(
                hidden_states, initial_state, positions, num_slots, layout, run, keep_states=output_loop_hidden_states
            )
            hidden_states, exit_loops = self.readout(readings.output), readings.exit_loops
            if self.config.final_norm == "after_loops":
                hidden_states = self.norm(hidden_states)
        hidden_states = run(hidden_states, coda)
        if not core or coda or self.config.final_norm != "every_loop":
            hidden_states = self.norm(hidden_states)
        return LoopedModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            loop_hidden_states=states if output_loop_hidden_states else None,
            exit_loops=exit_loops,
        )

    def _run_loops(
        self,
        prelude: Tensor,
        initial_state: Tensor | None,
        positions: Tensor,
        num_slots: int,
        layout: SlotLayout,
        run: Callable[..., Tensor],
        keep_states: bool,
    ) -> tuple[Readings, tuple[Tensor, ...]]:
        """The recurrence. Returns what is read from it, and the states before the first loop and after each one (only
        the last, unless `keep_states`).
        """
        if self.prelude_norm is not None:
            prelude = self.prelude_norm(prelude)
        inject = self.injection(prelude)
        state = self.state_init(prelude, positions) if initial_state is None else initial_state.to(prelude)
        step = self._step
        if self.gradient_checkpointing and self.training and self.config.checkpoint_granularity == "loop":
            step = partial(self._gradient_checkpointing_func, step)
        loops = layout.loops_within(num_slots)
        # Truncated backpropagation: the leading loops only find a state to start from.
        detached = loops - (self.config.backprop_loops or loops) if self.training else 0

        states, readings = (state,), self.halting.start(state)
        for loop_idx in range(loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and loop_idx >= detached):
                state = step(state, inject, loop_idx, layout, run)
                before = (readings.to(state.device), states[-1].to(state.device))
                readings = self.halting(*before, state, loop_idx, loop_idx == loops - 1)
            states = (*states, state) if keep_states else (state,)
        return readings, states

    def _step(
        self, state: Tensor, inject: Callable[[Tensor], Tensor], loop_idx: int, layout: SlotLayout, run: Callable
    ) -> Tensor:
        """One loop: [B, S, D] -> [B, S, D]."""
        _, core, _ = layout.stored_ranges()
        output = run(self.loop_conditioning(inject(state), loop_idx), core, loop_idx)
        # The core may end on another device than it started on.
        state = self.loop_update(state.to(output.device), output, loop_idx, layout.loops)
        return self.norm(state) if self.config.final_norm == "every_loop" else state

    def _run_layers(
        self,
        hidden_states: Tensor,
        layers: range,
        loop_idx: int = 0,
        *,
        layout: SlotLayout,
        num_slots: int,
        masks: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """Stored layers `layers`, in loop `loop_idx`, as far as the first `num_slots` slots go."""
        for index in layers:
            slot = layout.slot(index, loop_idx)
            if slot >= num_slots:
                break
            mask = masks[self.stored_types[index]]
            hidden_states = self.layers[index](hidden_states, slot, loop_idx, attention_mask=mask, **kwargs)
        return hidden_states

    def _layout(self, num_loops: int | None) -> SlotLayout:
        """Slots of a call with `num_loops` loops, after checking it."""
        num_loops = self.config.num_loops if num_loops is None else checked_num_loops(num_loops)
        trained = self.config.max_trained_loops
        if trained is not None and num_loops > trained and not torch.compiler.is_compiling():
            logger.warning_once(
                f"num_loops={num_loops} is more than max_trained_loops={trained}, the most that this model was "
                "trained with; it may get worse instead of better."
            )
        return self.config.slot_layout(num_loops)


class LoopedHeadMixin:
    """What the language-model heads share: hidden states to logits."""

    config: LoopedConfig
    lm_head: nn.Linear

    def to_logits(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, vocabulary], scaled and soft-capped as the config says."""
        logits = self.lm_head(hidden_states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


@auto_docstring
class LoopedForCausalLM(LoopedHeadMixin, LoopedGenerationMixin, LoopedPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "is_causal=False: LoopedForCausalLM predicts the next token and needs is_causal=True; for a "
                "bidirectional model use LoopedForMaskedLM or a classification head."
            )
        self.model = LoopedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_loops: int | None = None,
        initial_state: torch.FloatTensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedCausalLMOutput:
        r"""
        num_loops (`int`, *optional*):
            How often the core runs in this call; `None`: `config.num_loops`. A cache belongs to one loop count.
        initial_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            State before the first loop, in place of what `config.state_init` makes.
        output_loop_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to return `loop_hidden_states`, the state before the first loop and after each one.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import modeling_looped  # registers the Auto classes

        >>> model = AutoModelForCausalLM.from_pretrained("path/to/looped")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/looped")
        >>> inputs = tokenizer("The capital of France is", return_tensors="pt")
        >>> tokens = model.generate(**inputs, max_new_tokens=8, num_loops=2)
        ```
        """
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            initial_state=initial_state,
            output_loop_hidden_states=output_loop_hidden_states,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.to_logits(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoopedCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_hidden_states=outputs.loop_hidden_states,
            exit_loops=outputs.exit_loops,
        )

    def unroll(self, num_loops: int | None = None, *, family: str | None = None) -> PreTrainedModel:
        """A stock stacked model (Llama, Mistral, Qwen 2 or 3, OLMo 2) with one layer per slot and the same logits.

        For engines that do not know loops, and as a reference. It has copies of the weights, T of each core layer.

        Args:
            num_loops: loops to unroll; `None`: `config.num_loops`.
            family: model type of the result; `None`: the first that fits.

        Raises:
            ValueError: if a loop does more than run its layers, or its layers are no stock family's; lists every
                option that stands in the way.
        """
        return unroll(self, num_loops, family=family)


@auto_docstring
class LoopedForMaskedLM(LoopedHeadMixin, LoopedPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "is_causal=True: LoopedForMaskedLM sees both sides of a token; make the config with is_causal=False."
            )
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_loops: int | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Tokens to predict, in the place where they stand (not shifted); -100 is ignored.
        num_loops (`int`, *optional*):
            How often the core runs in this call; `None`: `config.num_loops`.
        """
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            num_loops=num_loops,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.to_logits(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# Transformers' generic heads ask `AutoModel` for their base model, which cannot know our class where a folder's code
# is loaded with `trust_remote_code` and the package is not installed; hence constructors of our own. Their losses
# ignore `num_items_in_batch`, which their forward only seems to take (`**kwargs`): `accepts_loss_kwargs=False` tells
# the Trainer, which would otherwise add the losses of accumulated steps up instead of averaging them.


@auto_docstring
class LoopedForSequenceClassification(GenericForSequenceClassification, LoopedPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: LoopedConfig):
        LoopedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = LoopedModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


@auto_docstring
class LoopedForTokenClassification(GenericForTokenClassification, LoopedPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: LoopedConfig):
        LoopedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.model = LoopedModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


@auto_docstring
class LoopedForQuestionAnswering(GenericForQuestionAnswering, LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        LoopedPreTrainedModel.__init__(self, config)
        self.model = LoopedModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "LoopedForCausalLM",
    "LoopedForMaskedLM",
    "LoopedForQuestionAnswering",
    "LoopedForSequenceClassification",
    "LoopedForTokenClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
]
