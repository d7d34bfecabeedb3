"""Random valid configurations for property tests: sizes, placements and every registered strategy."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randomise, tiny_config
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.configuration_looped import (
    FINAL_NORM_PLACEMENTS,
    NORM_PLACEMENTS,
    QK_NORMS,
    STRATEGY_FIELDS,
)

modest = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow,),  # other processes may be using the machine
)
#: For what takes a tenth of a second or more.
few = settings(modest, max_examples=6)

MODERATE_LOOPS = st.integers(1, 4)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and layer options, without the strategies."""
    key_value_heads = draw(st.integers(1, 2))
    sliding_window = draw(st.none() | st.integers(2, 6))
    parts = draw(st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 2)))
    layer_types = ["full_attention"] if sliding_window is None else ["full_attention", "sliding_attention"]
    stored = st.lists(st.sampled_from(layer_types), min_size=sum(parts), max_size=sum(parts))
    return {
        "hidden_size": draw(st.integers(3, 12)),
        "intermediate_size": draw(st.integers(1, 9)),
        "num_attention_heads": key_value_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": key_value_heads,
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "num_prelude_layers": parts[0],
        "num_core_layers": parts[1],
        "num_coda_layers": parts[2],
        "num_loops": draw(MODERATE_LOOPS),
        "sliding_window": sliding_window,
        "stored_layer_types": draw(st.none() | stored),
        "norm_placement": draw(st.sampled_from(NORM_PLACEMENTS)),
        "final_norm": draw(st.sampled_from(FINAL_NORM_PLACEMENTS)),
        "qk_norm": draw(st.sampled_from(QK_NORMS)),
        "mlp_type": draw(st.sampled_from(["gated", "plain"])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "attention_bias": draw(st.booleans()),
        "attention_output_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "embedding_scale": draw(st.sampled_from([1.0, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "final_logit_softcapping": draw(st.sampled_from([None, 2.0])),
    }


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> LoopedConfig:
    """Any valid config; `fixed` fields have the given values."""
    chosen = draw(shapes()) | {"prelude_norm": draw(st.booleans())}
    for field, registry in STRATEGY_FIELDS.items():
        chosen[field] = {"type": draw(st.sampled_from(sorted(registry)))}
    chosen |= fixed
    if chosen["loop_adapter"] == {"type": "lora"}:
        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        chosen["loop_adapter"] = {"type": "lora", "rank": draw(st.integers(1, 3)), "targets": projections}
    enters = any(STRATEGY_FIELDS[f][chosen[f]["type"]].carries_prelude for f in ("injection", "state_init"))
    if not enters:
        chosen["state_init"] = {"type": "input"}
    return tiny_config(**chosen)


@st.composite
def in_place_configs(draw: st.DrawFn) -> LoopedConfig:
    """Stacked models with a part in the middle that is looped in place: with one loop they are the stack."""
    chosen = draw(shapes())
    if chosen["final_norm"] != "end":
        # one norm at the end, unless a coda or the second norm of `after_loops` follows it
        chosen |= {"final_norm": "every_loop", "num_coda_layers": 0, "stored_layer_types": None}
    chosen |= {"injection": "none", "state_init": "input", "prelude_norm": False, "num_loops": 1}
    return tiny_config(**chosen, loop_update=draw(st.sampled_from(["replace", "damped"])))


def random_model(config: LoopedConfig) -> LoopedForCausalLM:
    """A model of this config with random values in every parameter, the same in every run."""
    torch.manual_seed(0)
    return randomise(LoopedForCausalLM(config)).eval()
