"""Continuous batching on a paged cache gives each prompt the tokens it gets alone.

The paged paths never see `past_key_values`: they address the cache by `layer_idx` of the module that calls the
attention function. A layer that runs several times must therefore dispatch from one module per slot; otherwise the
passes overwrite each other's keys, and the tokens are wrong without an error. Transformers' own tests do not notice.
"""

import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_model
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from modeling_looped import LoopedForCausalLM

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
LENGTHS = (3, 11, 6)


def small_pages() -> ContinuousBatchingConfig:
    """Pages so small that prompts span several; without limits the cache would take 90 % of the machine's memory."""
    return ContinuousBatchingConfig(page_size=4, num_blocks=32, max_batch_tokens=32)


def prompts() -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]


def alone(model: LoopedForCausalLM, **kwargs) -> list[list[int]]:
    """Each prompt's greedy continuation in a `generate` call of its own."""
    return [model.generate(torch.tensor([p]), **GREEDY, **kwargs)[0, len(p) :].tolist() for p in prompts()]


def batched(model: LoopedForCausalLM, num_loops: int | None = None, in_config: int | None = None) -> list[list[int]]:
    """All prompts' continuations in one `generate_batch` call; `in_config` is the generation config's `num_loops`."""
    results = model.generate_batch(
        prompts(),
        GenerationConfig(**GREEDY, **({} if in_config is None else {"num_loops": in_config})),
        continuous_batching_config=small_pages(),
        warmup=False,
        num_loops=num_loops,
    ).values()
    assert [result.error for result in results] == [None] * len(LENGTHS)
    return [result.generated_tokens for result in results]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # eager becomes `paged|eager` while it runs
@pytest.mark.parametrize("variant", ["in_place", "sliding", "lora", "universal", "shared", "sequence", "parcae_code"])
def test_generate_batch_equals_generate_per_prompt(variant, attention):
    model = tiny_model(std=1.0, attn_implementation=attention, **VARIANTS[variant])
    assert batched(model) == alone(model)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("num_loops", [1, 5])
@pytest.mark.parametrize("variant", ["parcae", "sliding", "nanbeige", "mhc", "hyperloop", "depth_attention"])
def test_generate_batch_runs_the_loops_of_its_generation_config(variant, num_loops):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    expected = alone(model, num_loops=num_loops)
    assert expected != alone(model)
    assert batched(model, in_config=num_loops) == expected


def test_a_core_with_other_key_value_heads_is_refused_by_name():
    """Transformers' paged cache has one number of heads for all slots."""
    with pytest.raises(ValueError, match="core_num_key_value_heads=3"):
        batched(tiny_model(**VARIANTS["wide"]))


def test_paged_eager_asked_for_by_name_equals_eager():
    model = tiny_model(std=1.0, attn_implementation="eager")
    expected = alone(model)
    model.set_attn_implementation("paged|eager")
    assert batched(model) == expected


def test_every_way_to_set_the_loops_of_a_batch_gives_the_same_tokens():
    model = tiny_model(std=1.0)
    expected = alone(model, num_loops=2)
    assert batched(model, num_loops=2) == expected
    assert batched(model, num_loops=2, in_config=4) == expected, "the argument goes before the config"
    assert batched(model.with_num_loops(2)) == expected
    model.generation_config.num_loops = 2
    assert batched(model) == expected
    model.generation_config.num_loops = None
    model.config.num_loops = 2
    assert batched(model) == expected


@pytest.mark.parametrize("num_loops", [None, 2])
def test_generate_with_a_paged_cache_equals_generate(num_loops):
    model = tiny_model(std=1.0)
    model.generation_config.continuous_batching_config = small_pages()
    tokens = random_tokens(2, 7)
    paged = model.generate(tokens, cache_implementation="paged", num_loops=num_loops, **GREEDY)
    assert paged[0].tolist() == model.generate(tokens, num_loops=num_loops, **GREEDY).tolist()


def test_prompts_with_a_common_prefix_get_the_tokens_they_get_alone():
    model = tiny_model(std=1.0)
    prefix = random_tokens(1, 12)[0].tolist()
    texts = [[*prefix, token] for token in (5, 6, 7)]
    results = model.generate_batch(
        texts, GenerationConfig(**GREEDY), continuous_batching_config=small_pages(), warmup=False
    )
    expected = [model.generate(torch.tensor([text]), **GREEDY)[0, 13:].tolist() for text in texts]
    assert [result.generated_tokens for result in results.values()] == expected


def test_a_manager_kept_for_one_loop_count_does_not_serve_another():
    model = tiny_model(std=1.0)
    settings = {"continuous_batching_config": small_pages(), "warmup": False}
    try:
        model.generate_batch(prompts(), GenerationConfig(**GREEDY), persistent_manager=True, **settings)
        assert batched(model, num_loops=1) == alone(model, num_loops=1)
    finally:
        model.destroy_cached_continuous_batching_manager()


def test_a_dispatcher_shared_by_the_loops_would_give_other_tokens():
    """The mistake that this file is there to see: all passes of a layer addressing one slot, as `hrm_text` does."""
    model = tiny_model(std=1.0, **VARIANTS["in_place"])
    expected = alone(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention._slot_at = dict.fromkeys(attention._slot_at, attention.slots[0])
    assert batched(model) != expected


def test_another_models_word_for_the_loop_count_is_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match=r"num_steps.*num_loops"):
        model.generate_batch(prompts(), num_steps=3)
