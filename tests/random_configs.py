"""Random valid configurations for property tests: sizes, placements and every registered strategy."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randomise, tiny_config
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.config_checks import FINAL_NORM_PLACEMENTS, NORM_PLACEMENTS, POSITION_EMBEDDINGS, QK_NORMS
from modeling_looped.configuration_looped import STRATEGY_FIELDS
from modeling_looped.norms import NORM_TYPES

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

#: Parameters of a type that make another function of it than its defaults do.
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "concat": [{}, {"first_loop": "skip"}, {"bias": True}],
    "linear": [{}, {"bias": True}],
    "diagonal": [{}, {"input_matrix": "zoh"}],
    "normal": [{}, {"std": 0.5, "truncation": None}],
    "damped": [{}, {"steps": 2}],
    "sinusoidal": [{}, {"positions": "every_loop"}],
    "gate": [{}, {"threshold": 0.4}, {"output": "expected"}],
    "anchors": [{}, {"stride": 1}],
    "hashed": [
        {"table_sizes": [11, 13], "boundary_token_id": 50},
        {"max_n": 2, "table_sizes": [7, 9, 10], "row_multiple": 4, "fusion": "concat"},
    ],
    "hyper_connections": [{}, {"span": "part"}],
    "hyperloop": [{}, {"table_loops": 1}],
    "mhc": [{}, {"span": "part"}, {"mixing": "identity"}, {"sinkhorn_iterations": 2}],
    "act": [{"threshold": 0.7}, {"form": "universal", "threshold": 0.7}],
}
#: What `reference.py` does not compute: schedules beside the flat one, routers, and losses over several loops.
WITHOUT_REFERENCE = {"nested", "expert_choice", "token_choice", "deep_supervision", "expected_exit", "exit_gate"}


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and layer options, without the strategies and without sizes of the core."""
    key_value_heads = draw(st.integers(1, 2))
    sliding_window = draw(st.none() | st.integers(2, 6))
    parts = draw(st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 2)))
    layer_types = ["full_attention"] if sliding_window is None else ["full_attention", "sliding_attention"]
    stored = st.lists(st.sampled_from(layer_types), min_size=sum(parts), max_size=sum(parts))
    attention_bias, value_bias = draw(st.booleans()), draw(st.none() | st.booleans())
    embedding_size = draw(st.none() | st.integers(2, 6))
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
        "kv_sharing": draw(st.sampled_from(["none", "first_loop"])),
        "sliding_window": sliding_window,
        "stored_layer_types": draw(st.none() | stored),
        "norm_type": draw(st.sampled_from(NORM_TYPES)),
        "norm_placement": draw(st.sampled_from(NORM_PLACEMENTS)),
        "final_norm": draw(st.sampled_from(FINAL_NORM_PLACEMENTS)),
        "qk_norm": draw(st.sampled_from(QK_NORMS)),
        "mlp_type": draw(st.sampled_from(["gated", "plain"])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu", "half_relu2"])),
        "mlp_output_act": draw(st.sampled_from([None, "tanh"])),
        "attention_bias": attention_bias,
        "attention_value_bias": value_bias,
        "attention_output_bias": draw(st.booleans()),
        "attention_gate": draw(st.sampled_from(["none", "per_channel"])),
        "qkv_clip": draw(st.sampled_from([None, 0.3])),
        "mlp_bias": draw(st.booleans()),
        "position_embedding": draw(st.sampled_from(POSITION_EMBEDDINGS)),
        "embedding_size": embedding_size,
        "embedding_projection_bias": draw(st.booleans()),
        "embedding_norm": draw(st.booleans()),
        "type_vocab_size": draw(st.sampled_from([0, 2])),
        "tie_word_embeddings": draw(st.booleans()) if embedding_size is None else False,
        "embedding_scale": draw(st.sampled_from([1.0, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "final_logit_softcapping": draw(st.sampled_from([None, 2.0])),
    }


@st.composite
def core_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """A core whose layers have sizes of their own."""
    key_value_heads = draw(st.integers(1, 2))
    return {
        "core_hidden_size": draw(st.integers(3, 12)),
        "core_intermediate_size": draw(st.none() | st.integers(1, 9)),
        "core_num_attention_heads": key_value_heads * draw(st.integers(1, 3)),
        "core_num_key_value_heads": key_value_heads,
    }


def chosen_strategies(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """A spec for every strategy field, such that they fit each other, and `fields`, which they may change."""
    specs: dict[str, Any] = {}
    weightless = {"norms"} if fields["norm_type"] == "rms_unweighted" else set()  # norms per loop need weights
    for field, registry in STRATEGY_FIELDS.items():
        names = set(registry) - WITHOUT_REFERENCE - (weightless if field == "loop_conditioning" else set())
        name = draw(st.sampled_from(sorted(names)))
        specs[field] = {"type": name, **draw(st.sampled_from(PARAMETERS.get(name, [{}])))}
    if specs["loop_adapter"]["type"] == "lora":
        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        specs["loop_adapter"] |= {
            "rank": draw(st.integers(1, 3)),
            "targets": projections,
            "biases": draw(st.sampled_from(["shared", "per_loop"])),
            "shared_scale": draw(st.sampled_from(["none", "per_channel"])),
            "loops": draw(st.sampled_from([None, [0]])),
        }
    if specs["residual_streams"]["type"] == "hyperloop":  # a state of streams, and they are the update
        specs["residual_streams"]["num_streams"] = draw(st.integers(2, 4))
        specs |= {"loop_update": {"type": "replace"}, "halting": {"type": "none"}}
        fields["core_group_size"] = None
        if fields["final_norm"] == "every_loop":
            fields["final_norm"] = "after_loops"
    elif specs["residual_streams"]["type"] != "none":
        specs["residual_streams"] |= {
            "num_streams": draw(st.integers(2, 4)),
            "core_num_streams": draw(st.none() | st.integers(2, 4)),
            "own_loops": draw(st.integers(1, 2)),
        }
        if specs["halting"]["type"] != "none" or fields["final_norm"] == "every_loop":
            specs["residual_streams"]["span"] = "part"
    if fields["kv_sharing"] != "none" or "core_num_key_value_heads" in fields:
        specs["depth_attention"] = {"type": "none"}
    if fields["embedding_size"] is not None or fields["hidden_size"] < 6:
        specs["ngram_embedding"] = {"type": "none"}
    if specs["value_embedding"]["type"] == "gated":
        stored = sum(fields[f"num_{part}_layers"] for part in ("prelude", "core", "coda"))
        layers = draw(st.sets(st.integers(0, stored - 1), min_size=1, max_size=2))
        specs["value_embedding"] |= {"layers": sorted(layers), "gate_channels": draw(st.integers(1, 3))}
    if fields.get("core_group_size") is not None:  # each group loops by itself
        specs |= {"injection": {"type": "none"}, "halting": {"type": "none"}}
    if fields.get("core_hidden_size", fields["hidden_size"]) != fields["hidden_size"]:  # maps in and out
        injection = {"type": draw(st.sampled_from(["concat", "diagonal"]))}
        specs |= {"injection": injection, "readout": {"type": "linear"}}
        if specs["state_init"]["type"] == "input":
            specs["state_init"] = {"type": "zeros"}
    if fields["final_norm"] == "every_loop" and {"core_group_size", "core_hidden_size"} & fields.keys():
        fields["final_norm"] = "after_loops"
    enters = any(STRATEGY_FIELDS[f][specs[f]["type"]].carries_prelude for f in ("injection", "state_init"))
    if not enters:
        specs["state_init"] = {"type": "input"}
    return specs


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> LoopedConfig:
    """Any valid config that the reference computes; `fixed` fields, of those without conditions, have these values."""
    fields = draw(shapes()) | {"prelude_norm": draw(st.booleans())}
    special = draw(st.sampled_from([None, None, "groups", "core_sizes"]))
    if special == "groups":
        fields["core_group_size"] = 1
    elif special == "core_sizes":
        fields |= draw(core_sizes())
    chosen = chosen_strategies(draw, fields)
    if fixed.get("add_cross_attention"):
        chosen["residual_streams"] = {"type": "none"}
    return tiny_config(**(fields | chosen | fixed))


@st.composite
def in_place_configs(draw: st.DrawFn) -> LoopedConfig:
    """Stacked models with a part in the middle that is looped in place: with one loop they are the stack."""
    chosen = draw(shapes()) | {"core_group_size": draw(st.sampled_from([None, 1]))}
    if chosen["final_norm"] in ("every_loop", "after_loops"):
        # one norm at the end, unless a coda or the second norm of `after_loops` follows it
        chosen |= {"final_norm": "every_loop", "num_coda_layers": 0, "stored_layer_types": None}
        chosen["core_group_size"] = None
    chosen |= {"injection": "none", "state_init": "input", "prelude_norm": False, "num_loops": 1}
    return tiny_config(**chosen, loop_update=draw(st.sampled_from(["replace", "damped"])))


def random_model(config: LoopedConfig) -> LoopedForCausalLM:
    """A model of this config with random values in every parameter, the same in every run."""
    torch.manual_seed(0)
    return randomise(LoopedForCausalLM(config)).eval()
