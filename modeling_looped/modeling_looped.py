"""Looped language models: prelude, a core that runs `num_loops` times, coda.

B batch, S tokens, D hidden size, T loops, P, R, C layers of prelude, core and coda; N = P + R*T + C slots.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .accounting import LoopedAccountingMixin
from .attention import LoopedAttention
from .conditioning import LOOP_CONDITIONINGS
from .configuration_looped import LoopedConfig, refuse_foreign_loop_names
from .cross_attention import CrossAttention, encoder_states, split_cache
from .depth import Depth, depth_of
from .depth_attention import DEPTH_ATTENTIONS
from .depth_sampling import DEPTH_SAMPLINGS, draws_depth
from .embeddings import LoopedEmbeddingMixin
from .generation import LoopedGenerationMixin
from .halting import HALTINGS
from .heads import FirstTokenPooler, LoopedHeadMixin, MaskedLMTransform, last_token_logits
from .injection import INJECTIONS
from .inputs import (
    attention_masks,
    default_position_ids,
    refuse_cache_in_recompute,
    refuse_foreign_cache,
    refuse_loss_of_loops,
    refuse_mixed_depths,
    refuse_what_cannot_route,
    rows_are_packed,
    valid_tokens,
    warn_of_unread_loss,
)
from .layers import LoopedDecoderLayer
from .loop_adapter import LOOP_ADAPTERS
from .loop_loss import LOOP_LOSSES
from .loop_update import LOOP_UPDATES
from .ngram_embedding import NGRAM_EMBEDDINGS, note_tokens, tokens_before
from .norms import build_norm
from .outputs import (
    NO_FIELD,
    LoopedCausalLMOutput,
    LoopedMaskedLMOutput,
    LoopedModelOutput,
    LoopedQuestionAnsweringOutput,
    LoopedSequenceClassifierOutput,
    LoopedTokenClassifierOutput,
    hidden_states_of_the_call,
)
from .peft_defaults import offer_peft_defaults
from .readout import READOUTS
from .recurrence import LoopedRecurrenceMixin
from .registry import BuildContext, SelfInitialised
from .residual_streams import RESIDUAL_STREAMS
from .rotary import LoopedRotaryEmbedding
from .schedule import SCHEDULES
from .slots import SlotLayout
from .state import STATE_INITS
from .unrolling import unroll
from .value_embedding import VALUE_EMBEDDINGS
from .weight_init import init_weights

logger = logging.get_logger(__name__)


@auto_docstring
class LoopedPreTrainedModel(LoopedAccountingMixin, PreTrainedModel):
    config: LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # A count of training steps: a checkpoint without one starts at 0, a model that does not sample needs none.
    _keys_to_ignore_on_load_missing = [r"depth_sampling\.step"]
    _keys_to_ignore_on_load_unexpected = [r"depth_sampling\.step"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(LoopedDecoderLayer, num_hidden_layers_key=NO_FIELD),
        "attentions": LoopedAttention,
        "cross_attentions": OutputRecorder(CrossAttention, index=1),
    }

    def __setattr__(self, name: str, value: Any) -> None:
        """A config that is put in the place of another one (`EncoderDecoderModel` does it) is put everywhere it was:
        the base model reads its loop count, and the attentions their implementation, from the one that they hold.
        """
        previous = self.__dict__.get("config") if name == "config" else None
        super().__setattr__(name, value)
        if previous is not None and previous is not value:
            for module in self.modules():
                if module.__dict__.get("config") is previous:
                    module.__dict__["config"] = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module.

        | what | how | why |
        |---|---|---|
        | linear and embedding weights | N(0, initializer_range), or as weight_init.py says | Transformers' default |
        | biases | 0 | |
        | norms | 1 | |
        | strategies, loop adapters | their own `init_weights`, documented there | |
        | rotary tables | recomputed | they are not in the checkpoint |
        """
        super()._init_weights(module)
        if isinstance(module, SelfInitialised):
            module.init_weights()
        else:
            init_weights(module, self.config)

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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, the tables of a value embedding included, which hold a row per token too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        tables = self.base_model.get_submodule("value_embeddings")
        for name, table in tables.named_children():
            if isinstance(table, nn.Embedding) and table.num_embeddings != embeddings.num_embeddings:
                resized = self._get_resized_embeddings(table, embeddings.num_embeddings, mean_resizing=False)
                setattr(tables, name, resized)
        return embeddings

    def compile_blocks(self, **kwargs: Any) -> None:
        """Compile the two halves of every layer (up to attention, and after it), the documented way to use
        `torch.compile` with a loop count that varies: the graphs do not depend on it.

        The dispatch of attention stays outside of the graphs, since the module that does it differs in every loop.

        Args:
            kwargs: passed to `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, LoopedDecoderLayer):
                if module.shares_key_values:  # later loops project queries alone
                    module.self_attn.project_query = torch.compile(module.self_attn.project_query, **kwargs)
                module.self_attn.project = torch.compile(module.self_attn.project, **kwargs)
                module.feed_forward = torch.compile(module.feed_forward, **kwargs)


@auto_docstring
class LoopedModel(LoopedEmbeddingMixin, LoopedRecurrenceMixin, LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        config.check_before_building()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.build_embeddings(config)

        context = BuildContext(
            hidden_size=config.state_size,
            num_core_layers=config.num_core_layers,
            initializer_range=config.initializer_range,
            rms_norm_eps=config.rms_norm_eps,
            outer_size=config.hidden_size,
            vocab_size=config.vocab_size,
            layer_shapes=tuple(map(config.layer_shape, range(config.num_stored_layers))),
            core_groups=config.num_core_layers // (config.core_group_size or config.num_core_layers or 1),
        )
        conditioning = LOOP_CONDITIONINGS.build(config.loop_conditioning, context)
        adapter = LOOP_ADAPTERS.build(config.loop_adapter, context)
        self.value_embeddings = VALUE_EMBEDDINGS.build(config.value_embedding, context)
        self.ngram_embedding = NGRAM_EMBEDDINGS.build(config.ngram_embedding, context)
        self.residual_streams = RESIDUAL_STREAMS.build(config.residual_streams, context)
        self.depth_attention = DEPTH_ATTENTIONS.build(config.depth_attention, context)
        # One list of the stored layers, so that the names, plans and regular expressions that the ecosystem writes for
        # `model.layers.<i>` mean the physical layers here too.
        self.layers = nn.ModuleList(
            LoopedDecoderLayer(
                config,
                layer,
                conditioning.norm_rows if config.is_core_layer(layer) else None,
                adapter if config.is_core_layer(layer) else None,
                self.value_embeddings.gate(layer),
                self.residual_streams.connections(layer, in_core=config.is_core_layer(layer)),
                self.depth_attention.is_anchor(layer),
            )
            for layer in range(config.num_stored_layers)
        )

        def norm() -> nn.Module:
            return build_norm(config.norm_type, config.hidden_size, config.rms_norm_eps)

        if config.num_core_layers > 0:
            self.prelude_norm = norm() if config.prelude_norm else None
            self.injection = INJECTIONS.build(config.injection, context)
            self.state_init = STATE_INITS.build(config.state_init, context)
            self.loop_update = LOOP_UPDATES.build(config.loop_update, context)
            self.loop_conditioning = conditioning
            self.halting = HALTINGS.build(config.halting, context)
            self.schedule = SCHEDULES.build(config.schedule, context)
            self.readout = READOUTS.build(config.readout, context)
            self.depth_sampling = DEPTH_SAMPLINGS.build(config.depth_sampling, context)
            self.loop_loss = LOOP_LOSSES.build(config.loop_loss, context)
        self.norm = nn.Identity() if config.final_norm == "none" else norm()
        self.rotary_emb = LoopedRotaryEmbedding(config)
        self.stored_types = [config.stored_layer_type(layer) for layer in range(config.num_stored_layers)]
        self.built_by = config.structure()
        self.checked_at = config.followed()
        self.gradient_checkpointing = False
        self.post_init()
        offer_peft_defaults(config.model_type)

    @draws_depth
    @hidden_states_of_the_call
    @merge_with_config_defaults
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
        token_type_ids: torch.LongTensor | None = None,
        num_loops: int | torch.Tensor | None = None,
        initial_state: torch.FloatTensor | None = None,
        output_loop_hidden_states: bool = False,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        previous_input_ids: torch.LongTensor | None = None,
        output_loop_readings: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedModelOutput:
        r"""
        num_loops (`int`, or `torch.LongTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`, optional):
            How often the core runs in this call; `None`: `config.num_loops`, or in training what
            `config.depth_sampling` draws. A cache belongs to one loop count; a tensor is a depth for each sequence or
            token, without a cache.
        initial_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, state_size)`, *optional*):
            State before the first loop, in place of what `config.state_init` makes.
        output_loop_hidden_states (`bool`, *optional*, defaults to `False`):
            Whether to return `loop_hidden_states`, the state before the first loop and after each one.
        previous_input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`, *optional*):
            With `config.ngram_embedding`, the ids of the last tokens before `input_ids`. `generate` passes them; else
            they are needed only with a cache that was reordered, cropped or copied since its last call.
        output_loop_readings (`bool`, *optional*, defaults to `False`):
            Whether to return `loop_readings`, which `config.loop_loss` is computed from.
        """
        refuse_foreign_loop_names(kwargs, "forward")
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        token_values = self.value_embeddings(input_ids)
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        depth = Depth(self.config.num_loops) if num_loops is None else depth_of(num_loops, *embeds.shape[:2])
        layout = self._layout(depth.loops)

        if not self.config.is_causal:
            use_cache, past_key_values = False, None
        valid, packed = None, False
        if self.config.add_cross_attention or (layout.core and self.halting.reads_whole_sequence):
            packed = rows_are_packed(position_ids, attention_mask, past_key_values, kwargs.get("cu_seq_lens_q"))
        if layout.core and self.halting.routes:
            if self.halting.reads_whole_sequence and past_key_values is None:
                use_cache = False
            refuse_what_cannot_route(self.config, self.halting, past_key_values, attention_mask, packed, kwargs)
            valid = valid_tokens(embeds, attention_mask, past_key_values)
        if depth.each is not None:
            refuse_mixed_depths(self.config, past_key_values)
            use_cache = False
        if output_loop_readings:
            refuse_loss_of_loops(self.config, past_key_values, kwargs)
            use_cache = False
        elif self.training and layout.core and self.config.loop_loss["type"] != "output":
            warn_of_unread_loss(self.config)
        given_cache = past_key_values
        if use_cache and past_key_values is None:
            sized = self.config if layout.loops == self.config.num_loops else self.config.with_num_loops(layout.loops)
            past_key_values = DynamicCache(config=sized)
        num_slots = self.config.slots_to_run(layout.loops)
        past_key_values, both_caches = split_cache(self.config, past_key_values, encoder_hidden_states)
        if past_key_values is not None:
            refuse_foreign_cache(past_key_values, num_slots, layout)
            if self.gradient_checkpointing and self.training:
                refuse_cache_in_recompute()

        positions: Tensor | None = position_ids
        if positions is None:
            positions = default_position_ids(embeds, attention_mask, given_cache, kwargs.get("cu_seq_lens_q"))
        # Only the caller's cache: the mask functions look for packed sequences where there is none, and one made above
        # is still empty.
        masks = attention_masks(
            self.config, self.stored_types, embeds, attention_mask, positions, given_cache, token_type_ids
        )
        seen = None if given_cache is None else past_key_values
        before = tokens_before(self.ngram_embedding, previous_input_ids, seen)
        embeds = self.embed(self.ngram_embedding(embeds, input_ids, before, positions), positions, token_type_ids)
        encoder = encoder_states(
            self.config, encoder_hidden_states, encoder_attention_mask, both_caches, embeds, packed
        )
        rotary = None
        if self.config.position_embedding == "rope":
            cos, sin = self.rotary_emb(embeds, positions)
            rotary = (cos.unsqueeze(1), sin.unsqueeze(1))  # one for all heads
        run = partial(
            self._run_layers,
            layout=layout,
            num_slots=num_slots,
            masks=masks,
            token_values=token_values,
            position_embeddings=rotary,
            position_ids=positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder=encoder,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )

        prelude, core, _ = layout.stored_ranges()
        (hidden_states, _, anchors), loops, readings = run(embeds, prelude), None, None
        if core:
            loops = self._run_loops(
                hidden_states,
                anchors,
                initial_state,
                positions,
                valid,
                num_slots,
                layout,
                depth,
                run,
                keep_states=output_loop_hidden_states or output_loop_readings,
            )
            readings, hidden_states, anchors = loops.readings, loops.readings.output, loops.anchors[-1]
        hidden_states = self._after_loops(hidden_states, anchors, layout, run)
        note_tokens(self.ngram_embedding, input_ids, before, past_key_values)
        return LoopedModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if both_caches is None else both_caches,
            loop_hidden_states=loops.states if loops is not None and output_loop_hidden_states else None,
            loop_readings=self._read_loops(loops, hidden_states, depth, layout, run)
            if loops is not None and output_loop_readings
            else None,
            exit_loops=None if readings is None else readings.exit_loops,
            exit_probabilities=torch.stack(readings.probabilities, dim=-1)
            if readings is not None and readings.probabilities
            else None,
            num_loops=None if num_loops is None or isinstance(num_loops, int) else depth.counts(embeds),
        )

    def _layout(self, num_loops: int) -> SlotLayout:
        """Slots of a call with `num_loops` loops, after checking it.

        Raises:
            ValueError: if the config was changed in a way that a built model cannot follow, or to values that do not
                go together.
        """
        fields = self.config.__dict__  # Transformers' own lookup takes longer than all comparisons
        for field, built in self.built_by.items():
            if fields[field] != built:
                raise ValueError(
                    f"config.{field}={fields[field]!r} was written after the model was built with "
                    f"{built!r}, which it cannot follow: load it anew, with from_pretrained(..., {field}=...)."
                )
        if self.config.followed() != self.checked_at:
            self.config.check_after_writing()
        trained = self.config.max_trained_loops
        silent = self.training or torch.compiler.is_compiling()  # training at more loops is what trains them
        if trained is not None and num_loops > trained and not silent:
            logger.warning_once(
                f"num_loops={num_loops} is more than max_trained_loops={trained}, the most that this model was "
                "trained with; it may get worse instead of better."
            )
        return self.config.slot_layout(num_loops)


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
        token_type_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_loops: int | torch.Tensor | None = None,
        initial_state: torch.FloatTensor | None = None,
        output_loop_hidden_states: bool = False,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedCausalLMOutput:
        r"""
        num_loops (`int`, or `torch.LongTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`, optional):
            How often the core runs in this call; `None`: `config.num_loops`, or in training what
            `config.depth_sampling` draws. A cache belongs to one loop count; a tensor is a depth for each sequence or
            token, without a cache.
        initial_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, state_size)`, *optional*):
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
            token_type_ids=token_type_ids,
            num_loops=num_loops,
            initial_state=initial_state,
            output_loop_hidden_states=output_loop_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **self.asks_for_loops(labels),
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.to_logits(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None and outputs.loop_readings is not None:
            loss = self.loss_of_loops(outputs, labels, self.to_logits, shifts=True, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoopedCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **outputs.loop_fields(),
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


#: What every head but the causal one hands to its base model beside Transformers' arguments.
ARGS_OF_HEADS = r"""
    num_loops (`int`, or `torch.LongTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`, optional):
        How often the core runs in this call, as in [`LoopedModel`]; `None`: `config.num_loops`.
    output_loop_hidden_states (`bool`, *optional*, defaults to `False`):
        Whether to return `loop_hidden_states`, the state before the first loop and after each one.
"""


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
        transforms = config.mlm_head == "transform"
        self.head_transform = MaskedLMTransform(config) if transforms else None
        width = (config.embedding_size or config.hidden_size) if transforms else config.hidden_size
        self.lm_head = nn.Linear(width, config.vocab_size, bias=transforms)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=ARGS_OF_HEADS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_loops: int | torch.Tensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedMaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Tokens to predict, in the place where they stand (not shifted); -100 is ignored.
        """
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_loops=num_loops,
            output_loop_hidden_states=output_loop_hidden_states,
            **self.asks_for_loops(labels),
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.transformed_logits(hidden_states)
        loss = None
        if labels is not None and outputs.loop_readings is not None:
            loss = self.loss_of_loops(outputs, labels, self.transformed_logits, shifts=False, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoopedMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **outputs.loop_fields(),
        )

    def transformed_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, vocabulary], through the transform where the config has one."""
        if self.head_transform is not None:
            hidden_states = self.head_transform(hidden_states)
        return self.to_logits(hidden_states)


# Heads of our own: Transformers' generic ones return nothing of the base model's output that they do not know, and ask
# `AutoModel` for it, which cannot know our class where a folder's code is loaded with `trust_remote_code` and the
# package is not installed. The losses of the first two ignore `num_items_in_batch`, which their forward only seems to
# take (`**kwargs`): `accepts_loss_kwargs=False` tells the Trainer, which would otherwise add the losses of accumulated
# steps up instead of averaging them.


@auto_docstring
class LoopedForSequenceClassification(LoopedPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 2
        self.model = LoopedModel(config)
        pools = config.sequence_pooling == "first_token"
        self.pooler = FirstTokenPooler(config) if pools else None
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=pools)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=ARGS_OF_HEADS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_loops: int | torch.Tensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedSequenceClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes or, for one label, numbers to regress to.
        """
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            num_loops=num_loops,
            output_loop_hidden_states=output_loop_hidden_states,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        hidden_states: Any = outputs.last_hidden_state
        if self.pooler is None:
            logits = last_token_logits(self.score(hidden_states), input_ids, self.config.pad_token_id)
        else:
            logits = self.score(self.pooler(hidden_states, valid_tokens(hidden_states, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return LoopedSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **outputs.loop_fields(),
        )


@auto_docstring
class LoopedForTokenClassification(LoopedPreTrainedModel):
    accepts_loss_kwargs = False

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 2
        self.model = LoopedModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=ARGS_OF_HEADS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_loops: int | torch.Tensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedTokenClassifierOutput:
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            num_loops=num_loops,
            output_loop_hidden_states=output_loop_hidden_states,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        return LoopedTokenClassifierOutput(
            loss=None if labels is None else self.loss_function(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **outputs.loop_fields(),
        )


@auto_docstring
class LoopedForQuestionAnswering(LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.model = LoopedModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=ARGS_OF_HEADS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_loops: int | torch.Tensor | None = None,
        output_loop_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues] (it lists position_ids too)
    ) -> LoopedQuestionAnsweringOutput:
        outputs: LoopedModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            num_loops=num_loops,
            output_loop_hidden_states=output_loop_hidden_states,
            **kwargs,  # pyright: ignore[reportCallIssue] (the same list)
        )
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return LoopedQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **outputs.loop_fields(),
        )


__all__ = [
    "LoopedForCausalLM",
    "LoopedForMaskedLM",
    "LoopedForQuestionAnswering",
    "LoopedForSequenceClassification",
    "LoopedForTokenClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
]
