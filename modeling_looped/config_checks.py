"""What makes a `LoopedConfig` valid: one check per concern, whose error names field, value and what is allowed.

They run when a config is made, before a model is built by it and before it is saved; those of single fields also when
a field is written, and those of a field that a built model follows in the next forward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .activations import ACTIVATION_NAMES
from .halting import HALTINGS
from .injection import INJECTIONS
from .loop_loss import LOOP_LOSSES
from .norms import NORM_TYPES
from .routing import Router
from .state import STATE_INITS
from .weight_init import OUTPUT_PROJECTION_INITS, WEIGHT_INITS

if TYPE_CHECKING:
    from .configuration_looped import LoopedConfig

#: Sizes of the core where they differ from those of prelude and coda.
CORE_SIZES = (
    "core_hidden_size",
    "core_intermediate_size",
    "core_num_attention_heads",
    "core_num_key_value_heads",
)

NORM_PLACEMENTS = ("pre", "sandwich", "sandwich_sum", "post", "post_branch")
FINAL_NORM_PLACEMENTS = ("end", "every_loop", "after_loops", "none")
QK_NORMS = ("none", "per_head", "per_head_unweighted", "flat")
POSITION_EMBEDDINGS = ("rope", "learned", "none")


def check_counts(config: LoopedConfig) -> None:
    """Numbers of layers, loops, tokens and channels."""
    if not groups_are_valid(config):
        raise ValueError(
            f"core_group_size={config.core_group_size} must be None or a divisor of num_core_layers="
            f"{config.num_core_layers}."
        )
    if not counts_are_valid(config):
        raise ValueError(counts_message(config))
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in ("max_trained_loops", "backprop_loops", "embedding_size", "cross_attention_hidden_size", *CORE_SIZES):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be None or at least 1.")
    # Of a window of 1, Transformers' sliding cache keeps the last 0 tokens, which Python reads as all of them.
    if config.sliding_window is not None and config.sliding_window < 2:
        raise ValueError(f"sliding_window={config.sliding_window} must be None or at least 2.")


def check_attention(config: LoopedConfig) -> None:
    """Heads, their sizes and their biases."""
    if config.num_attention_heads < 1:
        raise ValueError(f"num_attention_heads={config.num_attention_heads} must be at least 1.")
    for name in ("num_key_value_heads", "head_dim"):
        if not isinstance(getattr(config, name), int) or isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} must be an integer, or None to follow other fields.")
    if not isinstance(config.attention_value_bias, bool):
        raise ValueError(
            f"attention_value_bias={config.attention_value_bias!r} must be True, False, or None to follow "
            "attention_bias."
        )
    if config.num_key_value_heads < 1:
        raise ValueError(f"num_key_value_heads={config.num_key_value_heads} must be at least 1.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}."
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} must be an even number of at least 2 (rotary embeddings turn pairs of "
            f"channels); left out, it is hidden_size={config.hidden_size} / num_attention_heads="
            f"{config.num_attention_heads}."
        )


def check_choices(config: LoopedConfig) -> None:
    """Fields that take one of a few words, and numbers with a range."""
    for name, allowed in (
        ("hidden_act", ACTIVATION_NAMES),
        ("mlp_output_act", (None, *ACTIVATION_NAMES)),
        ("mlp_type", ("gated", "plain")),
        ("mlm_head", ("linear", "transform")),
        ("sequence_pooling", ("last_token", "first_token")),
        ("norm_type", NORM_TYPES),
        ("attention_gate", ("none", "per_channel")),
        ("position_embedding", POSITION_EMBEDDINGS),
        ("kv_sharing", ("none", "first_loop")),
        ("qk_norm", QK_NORMS),
        ("norm_placement", NORM_PLACEMENTS),
        ("final_norm", FINAL_NORM_PLACEMENTS),
        ("checkpoint_granularity", ("layer", "loop")),
        ("weight_init", WEIGHT_INITS),
        ("output_projection_init", OUTPUT_PROJECTION_INITS),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} must be one of: {', '.join(map(str, allowed))}.")
    if config.qkv_clip is not None and not 0 < config.qkv_clip < math.inf:
        raise ValueError(f"qkv_clip={config.qkv_clip} must be None or a positive number.")
    if config.type_vocab_size < 0:
        raise ValueError(f"type_vocab_size={config.type_vocab_size} must be at least 0 (no table).")
    if config.final_logit_softcapping is not None and config.final_logit_softcapping <= 0:
        raise ValueError(f"final_logit_softcapping={config.final_logit_softcapping} must be None or positive.")
    if config.rms_norm_eps <= 0:
        raise ValueError(f"rms_norm_eps={config.rms_norm_eps} must be positive.")
    for name in ("attention_dropout", "classifier_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name}={getattr(config, name)} must lie in [0, 1).")
    for name in ("embedding_scale", "logit_scale"):
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)} must be a finite number.")
    if not 0.0 <= config.initializer_range < math.inf:
        raise ValueError(f"initializer_range={config.initializer_range} must be a finite number of at least 0.")


def check_stored_layer_types(config: LoopedConfig) -> None:
    """One attention type per stored layer."""
    if config.stored_layer_types is None:
        return
    allowed = ("full_attention", "sliding_attention")
    if len(config.stored_layer_types) != config.num_stored_layers:
        raise ValueError(
            f"stored_layer_types has {len(config.stored_layer_types)} entries; it needs one per stored layer, "
            f"num_prelude_layers + num_core_layers + num_coda_layers = {config.num_stored_layers}."
        )
    for layer_type in config.stored_layer_types:
        if layer_type not in allowed:
            raise ValueError(f"stored_layer_types: {layer_type!r} must be one of: {', '.join(allowed)}.")
    if "sliding_attention" in config.stored_layer_types and config.sliding_window is None:
        raise ValueError("stored_layer_types names sliding_attention, so sliding_window must be set (in tokens).")


def check_core_sizes(config: LoopedConfig) -> None:
    """A core of another width than the layers around it needs maps into it and out of it."""
    if config.num_core_layers == 0:
        return
    shape = config.layer_shape(config.num_prelude_layers)
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"core_num_attention_heads={shape.num_attention_heads} must be a multiple of "
            f"core_num_key_value_heads={shape.num_key_value_heads}."
        )
    if config.state_size == config.hidden_size:
        return
    differs = f"core_hidden_size={config.core_hidden_size} is not hidden_size={config.hidden_size}"
    if config.injection["type"] not in ("concat", "diagonal"):
        raise ValueError(f"{differs}: injection={config.injection['type']!r} must be concat or diagonal.")
    if config.state_init["type"] == "input":
        raise ValueError(f"{differs}: state_init='input' would start with the prelude's width; use another.")
    if config.injection.get("first_loop") == "skip":
        raise ValueError(f"{differs}: injection.first_loop='skip' would put the state of one width into the other.")
    if config.readout["type"] != "linear":
        raise ValueError(f"{differs}: readout={config.readout['type']!r} must be linear.")
    if config.final_norm == "every_loop":
        raise ValueError(f"{differs}: final_norm='every_loop' has one weight for both; use end or after_loops.")


def check_groups(config: LoopedConfig) -> None:
    """Layers that loop by themselves have a state each, so what belongs to the loop as a whole has no place."""
    if config.core_group_size in (None, config.num_core_layers) or config.num_core_layers == 0:
        return
    for field, harmless in (("injection", "none"), ("halting", "none")):
        if getattr(config, field)["type"] != harmless:
            raise ValueError(
                f"{field}={getattr(config, field)['type']!r} with core_group_size={config.core_group_size}: each "
                f"group of layers loops by itself; use {harmless!r}, or core_group_size=None."
            )
    if config.final_norm == "every_loop":
        raise ValueError(
            f"final_norm='every_loop' with core_group_size={config.core_group_size}: use end or after_loops."
        )


def check_schedule(config: LoopedConfig) -> None:
    """Nested loops have two halves of the core and two states; what is made for one state has no place there."""
    if config.num_core_layers == 0 or config.schedule["type"] != "nested":
        return
    if config.num_core_layers % 2:
        raise ValueError(
            f"schedule='nested' with num_core_layers={config.num_core_layers}: its halves need an even number."
        )
    for field, allowed in (
        ("injection", "none"),
        ("loop_update", "replace"),
        ("kv_sharing", "none"),
        ("core_group_size", None),
    ):
        value = getattr(config, field)
        if (value["type"] if isinstance(value, dict) else value) != allowed:
            raise ValueError(f"{field}={value!r} with schedule='nested': it must be {allowed!r}.")
    if issubclass(HALTINGS[config.halting["type"]], Router):
        raise ValueError(f"halting={config.halting['type']!r} with schedule='nested': a router needs schedule='flat'.")


def check_embeddings(config: LoopedConfig) -> None:
    """Embedding tables, the heads tied to them, and value embeddings."""
    narrow = config.embedding_size not in (None, config.hidden_size) and config.tie_word_embeddings
    if narrow and config.is_causal:
        raise ValueError(
            f"embedding_size={config.embedding_size} with tie_word_embeddings=True: a causal head is as wide as "
            f"hidden_size={config.hidden_size}; use tie_word_embeddings=False."
        )
    if narrow and config.mlm_head == "linear":
        raise ValueError(
            f"embedding_size={config.embedding_size} with tie_word_embeddings=True needs mlm_head='transform', which "
            "maps the hidden states to that width."
        )
    if config.ngram_embedding["type"] != "none" and config.embedding_size is not None:
        raise ValueError(
            f"ngram_embedding={config.ngram_embedding['type']!r} with embedding_size={config.embedding_size}: n-grams "
            "are added to token embeddings of hidden_size; use embedding_size=None."
        )
    layers = config.value_embedding.get("layers", ())
    if max(layers, default=-1) >= config.num_stored_layers:
        raise ValueError(f"value_embedding: layers={layers} must be stored layers, 0..{config.num_stored_layers - 1}.")
    for layer in layers:
        channels, width = config.value_embedding["gate_channels"], config.layer_shape(layer).hidden_size
        if channels > width:
            raise ValueError(
                f"value_embedding: gate_channels={channels} must not exceed the width of layer {layer}, {width}."
            )


def check_prefix(config: LoopedConfig) -> None:
    """A prefix that sees itself needs a causal rest. (Transformers writes `is_causal` for a moment, unchecked.)"""
    if config.prefix_lm and not config.is_causal:
        raise ValueError("prefix_lm=True with is_causal=False: every token sees both sides already; use False.")


def check_cross_attention(config: LoopedConfig) -> None:
    """An encoder's output is read by a causal decoder. (As for a prefix, `is_causal` is written unchecked.)"""
    if config.is_decoder and not config.is_causal:
        raise ValueError("is_decoder=True with is_causal=False: a decoder is causal; use is_causal=True.")
    if config.add_cross_attention and not config.is_decoder:
        raise ValueError(
            "add_cross_attention=True with is_decoder=False: it belongs to a decoder; use is_decoder=True."
        )
    if config.add_cross_attention and config.residual_streams["type"] != "none":
        raise ValueError(
            f"add_cross_attention=True with residual_streams={config.residual_streams['type']!r}: the streams connect "
            "to self-attention and MLP only; use residual_streams='none'."
        )
    if config.cross_attention_hidden_size is not None and not config.add_cross_attention:
        raise ValueError(
            f"cross_attention_hidden_size={config.cross_attention_hidden_size} with add_cross_attention=False has no "
            "effect; use add_cross_attention=True, or leave it out."
        )


def check_prelude_enters(config: LoopedConfig) -> None:
    """The tokens must reach the core."""
    if config.num_core_layers == 0:
        return
    injection, state_init = config.injection["type"], config.state_init["type"]
    if not (INJECTIONS[injection].carries_prelude or STATE_INITS[state_init].carries_prelude):
        raise ValueError(
            f"injection={injection!r} with state_init={state_init!r}: the core would never see the tokens. Use "
            "state_init='input', or an injection."
        )


#: A field that acts on the core -> what it may be where there is none: its default, and what says "nothing" by itself.
#: (Of a strategy, its type.)
WITHOUT_CORE: dict[str, tuple[str | None, ...]] = {
    "kv_sharing": ("none",),
    "core_group_size": (None,),
    **dict.fromkeys(CORE_SIZES, (None,)),
    "backprop_loops": (None,),
    "final_norm": ("end", "none"),
    "injection": ("diagonal", "none"),
    "state_init": ("zeros", "input"),
    "loop_update": ("replace",),
    "loop_conditioning": ("none",),
    "loop_adapter": ("none",),
    "halting": ("none",),
    "readout": ("none",),
    "schedule": ("flat",),
    "depth_sampling": ("fixed",),
    "loop_loss": ("output",),
}


def choice_of(config: LoopedConfig, field: str) -> Any:
    """The value of a field, of a strategy its type."""
    value = getattr(config, field)
    return value["type"] if isinstance(value, dict) else value


def check_without_core(config: LoopedConfig) -> None:
    """A stack has no place for what acts on the core, and would leave it out without a word."""
    for field, harmless in WITHOUT_CORE.items():
        value = choice_of(config, field)
        if value not in harmless:
            raise ValueError(
                f"{field}={value!r} acts on the core, and num_core_layers=0: use {' or '.join(map(repr, harmless))}."
            )


def check_strategies(config: LoopedConfig) -> None:
    """Strategies of the core need a core, and adapters need their projections."""
    if config.num_core_layers == 0:
        check_without_core(config)
        return
    if config.loop_conditioning["type"] == "norms" and config.norm_type == "rms_unweighted":
        raise ValueError(
            "loop_conditioning='norms' with norm_type='rms_unweighted': norms without a weight have none per loop."
        )
    targets = set(config.loop_adapter.get("targets", ()))
    missing = targets - {"q_proj", "k_proj", "v_proj", "o_proj", *config.mlp_projections}
    if missing:
        raise ValueError(
            f"loop_adapter: targets {sorted(missing)} do not exist with mlp_type={config.mlp_type!r}; "
            f"its projections are {', '.join(config.mlp_projections)}."
        )
    loops, idle = config.loop_adapter.get("loops"), sorted(targets & {"k_proj", "v_proj"})
    if config.kv_sharing == "first_loop" and idle and loops and 0 not in loops:
        raise ValueError(
            f"loop_adapter: loops={list(loops)} with kv_sharing='first_loop' makes keys and values in loop 0 alone: "
            f"its targets {', '.join(idle)} would never act. Leave them out, adapt loop 0 too, or use "
            "kv_sharing='none'."
        )


def check_residual_streams(config: LoopedConfig) -> None:
    """What reads one state from the loop has no place where the loop carries several streams."""
    streams = config.residual_streams
    kind = streams["type"]
    if kind == "none":
        return
    if config.num_core_layers == 0:
        if kind == "hyperloop":
            raise ValueError("residual_streams='hyperloop' acts on the core, and num_core_layers=0: use 'none'.")
        for name, harmless in (("core_num_streams", None), ("own_loops", 1)):
            if streams[name] != harmless:
                raise ValueError(
                    f"residual_streams: {name}={streams[name]} acts on the core, and num_core_layers=0: use "
                    f"{harmless}."
                )
        return
    if kind == "hyperloop":
        # the streams are the update, of a core that loops as a whole
        own = {"loop_update": ("replace",), "schedule": ("flat",), "core_group_size": (None,)}
        where, instead = "", ""
    elif streams["span"] == "model":
        own, where, instead = {}, ", span='model'", "span='part', or "
    else:
        return
    allowed = {"halting": ("none",), "final_norm": ("end", "after_loops", "none"), **own}
    for name, choices in allowed.items():
        value = choice_of(config, name)
        if value not in choices:
            raise ValueError(
                f"{name}={value!r} with residual_streams={kind!r}{where}: it works on one state, and between the "
                f"loops there are {streams['num_streams']} streams; use {instead}{name}="
                f"{' or '.join(map(repr, choices))}."
            )


def check_depth_attention(config: LoopedConfig) -> None:
    """Layers that read each other's keys and values have them of one shape, and all of them."""
    if config.depth_attention["type"] == "none":
        return
    named = f"depth_attention={config.depth_attention['type']!r}"
    if config.kv_sharing != "none":
        raise ValueError(
            f"kv_sharing={config.kv_sharing!r} with {named}: values are mixed anew in every loop, and shared ones are "
            "not; use kv_sharing='none'."
        )
    heads = {config.layer_shape(layer).num_key_value_heads for layer in range(config.num_stored_layers)}
    if len(heads) > 1:
        raise ValueError(
            f"core_num_key_value_heads={config.core_num_key_value_heads} with {named}: all layers need as many, "
            f"num_key_value_heads={config.num_key_value_heads}."
        )
    if config.num_core_layers and issubclass(HALTINGS[config.halting["type"]], Router):
        raise ValueError(
            f"halting={config.halting['type']!r} with {named}: a token that sits out a loop has no values there; use "
            "another halting."
        )


def check_routing(config: LoopedConfig) -> None:
    """A router decides who takes part in a loop; what else would decide about the state has no say beside it."""
    if config.num_core_layers == 0 or not issubclass(HALTINGS[config.halting["type"]], Router):
        return
    if config.loop_update["type"] != "replace":
        raise ValueError(
            f"loop_update={config.loop_update!r} with halting={config.halting['type']!r}: the router makes the next "
            "state itself; use 'replace'."
        )


def check_backprop(config: LoopedConfig) -> None:
    """Truncated backpropagation must leave every parameter a gradient."""
    # Whatever num_loops is here: a forward with more loops than backprop_loops would truncate.
    if config.backprop_loops is None or config.num_core_layers == 0:
        return
    if config.kv_sharing != "none":
        raise ValueError(
            f"backprop_loops={config.backprop_loops} with kv_sharing={config.kv_sharing!r} would leave the key and "
            "value projections without a gradient, since only the first loop uses them; use backprop_loops=None."
        )
    if not INJECTIONS[config.injection["type"]].carries_prelude:
        raise ValueError(
            f"backprop_loops={config.backprop_loops} with injection={config.injection['type']!r} would leave the "
            "embeddings and the prelude without a gradient, since only the first loop sees them; use an injection "
            "that re-enters the prelude in every loop (diagonal, add, concat), or backprop_loops=None."
        )
    adapted, rows = config.loop_adapter.get("loops"), config.loop_adapter.get("table_loops")
    # loops beyond the table use its last row, so that an adapter in the last one is never cut off
    if adapted and adapted[-1] < rows - config.backprop_loops:
        raise ValueError(
            f"backprop_loops={config.backprop_loops} with loop_adapter: loops={list(adapted)} would leave the adapter "
            f"without a gradient, since of its table_loops={rows} loops only the last {config.backprop_loops} keep a "
            f"graph; use backprop_loops={rows - adapted[-1]} or more, adapt later loops too, or backprop_loops=None."
        )


def check_depth_sampling(config: LoopedConfig) -> None:
    """A rule that gives out weights over all loops has no last loop per row."""
    granularity = config.depth_sampling.get("granularity", "batch")
    if config.num_core_layers and granularity != "batch" and config.halting["type"] != "none":
        raise ValueError(
            f"depth_sampling: granularity={granularity!r} with halting={config.halting['type']!r}: the halting rule "
            "chooses among the loops of a whole batch; use granularity='batch', or halting='none'."
        )
    if config.num_core_layers and granularity != "batch" and config.depth_attention["type"] != "none":
        raise ValueError(
            f"depth_sampling: granularity={granularity!r} with depth_attention={config.depth_attention['type']!r}: it "
            "reads all loops of the batch; use granularity='batch', or depth_attention='none'."
        )


def check_loop_loss(config: LoopedConfig) -> None:
    """A loss over several loops needs one state per loop, and one that trains the gate needs the gate."""
    loss = config.loop_loss["type"]
    if loss == "output" or config.num_core_layers == 0:
        return
    allowed = LOOP_LOSSES[loss].halting
    if config.halting["type"] not in allowed:
        raise ValueError(
            f"loop_loss={loss!r} with halting={config.halting['type']!r}: the loss reads every loop for itself, which "
            f"this halting would leave without a gradient or mixes; use halting={' or '.join(map(repr, allowed))}."
        )
    if config.core_group_size not in (None, config.num_core_layers):
        raise ValueError(
            f"loop_loss={loss!r} with core_group_size={config.core_group_size}: each group of layers loops by itself, "
            "so that no loop of one is followed by the coda; use core_group_size=None."
        )
    if loss == "exit_gate" and config.backprop_loops is not None:
        raise ValueError(
            f"backprop_loops={config.backprop_loops} with loop_loss='exit_gate': no loop keeps a graph, and the gate "
            "would learn from the last ones only; use backprop_loops=None."
        )
    if loss == "expected_exit" and config.backprop_loops == 1:
        raise ValueError(
            "backprop_loops=1 with loop_loss='expected_exit': the gate has no say in the last loop, so it would never "
            "learn; use at least 2, or None."
        )


def counts_are_valid(config: LoopedConfig) -> bool:
    """Whether the numbers of layers and loops make sense, so that slots can be counted."""
    parts = (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers)
    return min(parts) >= 0 and sum(parts) >= 1 and config.num_loops >= 1 and groups_are_valid(config)


def groups_are_valid(config: LoopedConfig) -> bool:
    """Whether the core falls into groups of `core_group_size` layers."""
    size = config.core_group_size
    return size is None or (size >= 1 and config.num_core_layers % size == 0)


def counts_message(config: LoopedConfig) -> str:
    """What is wrong where `counts_are_valid` says no."""
    return (
        f"num_prelude_layers={config.num_prelude_layers}, num_core_layers={config.num_core_layers} and "
        f"num_coda_layers={config.num_coda_layers} must not be negative and must not all be 0, and "
        f"num_loops={config.num_loops} must be at least 1."
    )


#: Checks of conditions that involve several fields, or all of them.
CHECKS = (
    check_counts,
    check_attention,
    check_choices,
    check_core_sizes,
    check_groups,
    check_schedule,
    check_embeddings,
    check_prefix,
    check_cross_attention,
    check_prelude_enters,
    check_strategies,
    check_residual_streams,
    check_depth_attention,
    check_routing,
    check_backprop,
    check_depth_sampling,
    check_loop_loss,
)
