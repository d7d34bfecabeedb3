"""Unrolling: a looped model as a stock stacked one, in which every slot is a layer with weights of its own.

It is exact as long as a loop does nothing but run its layers. Whatever else a loop does (an injection, a damped
update, ...) is refused by name. Per-loop norms and low-rank weights are no obstacle: a slot gets its own copy anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from .conditioning import LoopConditioning
from .config_checks import CORE_SIZES
from .configuration_looped import STRATEGY_FIELDS, LoopedConfig
from .families import FAMILIES, Family, StockFit
from .halting import Halting
from .loop_adapter import LOOP_ADAPTERS, LoopLoRA
from .loop_update import LoopUpdate
from .norms import LoopedRMSNorm
from .registry import Strategy, table_row
from .slots import SlotLayout, checked_num_loops
from .state import InputState
from .state_map import New, StateMap, convert

#: Strategy field -> what a loop does there beside running its layers.
WHAT_ELSE_A_LOOP_DOES = {
    "injection": "brings the prelude into every loop",
    "state_init": "the first loop does not start from the prelude's output",
    "loop_update": "changes a loop's result, or mixes it with the state before it",
    "loop_conditioning": "adds a signal to the state in every loop",
    "halting": "reads tokens from loops before the last",
    "readout": "maps the state between core and coda",
    "schedule": "two states read each other",
}

#: Strategies that never stand in the way: every slot's own weights take the adapters in, value embeddings have been
#: looked at before, and depth is sampled, and a loss computed, in training only.
NOT_ASKED = (LOOP_ADAPTERS.field, "value_embedding", "depth_sampling", "loop_loss")


def unroll(model: PreTrainedModel, num_loops: int | None = None, *, family: str | None = None) -> PreTrainedModel:
    """A stock stacked model that computes the same logits as `model` does with `num_loops` loops.

    Slot s of the loop becomes layer s of the stack. The embedding scale goes into the embeddings and the logit scale
    into the final norm, so whoever passes `inputs_embeds` to the stack has to scale them.

    Args:
        model: a `LoopedForCausalLM`.
        num_loops: loops to unroll; `None`: the config's.
        family: model type of the result (`llama`, `mistral`, `qwen2`, `qwen3`, `olmo2`); `None`: the first that fits.

    Returns:
        the stacked model, with weights of its own in the same dtype and on the same device.

    Raises:
        ValueError: listing every field of the config, with its value, that no stock family can express.
    """
    # Not by `isinstance`: a config loaded with `trust_remote_code` is of another copy of the class than this file's.
    config: Any = model.config
    if config.model_type != LoopedConfig.model_type:
        raise TypeError(f"only a looped model can be unrolled, not a {type(model).__name__}.")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family={family!r} must be one of: {', '.join(FAMILIES)}.")
    layout = config.slot_layout(None if num_loops is None else checked_num_loops(num_loops))

    fit = best_fit(config, layout, FAMILIES if family is None else {family: FAMILIES[family]})
    blocking = blocking_loop_options(model, config, layout) | fit.blocking
    if blocking:
        listed = "; ".join(f"{field}={getattr(config, field)!r} ({why})" for field, why in blocking.items())
        raise ValueError(
            f"num_loops={layout.loops}: no stock stacked model computes this. What prevents it: {listed}."
        )

    rules = fit.family.state_map(tied=config.tie_word_embeddings).inverse().rules
    if fit.zero_biases:
        because = f"a bias that is False in the looped model is one of zeros: {', '.join(fit.zero_biases)}"
        rules = (*rules, New("model.layers.{layer}.{part}.{projection}.bias", because, torch.zeros))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(fit.family.model_type, **fit.fields))
    stacked = convert(model, stacked_state(model, config, layout), StateMap(*rules), skeleton)
    vars(stacked.generation_config).pop("num_loops", None)  # the stack has no loop to count
    return stacked


def best_fit(config: LoopedConfig, layout: SlotLayout, families: Mapping[str, Family]) -> StockFit:
    """The family that can say most of `config`, and with the fewest weights."""
    layers = [layout.invocation(index).layer for index in range(layout.num_invocations)]
    layer_types = [config.stored_layer_type(layer) for layer in layers]
    absorbed = ("embedding_scale", "logit_scale")
    fits = [family.stock_fit(config, layer_types, absorbed=absorbed) for family in families.values()]
    return min(fits, key=lambda fit: (len(fit.blocking), len(fit.zero_biases)))


def blocking_loop_options(model: PreTrainedModel, config: LoopedConfig, layout: SlotLayout) -> dict[str, str]:
    """The fields whose choice makes a loop more than its layers -> what they do."""
    blocking = {}
    if config.value_embedding["type"] != "none":
        blocking["value_embedding"] = "layers read the tokens again"
    if config.ngram_embedding["type"] != "none":
        blocking["ngram_embedding"] = "embeddings of the tokens before"
    if config.residual_streams["type"] != "none":
        blocking["residual_streams"] = "layers read and write several streams"
    if config.depth_attention["type"] != "none":
        blocking["depth_attention"] = "layers read the values of earlier ones"
    if config.tie_word_embeddings and config.embedding_scale == 0.0:
        blocking["embedding_scale"] = "it would scale the tied head too"
    if config.add_cross_attention:
        blocking["add_cross_attention"] = "layers read an encoder's output"
    if config.prefix_lm:
        blocking["prefix_lm"] = "a prefix sees itself in both directions"
    if config.final_norm == "none":
        blocking["final_norm"] = "a stack ends with a norm"
    if not layout.core:
        return blocking
    base = model.get_submodule("model")
    for field in STRATEGY_FIELDS:
        if field in NOT_ASKED or field in blocking or getattr(config, field)["type"] in ("none", "flat"):
            continue
        if not runs_layers_only(getattr(base, field, None), layout.loops):
            blocking[field] = WHAT_ELSE_A_LOOP_DOES.get(field, "a stack has no such thing")
    if config.kv_sharing != "none" and layout.loops > 1:
        blocking["kv_sharing"] = "later loops read the keys and values of the first"
    for field in CORE_SIZES:
        if getattr(config, field) is not None:
            blocking[field] = "the core has sizes of its own"
    if config.prelude_norm:
        blocking["prelude_norm"] = "a norm between prelude and core"
    norm_is_last = layout.loops == 1 and not layout.coda
    if config.final_norm == "after_loops" or (config.final_norm == "every_loop" and not norm_is_last):
        blocking["final_norm"] = "acts inside the stack too"
    return blocking


def runs_layers_only(strategy: Strategy | None, loops: int) -> bool:
    """Whether with this strategy (not one called `none`) a loop amounts to running its layers."""
    match strategy:
        case InputState():
            return True
        case LoopUpdate():
            return strategy.is_replace(loops)
        case LoopConditioning():
            return not strategy.adds_signal
        case Halting():
            return strategy.reads_last_state(loops)
        case _:
            return False


@torch.no_grad()
def stacked_state(model: PreTrainedModel, config: LoopedConfig, layout: SlotLayout) -> dict[str, Tensor]:
    """The weights of a looped model that stores each slot of `layout` as a layer, under our names."""
    embeddings = model.get_parameter("model.embed_tokens.weight")
    head = model.get_parameter("lm_head.weight")
    norm = model.get_parameter("model.norm.weight")
    # logits = c W n(x) with the norm n(x) = w * x / rms(x): the factor c can sit in w. A tied W carries the embedding
    # scale too, which w takes out again.
    norm_scale = config.logit_scale / (config.embedding_scale if config.tie_word_embeddings else 1.0)
    state = {
        "model.embed_tokens.weight": scaled(embeddings, config.embedding_scale),
        "model.norm.weight": scaled(norm, norm_scale),
        "lm_head.weight": head,
    }
    for slot in range(layout.num_invocations):
        layer, loop_idx = layout.invocation(slot)
        for name, tensor in slot_state(model.get_submodule(f"model.layers.{layer}"), loop_idx).items():
            state[f"model.layers.{slot}.{name}"] = tensor
    return state


def slot_state(layer: nn.Module, loop_idx: int) -> dict[str, Tensor]:
    """The weights with which `layer` runs in loop `loop_idx`: its norms of that loop, its adapters merged."""
    state = {}
    adapters = {}
    for name, module in layer.named_modules():
        if isinstance(module, LoopLoRA):
            adapters[name.replace("loop_adapters.", "")] = module
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if isinstance(module, LoopedRMSNorm) and module.rows is not None:
                state[key] = parameter[table_row(loop_idx, module.rows)]
            else:
                state[key] = parameter
    for projection, adapter in adapters.items():
        weight, bias = f"{projection}.weight", f"{projection}.bias"
        state[weight] = adapter.merged(state[weight], loop_idx).to(state[weight].dtype)
        if bias in state:
            state[bias] = adapter.merged_bias(state[bias], loop_idx).to(state[bias].dtype)
    return state


def scaled(weight: Tensor, factor: float) -> Tensor:
    """`factor` times `weight`, untouched where the factor is 1."""
    return weight if factor == 1.0 else (weight.float() * factor).to(weight.dtype)


__all__ = ["unroll"]
