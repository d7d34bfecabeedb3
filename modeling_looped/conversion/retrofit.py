"""Retrofit: a stacked checkpoint becomes a looped one that computes the same function at one loop.

All layers are kept: the first become the prelude, the middle ones the core, the last ones the coda. Further loops run
the core again with a damped update, s <- (1 - 1/T) s + (1/T) core(s) ("Training-free looped transformers", arXiv
2605.23872), which keeps the state near what the coda expects, without any training.
"""

from __future__ import annotations

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.families import family_of
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
) -> LoopedForCausalLM:
    """A looped model that keeps all layers of `teacher` and equals it at `num_loops=1`.

    Args:
        teacher: a stacked causal language model (Llama, Mistral, Qwen 2 or 3, OLMo 2), not quantised.
        prelude, core, coda: how many of its layers become each part; together all of them.
        loops: loop count that the model is set to.
        loop_update: spec of the update between loops, one that is s <- y at one loop.

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
    config = retrofit_config(teacher.config, prelude, core, coda, loops, loop_update=loop_update)
    with torch.device("meta"):
        skeleton = LoopedForCausalLM(config)
    update = skeleton.get_submodule("model.loop_update")
    if not (isinstance(update, LoopUpdate) and update.is_replace(1)):
        raise ValueError(
            f"loop_update={config.loop_update!r} would change the function at one loop: use one that does not."
        )
    rules = family_of(teacher.config).state_map(tied=config.tie_word_embeddings).rules
    own = New("model.loop_update.{parameter}", "the update's own parameters start at their initialisation")
    return convert(teacher, teacher.state_dict(), StateMap(*rules, own), skeleton)


def retrofit_config(
    stock: PreTrainedConfig, prelude: int, core: int, coda: int, loops: int, *, loop_update: dict | str = "damped"
) -> LoopedConfig:
    """The config of the retrofit of a teacher whose config is `stock`. Arguments and errors as in `retrofit`."""
    fields = family_of(stock).looped_fields(stock)
    check_split(stock.num_hidden_layers, prelude, core, coda)
    # `max_trained_loops` stays open: the damped update is made for loop counts that nobody trained, and a warning at
    # every one of them would say less than the table of losses in the manifest.
    return LoopedConfig(
        **fields,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        num_loops=checked_num_loops(loops),
        injection="none",
        state_init="input",
        prelude_norm=False,
        loop_update=loop_update,
    )


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


__all__ = ["check_split", "retrofit", "retrofit_config"]
