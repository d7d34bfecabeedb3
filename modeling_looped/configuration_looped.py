"""Configuration of a looped language model."""

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging

from .conditioning import LOOP_CONDITIONINGS
from .config_checks import (
    CHECKS,
    check_backprop,
    check_choices,
    check_counts,
    check_loop_loss,
    check_stored_layer_types,
    counts_are_valid,
    counts_message,
)
from .depth_attention import DEPTH_ATTENTIONS
from .depth_sampling import DEPTH_SAMPLINGS
from .halting import HALTINGS
from .injection import INJECTIONS
from .loop_adapter import LOOP_ADAPTERS
from .loop_loss import LOOP_LOSSES
from .loop_update import LOOP_UPDATES
from .ngram_embedding import NGRAM_EMBEDDINGS
from .readout import READOUTS
from .registry import LayerShape, Registry
from .remote_code import AUTO_MAP, copy_code
from .residual_streams import RESIDUAL_STREAMS
from .schedule import SCHEDULES
from .slots import SlotLayout
from .state import STATE_INITS
from .value_embedding import VALUE_EMBEDDINGS

logger = logging.get_logger(__name__)

#: Config field -> the registry of its types.
STRATEGY_FIELDS: dict[str, Registry] = {
    registry.field: registry
    for registry in (
        INJECTIONS,
        STATE_INITS,
        LOOP_UPDATES,
        LOOP_CONDITIONINGS,
        LOOP_ADAPTERS,
        HALTINGS,
        READOUTS,
        VALUE_EMBEDDINGS,
        NGRAM_EMBEDDINGS,
        RESIDUAL_STREAMS,
        DEPTH_ATTENTIONS,
        SCHEDULES,
        DEPTH_SAMPLINGS,
        LOOP_LOSSES,
    )
}

#: Fields from which the number of slots and their attention types follow.
DEPTH_FIELDS = frozenset(
    (
        "num_loops",
        "num_prelude_layers",
        "num_core_layers",
        "num_coda_layers",
        "core_group_size",
        "kv_sharing",
        "schedule",
        "stored_layer_types",
        "sliding_window",
    )
)

#: Fields that may be written after a model was built: it reads them anew in every call, or they say nothing about what
#: it computes. Transformers writes some of them itself (`vocab_size` when embeddings are resized, `is_causal` around a
#: forward). A model is built by all others and cannot follow them: see `STRUCTURE_FIELDS`.
LIVE_FIELDS = frozenset(
    (
        "num_loops",
        "num_hidden_layers",
        "layer_types",
        "max_trained_loops",
        "backprop_loops",
        "checkpoint_granularity",
        "is_causal",
        "is_decoder",
        "prefix_lm",
        "embedding_scale",
        "logit_scale",
        "final_logit_softcapping",
        "use_cache",
        "vocab_size",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "initializer_range",
        "weight_init",
        "output_projection_init",
    )
)

#: Those of them that a built model follows, and that stand in conditions with those that it was built by.
FOLLOWED_FIELDS = ("num_loops", "backprop_loops")

#: What the published looped models call the loop count. Accepting one of these silently would run another function
#: than the user asked for, so forward and config refuse them by name.
FOREIGN_LOOP_NAMES = frozenset(
    (
        "H_cycles",
        "L_cycles",
        "loop_count",
        "loop_num",
        "loops",
        "mean_recurrence",
        "n_loop",
        "n_loops",
        "num_iterations",
        "num_loop",
        "num_recur",
        "num_recurrences",
        "num_recursion",
        "num_recursions",
        "num_steps",
        "total_ut_steps",
    )
)

#: Keys that Transformers itself keeps in a config beside the declared fields.
_HOST_KEYS = frozenset(
    (
        "_attn_implementation_autoset",
        "_commit_hash",
        "_experts_implementation_internal",
        "_attn_implementation_internal",
        "_name_or_path",
        "_output_attentions",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "task_specific_params",
        "tie_last_hidden_states",
        "torch_dtype",
        "transformers_weights",
    )
)

#: A strategy: what the registry of its field accepts (a name, or a mapping with `type`), completed to a mapping.
Spec = Any
#: A field that may be left out because `__post_init__` fills it in; `None` only before that.
Derived = Any


# trf-ignore: TRF057 (described in full by hand)
@strict
class LoopedConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LoopedModel`]: embeddings, `num_prelude_layers` layers run once, a core of `num_core_layers`
    layers run `num_loops` times, `num_coda_layers` layers run once, a norm and a head.

    Every (loop, layer) pair is a *slot* with a key-value cache layer of its own. `num_hidden_layers` is the number of
    slots, prelude + core * loops + coda, because that is what every cache and serving engine sizes itself by; it and
    `layer_types` (one entry per slot) are derived, and follow whenever a field they depend on is written. A stacked
    transformer is the case `num_core_layers=0`.

    Strategy fields hold a type name with its parameters, `{"type": "diagonal", "initial_decay": 0.447}`, or just the
    name; they are completed with the type's defaults. See the module named in brackets for the types.

    Args:
        vocab_size (`int`, defaults to 32000): number of tokens.
        hidden_size (`int`, defaults to 768): width of the residual stream.
        intermediate_size (`int`, defaults to 2048): width of the MLP.
        num_prelude_layers, num_core_layers, num_coda_layers (`int`, default to 2): stored layers of each part.
        num_loops (`int`, defaults to 4): how often the core runs. The one knob for depth: it can be set here, at
            loading, on the config of a loaded model, in a `GenerationConfig`, in `generate` and in `forward`.
        core_group_size (`int`, *optional*): how many consecutive layers of the core loop together, a divisor of
            `num_core_layers`; each group runs all its loops before the next starts. `None`: the whole core, abc abc;
            1: aa bb cc.
        kv_sharing (`str`, defaults to `"none"`): `first_loop` makes every later loop of a core layer attend to the
            keys and values of its first, so that the cache holds one slot per stored layer.
        max_trained_loops (`int`, *optional*): the largest loop count seen in training; a larger one warns once.
            `None`: unknown, never warns. Training with `depth_sampling` raises it to what it draws.
        num_attention_heads (`int`, defaults to 12), num_key_value_heads (`int`, *optional*: as many), head_dim (`int`,
            *optional*: hidden_size / num_attention_heads): attention shape (grouped-query attention).
        core_hidden_size, core_intermediate_size, core_num_attention_heads, core_num_key_value_heads (`int`,
            *optional*): sizes of the core, where they are not those of prelude and coda. A core of another width needs
            an injection and a readout that map between the two.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP, of those that Transformers names, or
            `half_relu2`, 0.5 * relu(x)^2.
        mlp_type (`str`, defaults to `"gated"`): `gated`, down(act(gate x) * up x), or `plain`, down(act(up x)).
        mlp_output_act (`str`, *optional*): activation of the MLP's output.
        attention_bias, attention_output_bias, mlp_bias (`bool`, default to `False`): biases of q, k and v; of the
            output projection; of the MLP.
        attention_value_bias (`bool`, *optional*: as `attention_bias`): bias of v alone (Huginn has one on q and k).
        attention_gate (`str`, defaults to `"none"`): `per_channel` multiplies the attention's output by
            sigmoid(gate x), before the output projection.
        qkv_clip (`float`, *optional*): largest absolute value of queries, keys and values, their biases included.
        attention_dropout (`float`, defaults to 0): dropout on attention weights, in training.
        qk_norm (`str`, defaults to `"none"`): RMS norm of queries and keys before RoPE: `per_head` (Qwen3),
            `per_head_unweighted` (Parcae; without a weight it is the same behind RoPE, which turns a head and keeps
            its length) or `flat`, over all heads' channels (OLMo-2).
        norm_type (`str`, defaults to `"rms"`): the norms of the layers, of the prelude and at the end: `rms`,
            `rms_unweighted`, `layer` (with a bias), or `layer_unbiased` (the Universal Transformer's, which divides by
            the unbiased standard deviation).
        norm_placement (`str`, defaults to `"pre"`): with n a norm and f attention or MLP, `pre`: x + f(n x);
            `sandwich`: x + n(f(n x)) (Ouro); `sandwich_sum`: n(x + f(n x)) (Huginn); `post`: n(x + f x);
            `post_branch`: x + n(f x) (OLMo-2).
        final_norm (`str`, defaults to `"end"`): where the final norm acts: `end`, before the head; `every_loop`, on
            the state after each loop, whose result starts the next one, and at the end where a coda follows (Ouro,
            Nanbeige); `after_loops`, on the last state and again at the end (Huginn); `none`, nowhere (ALBERT).
        prelude_norm (`bool`, defaults to `True`): normalise the prelude's output before it is injected.
        rms_norm_eps (`float`, defaults to 1e-5): epsilon of all norms but `per_head_unweighted` ones.
        stored_layer_types (`list[str]`, *optional*): `full_attention` or `sliding_attention` per stored layer
            (prelude, core, coda). `None`: all sliding if `sliding_window` is set, else all full.
        sliding_window (`int`, *optional*): window of the sliding layers in tokens, the token itself included, at least
            2; without `is_causal`, so many tokens on either side.
        is_causal (`bool`, defaults to `True`): `False` gives the bidirectional encoder.
        add_cross_attention (`bool`, defaults to `False`): give every layer an attention to an encoder's output
            (`encoder_hidden_states`) between self-attention and MLP, with norms of its own in the same placement; for
            the decoder of Transformers' `EncoderDecoderModel`, which sets it. Needs `is_causal` and `is_decoder`
            [cross_attention.py].
        is_decoder (`bool`, defaults to `False`): Transformers' mark of a decoder, without an effect of its own.
        cross_attention_hidden_size (`int`, *optional*): width of the encoder's output. `None`: `hidden_size`; an
            `EncoderDecoderModel` then projects an output of another width.
        max_position_embeddings (`int`, defaults to 2048), rope_parameters (`dict`, *optional*): rotary embeddings, of
            every type that Transformers knows.
        position_embedding (`str`, defaults to `"rope"`): `rope`, `learned` (a table of `max_position_embeddings` rows
            that is added to the embeddings) or `none`.
        embedding_size (`int`, *optional*): width of the embedding tables, with a projection to `hidden_size` behind
            them (ALBERT). `None`: `hidden_size`, without a projection.
        embedding_projection_bias (`bool`, defaults to `True`): bias of that projection.
        embedding_norm (`bool`, defaults to `False`): normalise the sum of the embeddings.
        type_vocab_size (`int`, defaults to 0): rows of the table for `token_type_ids`; 0: there is none.
        mlm_head (`str`, defaults to `"linear"`): head of [`LoopedForMaskedLM`]: `linear`, or `transform`, which has a
            dense layer, an activation, a norm and an output bias (ALBERT, BERT).
        embedding_scale, logit_scale (`float`, default to 1): factors on the embeddings and on the logits.
        final_logit_softcapping (`float`, *optional*): c in c * tanh(logits / c), after the scale.
        injection (`dict` or `str`, defaults to `"diagonal"`): how the prelude enters each loop: `none`, `add`,
            `concat` or `diagonal` [injection.py].
        state_init (`dict` or `str`, defaults to `"zeros"`): the state before the first loop: `input` (the prelude),
            `zeros`, `normal` or `unit_normal` [state.py].
        loop_update (`dict` or `str`, defaults to `"replace"`): how a loop's result becomes the state: `replace`,
            `recursion_encoding`, `damped`, `learned_scale` or `gated` [loop_update.py].
        loop_conditioning (`dict` or `str`, defaults to `"none"`): how layers know the loop: `none`, `embedding`,
            `sinusoidal` or `norms` [conditioning.py].
        loop_adapter (`dict` or `str`, defaults to `"none"`): low-rank weights per loop: `none` or `lora`
            [loop_adapter.py].
        halting (`dict` or `str`, defaults to `"none"`): which loop's state each token is read from: `none`,
            `state_change`, `gate` or `act` [halting.py]; or which tokens take part in a loop: `expert_choice` or
            `token_choice` [routing.py].
        readout (`dict` or `str`, defaults to `"none"`): map from the last state to the coda: `none` or `linear`
            [readout.py].
        value_embedding (`dict` or `str`, defaults to `"none"`): token embeddings that are added to attention values:
            `none` or `gated` [value_embedding.py].
        ngram_embedding (`dict` or `str`, defaults to `"none"`): embeddings of the last few tokens that are added to
            those of the token: `none` or `hashed` [ngram_embedding.py].
        residual_streams (`dict` or `str`, defaults to `"none"`): how many residual streams run along the layers, and
            how attention and MLP read and write them: `none` (one, to which they add), `hyper_connections` or `mhc`;
            or between the loops only, read and written by each loop as a whole: `hyperloop` [residual_streams.py].
        depth_attention (`dict` or `str`, defaults to `"none"`): values of earlier layers that a layer's values are
            mixed with: `none` or `anchors` [depth_attention.py].
        schedule (`dict` or `str`, defaults to `"flat"`): order of the core's layers and the states they work on:
            `flat` or `nested` [schedule.py].
        depth_sampling (`dict` or `str`, defaults to `"fixed"`): how many loops a call in training runs that is not
            told: `fixed` (`num_loops`), `poisson`, `lognormal_poisson` or `uniform` [depth_sampling.py]. Evaluation
            never samples.
        loop_loss (`dict` or `str`, defaults to `"output"`): which loops the loss of a language-model head is made of
            in training: `output` (the cross-entropy of what the model returns), `deep_supervision`, `expected_exit`
            or `exit_gate` [loop_loss.py]. Evaluation always gives that of the output.
        prefix_lm (`bool`, defaults to `False`): let the tokens whose `token_type_ids` are 1 see each other in both
            directions, in a call without a cache or on an empty one.
        backprop_loops (`int`, *optional*): in training, only the last so many loops keep a graph (truncated
            backpropagation), of each sequence or token if they have depths of their own. `None`: all.
        checkpoint_granularity (`str`, defaults to `"layer"`): what gradient checkpointing, once enabled, recomputes at
            a time: each `layer`, or each whole `loop` of the core (memory then hardly grows with the loop count).
        initializer_range (`float`, defaults to 0.02): standard deviation of the initialisation.
        weight_init (`str`, defaults to `"normal"`): how linear maps and embeddings start: `normal`,
            `truncated_normal` or `orthogonal` [weight_init.py].
        output_projection_init (`str`, defaults to `"normal"`): how the maps start that write to the residual stream:
            `normal` (as the others), `depth_scaled` (smaller by sqrt(2 N), with N layers in a forward) or `zeros`
            [weight_init.py].
        sequence_pooling (`str`, defaults to `"last_token"`): what [`LoopedForSequenceClassification`] reads: the
            `last_token`, or the `first_token` through a dense layer with tanh (ALBERT, BERT).
        classifier_dropout (`float`, defaults to 0.1): dropout before the token-classification head.

    Example:

    ```python
    >>> from modeling_looped import LoopedConfig
    >>> config = LoopedConfig(num_prelude_layers=1, num_core_layers=2, num_coda_layers=1, num_loops=4)
    >>> config.num_hidden_layers
    10
    >>> config.num_loops = 8
    >>> config.num_hidden_layers
    18
    ```
    """

    model_type = "looped"
    # What our outputs have beside those of Transformers (outputs.py): the Trainer hands `compute_metrics` all others.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "loop_hidden_states",
        "exit_loops",
        "exit_probabilities",
        "num_loops",
        "loop_readings",
    ]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_prelude_layers: int = 2
    num_core_layers: int = 2
    num_coda_layers: int = 2
    num_loops: int = 4
    max_trained_loops: int | None = None
    core_group_size: int | None = None
    kv_sharing: str = "none"
    num_hidden_layers: Derived = None
    num_attention_heads: int = 12
    num_key_value_heads: Derived = None
    head_dim: Derived = None
    core_hidden_size: int | None = None
    core_intermediate_size: int | None = None
    core_num_attention_heads: int | None = None
    core_num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    mlp_type: str = "gated"
    mlp_output_act: str | None = None
    attention_bias: bool = False
    attention_value_bias: Derived = None
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    attention_gate: str = "none"
    qkv_clip: float | int | None = None
    qk_norm: str = "none"
    norm_type: str = "rms"
    norm_placement: str = "pre"
    final_norm: str = "end"
    prelude_norm: bool = True
    rms_norm_eps: float = 1e-5
    stored_layer_types: list[str] | None = None
    layer_types: Derived = None
    sliding_window: int | None = None
    is_causal: bool = True
    prefix_lm: bool = False
    add_cross_attention: bool = False
    is_decoder: bool = False
    cross_attention_hidden_size: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    position_embedding: str = "rope"
    embedding_size: int | None = None
    embedding_projection_bias: bool = True
    embedding_norm: bool = False
    type_vocab_size: int = 0
    mlm_head: str = "linear"
    embedding_scale: float | int = 1.0
    logit_scale: float | int = 1.0
    final_logit_softcapping: float | int | None = None
    injection: Spec = "diagonal"
    state_init: Spec = "zeros"
    loop_update: Spec = "replace"
    loop_conditioning: Spec = "none"
    loop_adapter: Spec = "none"
    halting: Spec = "none"
    readout: Spec = "none"
    value_embedding: Spec = "none"
    ngram_embedding: Spec = "none"
    residual_streams: Spec = "none"
    depth_attention: Spec = "none"
    schedule: Spec = "flat"
    depth_sampling: Spec = "fixed"
    loop_loss: Spec = "output"
    backprop_loops: int | None = None
    checkpoint_granularity: str = "layer"
    initializer_range: float = 0.02
    weight_init: str = "normal"
    output_projection_init: str = "normal"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    sequence_pooling: str = "last_token"
    classifier_dropout: float | int = 0.1

    def __post_init__(self, **kwargs):
        self._check_keys(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_value_bias is None:
            self.attention_value_bias = self.attention_bias
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        given_depth, given_types = self.num_hidden_layers, self.layer_types
        # Lengths that make no sense must reach `validate_*` with their own message, not fail in the arithmetic here.
        if counts_are_valid(self):
            self._complete_specs()
            self._derive()
            self._warn_if_contradicted(given_depth, given_types)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FOREIGN_LOOP_NAMES:
            raise AttributeError(f"{name}={value!r}: LoopedConfig calls the loop count num_loops.")
        complete = self.__dict__.get("_post_init_done", False)
        if name in STRATEGY_FIELDS:
            value = STRATEGY_FIELDS[name].normalise(value, num_loops=self.table_loops if complete else None)
        previous = self.__dict__.get(name)
        super().__setattr__(name, value)
        # Transformers writes `is_causal` around every forward, so a write that changes nothing must cost nothing.
        if complete and value is not previous and name in self.__dataclass_fields__:
            try:
                self._follow(name)
            except ValueError:
                super().__setattr__(name, previous)
                raise

    def _follow(self, name: str) -> None:
        """After a write to field `name` of a finished config: check it, and what depends on it, and derive from it.

        Conditions between several fields wait for `validate`, since they cannot all be written at once.
        """
        check_counts(self)
        check_choices(self)
        if name in ("stored_layer_types", "sliding_window"):
            check_stored_layer_types(self)
        if name in DEPTH_FIELDS:
            self._derive()

    def _complete_specs(self) -> None:
        """Check every strategy by itself, and complete it with the type's defaults."""
        # the schedule first: the others' tables have as many rows as it has loops
        super().__setattr__("schedule", SCHEDULES.normalise(self.schedule))
        for field, registry in STRATEGY_FIELDS.items():
            super().__setattr__(field, registry.normalise(getattr(self, field), num_loops=self.table_loops))

    def _derive(self) -> None:
        """Bring the fields that follow from others up to date."""
        if not counts_are_valid(self):
            raise ValueError(counts_message(self))
        layout = self.slot_layout()
        stored = self.stored_layer_types
        if stored is None:
            stored = ["full_attention" if self.sliding_window is None else "sliding_attention"] * layout.stored_layers
        if len(stored) == layout.stored_layers:  # else `validate_layer_type` says so
            super().__setattr__("layer_types", layout.expand(stored))
        super().__setattr__("num_hidden_layers", layout.num_slots)

    def slot_layout(self, num_loops: int | None = None) -> SlotLayout:
        """Addresses of all attention invocations at `num_loops` loops (`None`: the config's)."""
        return SlotLayout(
            self.num_prelude_layers,
            self.num_core_layers,
            self.num_coda_layers,
            self.num_loops if num_loops is None else num_loops,
            self.core_group_size,
            self.kv_sharing != "none",
            # read before the config is complete too, when it may still be a bare name
            self.schedule.get("inner_loops") if isinstance(self.schedule, dict) else None,
        )

    def layer_shape(self, layer: int) -> LayerShape:
        """Sizes of stored layer `layer`."""
        outer = LayerShape(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )
        if not self.is_core_layer(layer):
            return outer
        heads = self.core_num_attention_heads or outer.num_attention_heads
        return LayerShape(
            self.state_size,
            self.core_intermediate_size or outer.intermediate_size,
            heads,
            self.core_num_key_value_heads or (heads if self.core_num_attention_heads else outer.num_key_value_heads),
            self.head_dim,
        )

    @property
    def state_size(self) -> int:
        """Width of the state: that of the core's residual stream."""
        return self.core_hidden_size or self.hidden_size

    @property
    def table_loops(self) -> int:
        """Rows of a table that has one for every loop: as often as the layer runs that runs most."""
        return self.num_loops * self.schedule.get("inner_loops", 1)

    def structure(self) -> dict[str, Any]:
        """The fields that a model is built by, and that it cannot follow afterwards."""
        # of learned positions there is a table, of rotary ones nothing
        positions = ("max_position_embeddings",) if self.position_embedding == "learned" else ()
        return {name: copy.deepcopy(getattr(self, name)) for name in (*STRUCTURE_FIELDS, *positions)}

    def followed(self) -> tuple[Any, ...]:
        """The values of `FOLLOWED_FIELDS`."""
        return tuple(getattr(self, name) for name in FOLLOWED_FIELDS)

    def slot_of(self, loop: int, layer: int) -> int:
        """Cache slot of stored layer `layer` (numbered as in `model.layers`) in loop `loop`, both from 0."""
        return self.slot_layout().slot(layer, loop)

    def with_num_loops(self, num_loops: int) -> Self:
        """A copy at another loop count, for sizing a cache without touching this config."""
        other = copy.copy(self)
        other.num_loops = num_loops
        other.num_hidden_layers = self.slots_to_run(num_loops)
        return other

    def slots_to_run(self, num_loops: int) -> int:
        """Slots that a call with `num_loops` loops runs: all, unless early-exit drafting has written the number of
        slots after which it stops to `num_hidden_layers`.
        """
        slots = self.slot_layout(num_loops).num_slots
        is_cut = self.num_hidden_layers != self.slot_layout().num_slots
        if is_cut and self.kv_sharing != "none":
            raise ValueError(
                f"kv_sharing={self.kv_sharing!r}: a forward cannot stop after num_hidden_layers="
                f"{self.num_hidden_layers} slots (assistant_early_exit), since a slot serves all loops of its layer. "
                "For a cheap drafter use assistant_model=model.with_num_loops(1)."
            )
        return min(self.num_hidden_layers, slots) if is_cut else slots

    @property
    def num_stored_layers(self) -> int:
        """Layers that have weights: prelude + core + coda."""
        return self.slot_layout().stored_layers

    def is_core_layer(self, layer: int) -> bool:
        """Whether stored layer `layer` belongs to the core, and so runs in every loop."""
        return 0 <= layer - self.num_prelude_layers < self.num_core_layers

    def stored_layer_type(self, layer: int) -> str:
        """`full_attention` or `sliding_attention`, of stored layer `layer`."""
        return self.layer_types[self.slot_layout().slot(layer)]

    def sliding_window_of(self, layer: int) -> int | None:
        """Window of stored layer `layer` in tokens; `None`: it attends to everything."""
        return self.sliding_window if self.stored_layer_type(layer) == "sliding_attention" else None

    # A class variable in Transformers, where it is the same for all configs of a class; read from instances only.
    @property
    def base_model_tp_plan(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> dict[str, str]:
        """Tensor-parallel plan of the base model; it depends on the projections there are and what is beside them."""
        # A norm over all heads' channels and a low-rank adapter work on whole activations, so the projections around
        # them gather; the memory of the weights is still split.
        column, row = "colwise", "rowwise"
        attention_whole = (
            self.qk_norm == "flat" or self.loop_adapter["type"] != "none" or self.value_embedding["type"] != "none"
        )
        mlp_whole = self.loop_adapter["type"] != "none"
        whole = ("colwise_gather_output", "rowwise_split_input")
        attention = whole if attention_whole else (column, row)
        mlp = whole if mlp_whole else (column, row)
        plan = {f"layers.*.self_attn.{name}_proj": attention[0] for name in "qkv"}
        plan["layers.*.self_attn.o_proj"] = attention[1]
        if self.attention_gate != "none":
            plan["layers.*.self_attn.gate_proj"] = attention[0]
        if self.qk_norm == "per_head" and not attention_whole:
            # each rank's norms see its own heads only, so their gradients are parts of a sum
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        if self.add_cross_attention:
            plan |= {key.replace("self_attn", "cross_attn"): how for key, how in plan.items() if "gate" not in key}
        plan |= {f"layers.*.mlp.{name}": mlp[0] for name in self.mlp_projections[:-1]}
        plan[f"layers.*.mlp.{self.mlp_projections[-1]}"] = mlp[1]
        return plan

    @property
    def mlp_projections(self) -> tuple[str, ...]:
        """Names of the MLP's projections, input side first."""
        return ("gate_proj", "up_proj", "down_proj") if self.mlp_type == "gated" else ("up_proj", "down_proj")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, which drops what it cannot place: here another model's word for the loop count, and a
        misspelt field where no model is there to refuse it, are errors.

        Transformers writes the fields among `kwargs` to the finished config one by one. Here they take the place of
        the dictionary's before one is made, so that they are checked together and in no order.
        """
        refuse_foreign_loop_names(kwargs, "from_pretrained")
        if not kwargs.get("return_unused_kwargs"):
            for key in kwargs:
                close = nearest_field(key)
                if close and not hasattr(cls, key):
                    raise ValueError(f"{key}={kwargs[key]!r} is not a field of LoopedConfig. Did you mean {close!r}?")
        own = inspect.get_annotations(LoopedConfig)
        given = {name: kwargs.pop(name) for name in tuple(kwargs) if name in own}
        stale = ("num_hidden_layers", "layer_types") if DEPTH_FIELDS & given.keys() else ()
        config_dict = {name: value for name, value in config_dict.items() if name not in stale}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save `config.json` together with the model's code, so that the folder loads where the package is missing."""
        # A config read from a Hub repository points back there; what is saved has the code beside it.
        self.auto_map = dict(AUTO_MAP)
        copy_code(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:  # Transformers' own upload from here would leave out the code, which is older than its look
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    # --- validation, run by `@strict` at construction and before saving: see config_checks.py ---------------------

    def validate_rope(self) -> None:
        """Refuse what Transformers only warns about, or takes for a model with its own RoPE per layer type."""
        allowed = ("default", *ROPE_INIT_FUNCTIONS)
        rope_type = dict(self.rope_parameters or {}).get("rope_type")
        if rope_type not in allowed:
            raise ValueError(
                f"rope_parameters={self.rope_parameters!r}: rope_type must be one of: {', '.join(allowed)} (one "
                "set of parameters for all layers)."
            )
        super().validate_rope()

    def validate_layer_type(self) -> None:
        check_stored_layer_types(self)
        super().validate_layer_type()

    def validate_fields(self) -> None:
        check_counts(self)  # which the length of a table follows from
        self._complete_specs()  # a mapping may have been written into, past `__setattr__`
        for check in CHECKS:
            check(self)

    def check_before_building(self) -> None:
        """Validate again, before a model is built: fields may have been written since, one by one.

        Without Transformers' check of `output_attentions`, which by then has been met by an attention implementation
        that the user did not choose.
        """
        self.validate_architecture()
        self.validate_fields()
        self.validate_layer_type()
        self.validate_rope()

    def check_after_writing(self) -> None:
        """Check the conditions on `FOLLOWED_FIELDS`, which may have been written since the model was built."""
        check_backprop(self)
        check_loop_loss(self)

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _check_keys(self, kwargs: dict[str, Any]) -> None:
        """Refuse a misspelt key, which Transformers would store without a word; warn about one it cannot place.

        What comes from a file (it names its model type) is only warned about: an attribute that someone set on a
        config is saved with it, and must not make the checkpoint unreadable.
        """
        generation = GenerationConfig._get_default_generation_params()
        for key in kwargs:
            if key in _HOST_KEYS or key in generation or key.startswith("_"):
                continue
            if key in FOREIGN_LOOP_NAMES:
                raise ValueError(f"{key}={kwargs[key]!r}: LoopedConfig calls the loop count num_loops.")
            close = nearest_field(key)
            hint = f" Did you mean {close!r}?" if close else ""
            if close and "model_type" not in kwargs:
                raise ValueError(f"{key}={kwargs[key]!r} is not a field of LoopedConfig.{hint}")
            logger.warning_once(f"{key}={kwargs[key]!r} is not a field of LoopedConfig; nothing reads it.{hint}")

    def _warn_if_contradicted(self, given_depth: int | None, given_types: list[str] | None) -> None:
        """`num_hidden_layers` and `layer_types` are results. A file whose `num_loops` was edited by hand is in order;
        a user who tried to set the depth this way must hear that it has no effect.
        """
        for name, given in (("num_hidden_layers", given_depth), ("layer_types", given_types)):
            derived = getattr(self, name)
            if given is not None and given != derived:
                setter = "stored_layer_types" if name == "layer_types" else "num_core_layers or num_loops"
                logger.warning_once(
                    f"{name}={given} is ignored: it follows from the layer counts and num_loops, which make it "
                    f"{derived}. Set {setter} instead."
                )


#: Fields that decide which modules a model has, or what a module does. `num_loops` is not among them.
STRUCTURE_FIELDS = tuple(name for name in inspect.get_annotations(LoopedConfig) if name not in LIVE_FIELDS)


def nearest_field(key: str) -> str | None:
    """The field of `LoopedConfig` that `key` may have been meant for; `None` if none is near."""
    fields = [field.name for field in dataclasses.fields(LoopedConfig)]
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.8)
    return close[0] if close else None


def refuse_foreign_loop_names(names: Iterable[str], where: str) -> None:
    """Raise TypeError for another model's word for the loop count, which Transformers would take in without effect."""
    for name in FOREIGN_LOOP_NAMES.intersection(names):
        raise TypeError(f"{where}() got an unexpected keyword argument {name!r}: the loop count is called num_loops.")


__all__ = ["LoopedConfig"]
