"""Retrofit: a stacked checkpoint becomes a looped one that computes the same function at one loop.

All layers are kept: the first become the prelude, the middle ones the core, the last ones the coda. Further loops run
the core again with a damped update, s <- (1 - 1/T) s + (1/T) core(s) ("Training-free looped transformers", arXiv
2605.23872), which keeps the state near what the coda expects, without any training. Or, for a model that is to be
trained, they start as the identity, on which `identity_loops` says more.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.families import family_of
from modeling_looped.loop_adapter import LoopLoRA
from modeling_looped.loop_update import LoopUpdate
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.slots import checked_num_loops
from modeling_looped.state_map import New, StateMap, convert


def retrofit(
    teacher: PreTrainedModel,
    prelude: int,
    core: int,
    coda: int,
    loops: int,
    *,
    loop_update: dict | str = "damped",
    loop_adapter: dict | str = "none",
) -> LoopedForCausalLM:
    """A looped model that keeps all layers of `teacher` and equals it at `num_loops=1`.

    Args:
        teacher: a stacked causal language model (Llama, Mistral, Qwen 2 or 3, OLMo 2), not quantised.
        prelude, core, coda: how many of its layers become each part; together all of them.
        loops: loop count that the model is set to.
        loop_update: spec of the update between loops, one that is s <- y at one loop.
        loop_adapter: spec of what the layers do differently in each loop, nothing at the start of the first.

    Returns:
        the looped model, with weights of its own in the teacher's dtype and on its device.

    Raises:
        ValueError: if the parts do not add up to the teacher's layers, if it has something that no looped layer has,
            or if its weights are quantised; says what is supported.
    """
    quantizer = getattr(teacher, "hf_quantizer", None)
    # Transformers unpacks the weights of a GGUF file as it loads them; packed ones are refused by `StateMap`.
    if quantizer is not None and quantizer.quantization_config.quant_method != "gguf":
        raise ValueError(
            f"the teacher is quantised ({quantizer.quantization_config.quant_method.value}), and a looped model is "
            "made from plain weights: load it without a quantization_config, or call its dequantize() first."
        )
    config = retrofit_config(
        teacher.config, prelude, core, coda, loops, loop_update=loop_update, loop_adapter=loop_adapter
    )
    with torch.device("meta"):
        skeleton = LoopedForCausalLM(config)
    update = skeleton.get_submodule("model.loop_update")
    if not (isinstance(update, LoopUpdate) and update.is_replace(1)):
        raise ValueError(
            f"loop_update={config.loop_update!r} would change the function at one loop: use one that does not."
        )
    rules = family_of(teacher.config).state_map(tied=config.tie_word_embeddings).rules
    starts = "its own parameters start at their initialisation"
    own = (New("model.loop_update.{parameter}", starts), New(LoopLoRA.WHERE, starts))
    return convert(teacher, teacher.state_dict(), StateMap(*rules, *own), skeleton)


def identity_loops(rank: int, loops: int) -> dict[str, Any]:
    """`loop_update` and `loop_adapter` of a retrofit whose loops after the first start as the identity, at any count.

    There the projections that end a branch are c W + B A, with c and B zero at the start: nothing is added to the
    state until training adds it, and unlike behind a gate near zero, c and B get their whole gradient from the first
    step on.

    Args:
        rank: r of the low-rank weights B A.
        loops: loops with c, B and A of their own; further ones use the last.

    Raises:
        ValueError: for fewer than two loops, none of which would be a further one.
    """
    if loops < 2:
        raise ValueError(f"loops={loops} must be at least 2 for loops after the first that start as the identity.")
    ends = ("o_proj", "down_proj")
    scale = {"shared_scale": "per_channel", "initial_scale": 0.0}
    own = {"loops": tuple(range(1, loops)), "table_loops": loops}
    return {"loop_update": "replace", "loop_adapter": {"type": "lora", "rank": rank, "targets": ends, **own, **scale}}


def retrofit_config(
    stock: PreTrainedConfig,
    prelude: int,
    core: int,
    coda: int,
    loops: int,
    *,
    loop_update: dict | str = "damped",
    loop_adapter: dict | str = "none",
) -> LoopedConfig:
    """The config of the retrofit of a teacher whose config is `stock`. Arguments and errors as in `retrofit`."""
    fields = family_of(stock).looped_fields(stock)
    check_split(stock.num_hidden_layers, prelude, core, coda)
    # `max_trained_loops` stays open: the damped update is made for loop counts that nobody trained, and a warning at
    # every one of them would say less than the table of losses in the manifest.
    config = LoopedConfig(
        **fields,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        num_loops=checked_num_loops(loops),
        injection="none",
        state_init="input",
        prelude_norm=False,
        loop_update=loop_update,
        loop_adapter=loop_adapter,
    )
    if config.loop_adapter.get("initial_scale") == 0.0 and config.norm_placement != "pre":
        raise ValueError(
            f"initial_scale=0.0 would start branches of {stock.model_type} at zero, and the norm behind them has no "
            "usable gradient there: loops that start as the identity need norms before the branches only."
        )
    return config


def check_split(num_layers: int, prelude: int, core: int, coda: int) -> None:
    """Raise ValueError unless the three parts are all of a teacher's layers; names the nearest splits that are."""
    if min(prelude, coda) >= 0 and core >= 1 and prelude + core + coda == num_layers:
        return
    middle = min(max(core, 1), num_layers)
    before = (num_layers - middle) // 2
    candidates = [
        (before, middle, num_layers - middle - before),
        (prelude, num_layers - prelude - coda, coda),
        (prelude, core, num_layers - prelude - core),
        (num_layers - core - coda, core, coda),
    ]
    valid = [split for split in dict.fromkeys(candidates) if min(split[0], split[2]) >= 0 and split[1] >= 1]
    raise ValueError(
        f"prelude={prelude} + core={core} + coda={coda} must be the teacher's {num_layers} layers, the core at least "
        f"1; for example {' or '.join('/'.join(map(str, split)) for split in valid)}."
    )


__all__ = ["check_split", "identity_loops", "retrofit", "retrofit_config"]
