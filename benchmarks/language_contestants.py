"""The contestants of benchmarks/language.py: their shapes by preset, their configs, and what they cost."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from language_table import DRAWN, EQUAL, ONCE, TWICE
from small_runs import training_flops
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_looped.config_checks import CORE_SIZES


class Shape(NamedTuple):
    """Stored `layers` of a width, with an MLP and attention heads."""

    layers: int
    width: int
    intermediate: int
    heads: int


class Preset(NamedTuple):
    """Sizes: a stacked shape, one of twice its parameters, and one of as many whose layers run `loops` times.

    A wide looped model pays for its width in the embeddings too, which no loop uses again: where `embeddings` is set,
    they are only that wide, and the core alone is as wide as `looped` says. `outer` layers of its kind run once before
    the core, and as many behind it. With `qk_norm` all of them normalise the queries and keys of each head: a stack is
    then a stock Qwen3, which is a Llama that does.
    """

    vocabulary: int
    stacked: Shape
    twice: Shape
    looped: Shape
    loops: int
    embeddings: int | None = None
    outer: int = 0
    qk_norm: bool = False


NARROW = Preset(
    vocabulary=2048,
    stacked=Shape(layers=6, width=128, intermediate=352, heads=4),
    twice=Shape(layers=12, width=128, intermediate=408, heads=4),
    looped=Shape(layers=1, width=264, intermediate=720, heads=6),
    loops=6,
)

TINY = Preset(
    vocabulary=1024,
    stacked=Shape(layers=3, width=96, intermediate=256, heads=3),
    twice=Shape(layers=6, width=96, intermediate=256, heads=3),
    looped=Shape(layers=1, width=144, intermediate=408, heads=3),
    loops=8,
)

#: 0.43 M, 1.5 M and 2.6 M parameters. Beside the stacks of `tiny` also the published layout, the stack itself with its
#: middle looped; beside those of `narrow` wide cores of one layer and of two; and both sizes with normalised queries
#: and keys, in the stacks too. The `twice` of `tiny` and of `tiny_middle` has twice the layers and no wider MLP, 1.77
#: times the parameters: the recorded runs are of that.
PRESETS = {
    "tiny": TINY,
    "tiny_qk_norm": TINY._replace(twice=TINY.twice._replace(intermediate=312), qk_norm=True),
    "tiny_middle": TINY._replace(looped=Shape(layers=1, width=96, intermediate=248, heads=3), outer=1),
    "narrow": NARROW,
    "narrow_qk_norm": NARROW._replace(qk_norm=True),
    "wide_core": NARROW._replace(
        looped=Shape(layers=1, width=320, intermediate=736, heads=8), embeddings=NARROW.stacked.width
    ),
    "wide_core_of_two": NARROW._replace(
        looped=Shape(layers=2, width=216, intermediate=592, heads=6), embeddings=NARROW.stacked.width
    ),
    "wide": Preset(
        vocabulary=4096,
        stacked=Shape(layers=4, width=192, intermediate=512, heads=6),
        twice=Shape(layers=8, width=192, intermediate=680, heads=6),
        looped=Shape(layers=1, width=320, intermediate=760, heads=10),
        loops=4,
    ),
}


def fields_of(name: str, preset: Preset, length: int) -> dict[str, Any]:
    """The config of a contestant."""
    shape = {EQUAL: preset.stacked, TWICE: preset.twice}.get(name, preset.looped)
    fields = {
        "vocab_size": preset.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        # as GPT-2's 0.02 at its width of 768: less than half of 1 / sqrt(width)
        "initializer_range": round(0.02 * math.sqrt(768 / shape.width), 3),
    }
    if name in (EQUAL, TWICE) or (name == ONCE and preset.embeddings is None):
        fields["num_hidden_layers"] = shape.layers + (2 * preset.outer if name == ONCE else 0)
        if preset.qk_norm:  # Qwen3's heads are 128 wide, unless it is told
            return {**fields, "model_type": "qwen3", "head_dim": shape.width // shape.heads}
        return {**fields, "model_type": "llama"}
    loops = 1 if name == ONCE else preset.loops
    fields |= {"model_type": "looped", "num_loops": loops, "loop_conditioning": {"type": "norms"}}
    fields |= {"num_prelude_layers": preset.outer, "num_core_layers": shape.layers, "num_coda_layers": preset.outer}
    if preset.qk_norm:
        fields["qk_norm"] = "per_head"
    if preset.embeddings is not None:
        fields |= {key: fields[key.removeprefix("core_")] for key in CORE_SIZES}
        fields |= {"hidden_size": preset.embeddings, "head_dim": shape.width // shape.heads, "readout": "linear"}
    if name == DRAWN:
        fields["depth_sampling"] = {"type": "poisson", "granularity": "batch", "mean": float(preset.loops)}
    return fields


def costs(fields: dict[str, Any], length: int) -> tuple[int, float]:
    """Parameters, and FLOPs of training per token, as torch counts them on a real block."""
    kind = CONFIG_MAPPING[fields["model_type"]]
    config = kind(**{name: value for name, value in fields.items() if name != "model_type"})
    model = AutoModelForCausalLM.from_config(config).eval()  # in training it could draw another loop count
    return model.num_parameters(), training_flops(model, torch.zeros(1, length, dtype=torch.int64)) / length
