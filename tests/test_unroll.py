"""Unrolling: the stock stacked model has the looped one's logits, or every option that prevents it is named."""

import copy
import re
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, assert_close, random_tokens, tiny_model
from peft import LoraConfig, get_peft_model
from teachers import LLAMA3, ROPE, TEACHERS, tiny_teacher

from modeling_looped.conversion import retrofit

#: A loop that does nothing but run its layers.
PLAIN: dict[str, Any] = {"injection": "none", "state_init": "input", "prelude_norm": False}
MIXED_WINDOWS = {
    "sliding_window": 4,
    "stored_layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
}

#: Name -> options beside PLAIN, and the family that says them.
UNROLLABLE: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "llama"),
    "stacked": ({"num_core_layers": 0, "num_prelude_layers": 3}, "llama"),
    "core alone": ({"num_prelude_layers": 0, "num_coda_layers": 0}, "llama"),
    "llama3 rope": ({"rope_parameters": LLAMA3}, "llama"),
    "all biases": ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "llama"),
    "output bias": ({"attention_output_bias": True}, "llama"),
    "query bias": ({"attention_bias": True}, "qwen2"),
    "query and key bias": ({"attention_bias": True, "attention_value_bias": False}, "qwen2"),
    "value bias": ({"attention_value_bias": True}, "qwen2"),
    "layers that loop by themselves": ({"core_group_size": 1, **MIXED_WINDOWS}, "qwen2"),
    "wide heads": ({"head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3}, "llama"),
    "heads that do not divide the width": ({"hidden_size": 36, "num_attention_heads": 8, "head_dim": 6}, "mistral"),
    "windows": ({"sliding_window": 4}, "mistral"),
    "windows by layer": (MIXED_WINDOWS, "qwen2"),
    "a window that no layer uses": ({"sliding_window": 4, "stored_layer_types": ["full_attention"] * 4}, "llama"),
    "norm per head": ({"qk_norm": "per_head"}, "qwen3"),
    "norm per head, output bias, windows": (
        {"qk_norm": "per_head", "attention_output_bias": True, **MIXED_WINDOWS},
        "qwen3",
    ),
    "post_branch": ({"qk_norm": "flat", "norm_placement": "post_branch", "attention_bias": True}, "olmo2"),
    "norms per loop": ({"loop_conditioning": "norms", "qk_norm": "per_head"}, "qwen3"),
    "fewer norms than loops": ({"loop_conditioning": {"type": "norms", "table_loops": 2}}, "llama"),
    "adapters": ({"loop_adapter": {"type": "lora", "rank": 3, "alpha": 5.0}}, "llama"),
    "some adapters": ({"loop_adapter": {"type": "lora", "rank": 2, "targets": ["v_proj", "down_proj"]}}, "llama"),
    "adapters and norms": ({"loop_adapter": {"type": "lora", "rank": 3}, "loop_conditioning": "norms"}, "llama"),
    "scales": ({"embedding_scale": 3.0, "logit_scale": 0.25}, "llama"),
    "scales of a tied head": ({"embedding_scale": 3.0, "logit_scale": 0.25, "tie_word_embeddings": True}, "llama"),
}


@pytest.mark.parametrize("name", UNROLLABLE)
@pytest.mark.parametrize("num_loops", [1, 3])
def test_the_unrolled_model_has_the_looped_models_logits(name, num_loops):
    options, family = UNROLLABLE[name]
    looped = tiny_model(std=1.0, **{**PLAIN, **options}).double()  # merged adapters round otherwise in fp32
    tokens = random_tokens(length=11)
    stacked = looped.unroll(num_loops)
    assert type(stacked).__module__.startswith("transformers.models.")
    assert stacked.config.model_type == family
    assert stacked.config.num_hidden_layers == looped.config.slot_layout(num_loops).num_slots
    assert_close(stacked(tokens).logits, looped(tokens, num_loops=num_loops).logits)


def test_each_loop_count_has_logits_of_its_own():
    """What the parity above compares differs between the loop counts by far more than it tolerates."""
    looped, tokens = tiny_model(std=1.0, **PLAIN), random_tokens()
    difference = looped(tokens, num_loops=3).logits - looped(tokens, num_loops=1).logits
    assert difference.abs().max() > 1000 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_retrofit_unrolls_into_its_teacher_bit_by_bit(name):
    teacher = tiny_teacher(name)
    back = retrofit(teacher, 2, 3, 1, 4).unroll(1, family=teacher.config.model_type)
    assert type(back) is type(teacher)
    assert back.state_dict().keys() == teacher.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in teacher.state_dict().items())
    tokens = random_tokens(length=11)
    assert torch.equal(back(tokens).logits, teacher(tokens).logits)


def test_the_config_decides_where_no_loop_count_is_given():
    looped = tiny_model(**PLAIN)
    looped.config.num_loops = 2
    assert looped.unroll().config.num_hidden_layers == 1 + 2 * 2 + 1


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_the_caller_may_choose_another_family_that_can_say_the_same(family):
    looped, tokens = tiny_model(std=1.0, **PLAIN), random_tokens()
    stacked = looped.unroll(2, family=family)
    assert stacked.config.model_type == family
    assert_close(stacked(tokens).logits, looped(tokens, num_loops=2).logits)


def test_generation_is_the_same_for_a_padded_batch():
    looped = tiny_model(std=1.0, **PLAIN)
    tokens, mask = random_tokens(length=9), torch.ones(2, 9, dtype=torch.int64)
    tokens[0, :4], mask[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = looped.generate(tokens, num_loops=2, **settings)
    assert torch.equal(looped.unroll(2).generate(tokens, **settings), expected)
    assert not torch.equal(looped.generate(tokens, num_loops=3, **settings), expected)


@pytest.mark.parametrize("name", ["plain", "adapters", "norms per loop", "scales of a tied head", "output bias"])
def test_the_dtype_is_kept(name):
    options, _ = UNROLLABLE[name]
    looped = tiny_model(**{**PLAIN, **options}).to(torch.bfloat16)
    stacked, tokens = looped.unroll(2), random_tokens()
    assert {parameter.dtype for parameter in stacked.parameters()} == {torch.bfloat16}
    assert stacked.model.rotary_emb.inv_freq.dtype == torch.float32
    assert_close(stacked(tokens).logits, looped(tokens, num_loops=2).logits, atol=TOLERANCE[torch.bfloat16])


def test_every_layer_has_weights_of_its_own():
    looped = tiny_model(**PLAIN)
    before = copy.deepcopy(looped.state_dict())
    stacked = looped.unroll(3)
    pointers = [parameter.data_ptr() for parameter in (*stacked.parameters(), *looped.parameters())]
    assert len(set(pointers)) == len(pointers)
    torch.nn.init.zeros_(stacked.model.layers[1].mlp.up_proj.weight)
    assert stacked.model.layers[3].mlp.up_proj.weight.abs().sum() > 0  # the same core layer, one loop later
    assert all(torch.equal(tensor, before[key]) for key, tensor in looped.state_dict().items())


def test_mode_attention_and_generation_defaults_come_along():
    looped = tiny_model(attn_implementation="eager", **PLAIN)
    looped.generation_config.max_new_tokens = 17
    looped.generation_config.num_loops = 2
    stacked = looped.train().unroll(1)
    assert stacked.training
    assert stacked.config._attn_implementation == "eager"
    assert stacked.generation_config.max_new_tokens == 17
    assert not hasattr(stacked.generation_config, "num_loops")
    assert looped.generation_config.num_loops == 2


def test_the_generator_of_random_numbers_is_left_alone():
    looped, state = tiny_model(**PLAIN), torch.get_rng_state()
    looped.unroll(3)
    assert torch.equal(torch.get_rng_state(), state)


#: Options beside PLAIN -> the fields that stand in the way of three loops.
BLOCKING: dict[str, tuple[dict[str, Any], set[str]]] = {
    "diagonal": ({"injection": "diagonal"}, {"injection"}),
    "add": ({"injection": "add"}, {"injection"}),
    "zeros": ({"injection": "add", "state_init": "zeros"}, {"injection", "state_init"}),
    "prelude_norm": ({"prelude_norm": True}, {"prelude_norm"}),
    "damped": ({"loop_update": "damped"}, {"loop_update"}),
    "gated": ({"loop_update": {"type": "gated", "free_loops": 2}}, {"loop_update"}),
    "embedding": ({"loop_conditioning": "embedding"}, {"loop_conditioning"}),
    "sinusoidal": ({"loop_conditioning": "sinusoidal"}, {"loop_conditioning"}),
    "halting": ({"halting": "state_change"}, {"halting"}),
    "readout": ({"readout": "linear"}, {"readout"}),
    "every_loop": ({"final_norm": "every_loop"}, {"final_norm"}),
    "after_loops": ({"final_norm": "after_loops"}, {"final_norm"}),
    "sandwich": ({"norm_placement": "sandwich"}, {"norm_placement"}),
    "post": ({"norm_placement": "post"}, {"norm_placement"}),
    "flat": ({"qk_norm": "flat"}, {"qk_norm"}),
    "plain MLP": ({"mlp_type": "plain"}, {"mlp_type"}),
    "capped": ({"final_logit_softcapping": 3.0}, {"final_logit_softcapping"}),
    "partial rope": ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, {"rope_parameters"}),
    "MLP bias with windows": ({"mlp_bias": True, "sliding_window": 4}, {"sliding_window"}),
    "tied and scaled to nothing": ({"tie_word_embeddings": True, "embedding_scale": 0.0}, {"embedding_scale"}),
    "final_norm none": ({"final_norm": "none"}, {"final_norm"}),
    "final_norm none in a stack": ({"num_core_layers": 0, "final_norm": "none"}, {"final_norm"}),
    "half_relu2": ({"hidden_act": "half_relu2"}, {"hidden_act"}),
    "value_embedding": ({"value_embedding": {"type": "gated", "gate_channels": 8}}, {"value_embedding"}),
    "depth_attention": ({"depth_attention": "anchors"}, {"depth_attention"}),
    "ngram_embedding": ({"ngram_embedding": "hashed"}, {"ngram_embedding"}),
    "residual_streams": ({"residual_streams": "mhc"}, {"residual_streams"}),
    "streams between loops": ({"residual_streams": "hyperloop"}, {"residual_streams"}),
    "residual_streams in a stack": ({"num_core_layers": 0, "residual_streams": "mhc"}, {"residual_streams"}),
    "core sizes": (
        {"core_intermediate_size": 40, "core_num_attention_heads": 6},
        {"core_intermediate_size", "core_num_attention_heads"},
    ),
    **{
        f"{field} {value}": ({field: value}, {field})
        for field, value in {
            "kv_sharing": "first_loop",
            "mlp_output_act": "relu",
            "qkv_clip": 1.0,
            "attention_gate": "per_channel",
            "norm_type": "layer",
            "position_embedding": "none",
            "embedding_size": 16,
            "embedding_norm": True,
            "type_vocab_size": 2,
            "schedule": "nested",
        }.items()
    },
    "unweighted norms": (
        {"norm_type": "rms_unweighted", "qk_norm": "per_head_unweighted"},
        {"norm_type", "qk_norm"},
    ),
    "everything": (
        {
            "injection": "diagonal",
            "state_init": "zeros",
            "prelude_norm": True,
            "loop_update": "damped",
            "loop_conditioning": "embedding",
            "halting": "gate",
            "readout": "linear",
            "final_norm": "after_loops",
            "norm_placement": "sandwich",
            "mlp_type": "plain",
            "final_logit_softcapping": 3.0,
        },
        {"injection", "state_init", "prelude_norm", "loop_update", "loop_conditioning", "halting", "readout"}
        | {"final_norm", "norm_placement", "mlp_type", "final_logit_softcapping"},
    ),
}


@pytest.mark.parametrize("name", BLOCKING)
def test_every_option_that_a_stack_cannot_do_is_named_with_its_value_and_no_other(name):
    options, fields = BLOCKING[name]
    looped = tiny_model(**{**PLAIN, **options})
    with pytest.raises(ValueError, match="num_loops=3: no stock stacked model computes this") as raised:
        looped.unroll(3)
    message = str(raised.value)
    assert set(re.findall(r"(?:: |; )(\w+)=", message)) == fields
    assert all(f"{field}={getattr(looped.config, field)!r} (" in message for field in fields)


@pytest.mark.parametrize(
    "options",
    [
        {"loop_update": "damped"},
        {"loop_update": {"type": "gated", "free_loops": 1}},
        {"halting": "act"},
        {"final_norm": "every_loop", "num_coda_layers": 0},
        {"kv_sharing": "first_loop"},
    ],
    ids=str,
)
def test_what_only_acts_between_loops_is_no_obstacle_to_one_loop(options):
    looped, tokens = tiny_model(std=1.0, **{**PLAIN, **options}), random_tokens()
    assert_close(looped.unroll(1)(tokens).logits, looped(tokens, num_loops=1).logits)
    with pytest.raises(ValueError, match=next(iter(options))):
        looped.unroll(2)


def test_a_chosen_family_that_cannot_say_it_is_refused_with_the_reason():
    looped = tiny_model(qk_norm="per_head", **PLAIN)
    with pytest.raises(ValueError, match=r"qk_norm='per_head' \(llama has 'none' built in\)"):
        looped.unroll(2, family="llama")
    with pytest.raises(ValueError, match="family='gpt2' must be one of: llama, mistral, qwen2, qwen3, olmo2"):
        looped.unroll(2, family="gpt2")


@pytest.mark.parametrize("num_loops", [0, -1, 1.5, True])
def test_a_loop_count_below_one_is_refused(num_loops):
    with pytest.raises(ValueError, match=r"num_loops=.* must be an integer of at least 1"):
        tiny_model(**PLAIN).unroll(num_loops)


def test_an_unmerged_peft_adapter_is_refused_by_its_keys_and_a_merged_one_unrolls():
    looped, tokens = tiny_model(**PLAIN), random_tokens()
    adapted = get_peft_model(looped, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight"):
        adapted.base_model.model.unroll(2)
    expected = adapted(tokens, num_loops=2).logits
    assert_close(adapted.merge_and_unload().unroll(2)(tokens).logits, expected)
