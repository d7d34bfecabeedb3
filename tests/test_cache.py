"""A cache gives the logits of a forward without one: token by token, in chunks, cropped, reordered, reused."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, assert_close, random_tokens, stepwise_logits, tiny_model
from transformers import Cache, DynamicCache, StaticCache

import modeling_looped
from modeling_looped import LoopedConfig

LOOPS = (1, 4)
PROMPTS = (1, 7, 64)

CACHES: dict[str, Callable[[LoopedConfig], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic_without_config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=80),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_steps_equal_uncached(variant):
    model = tiny_model(**VARIANTS[variant])
    for kind, make_cache in CACHES.items():
        for num_loops in LOOPS:
            for prompt in PROMPTS if kind == "dynamic" else PROMPTS[1:2]:
                tokens = random_tokens(2, prompt + 4, seed=prompt)
                expected = model(tokens, use_cache=False, num_loops=num_loops).logits
                cache = make_cache(model.config.with_num_loops(num_loops))
                assert_close(stepwise_logits(model, tokens, cache, [prompt], num_loops=num_loops), expected)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("num_loops", LOOPS)
@pytest.mark.parametrize("variant", ["sliding", "lora", "nanbeige"])
@torch.no_grad()
def test_static_cached_steps_equal_uncached(variant, num_loops, prompt):
    model = tiny_model(num_loops=num_loops, **VARIANTS[variant])
    tokens = random_tokens(2, prompt + 6)
    cache = StaticCache(config=model.config, max_cache_len=80)
    assert_close(stepwise_logits(model, tokens, cache, [prompt]), model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("mask_length", ["seen", "cache"])
@pytest.mark.parametrize("variant", ["parcae", "huginn", "universal", "albert", "ngrams", "sliding", "routed"])
@torch.no_grad()
def test_left_padded_rows_on_a_static_cache_are_as_if_alone(variant, mask_length):
    """Positions come from the mask, whether it ends with the call's tokens or is as long as the cache."""
    settings = {"halting": "token_choice"} if variant == "routed" else VARIANTS[variant]
    model = tiny_model(std=1.0, **settings)
    tokens = random_tokens(2, 9)
    expected = torch.cat((model(tokens[:1]).logits[:, 3:], model(tokens[1:, 3:]).logits))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    cache = StaticCache(config=model.config, max_cache_len=12)
    logits = []
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        so_far = F.pad(mask, (0, 3)) if mask_length == "cache" else mask[:, :end]
        logits.append(model(tokens[:, begin:end], attention_mask=so_far, past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1)[:, 3:], expected, atol=1e-3)


@torch.no_grad()
def test_positions_on_a_static_cache_need_no_look_at_the_device():
    """So that a compiled step can find them."""
    model = tiny_model(**VARIANTS["universal"])
    tokens, mask = random_tokens(2, 9), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(tokens[:, :6], attention_mask=mask, past_key_values=cache)
        results.append(run(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits)
    assert_close(results[1], results[0])


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("variant", ["concat", "sliding", "halting_act", "shared", "universal", "wide"])
@torch.no_grad()
def test_chunked_prefill_equals_one_piece(variant, make_cache):
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(2, 20)
    expected = model(tokens, use_cache=False).logits
    for chunks in ([5, 5, 5], [3, 1, 9], [2] * 10):
        assert_close(stepwise_logits(model, tokens, make_cache(model.config), chunks), expected)


@pytest.mark.parametrize("num_loops", [1, 2, 3, 5])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_every_slot_of_the_config_is_filled_and_there_are_no_others(make_cache, num_loops):
    model = tiny_model(num_loops=num_loops)
    cache = make_cache(model.config)
    model(random_tokens(2, 7), past_key_values=cache)
    assert len(cache) == model.config.num_hidden_layers == 1 + 2 * num_loops + 1
    assert cache.is_initialized
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [7] * len(cache)


@pytest.mark.parametrize("num_loops", [1, 3, 5])
@torch.no_grad()
def test_the_cache_that_forward_makes_has_the_slots_of_the_call(num_loops):
    model = tiny_model()
    cache = model(random_tokens(), use_cache=True, num_loops=num_loops).past_key_values
    assert type(cache) is DynamicCache
    assert len(cache) == 1 + 2 * num_loops + 1
    assert model.config.num_hidden_layers == 8


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_where_loops_share_the_cache_holds_one_slot_per_stored_layer_and_as_many_bytes(make_cache):
    model = tiny_model(**VARIANTS["shared"])
    assert model.config.num_hidden_layers == model.config.num_stored_layers == 4
    held = {}
    for num_loops in (1, 3, 5):
        cache = make_cache(model.config.with_num_loops(num_loops))
        model(random_tokens(2, 7), past_key_values=cache, num_loops=num_loops)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [7] * 4
        held[num_loops] = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    length = cache.layers[0].keys.shape[-2]
    slots, keys_and_values, rows, heads, channels, bytes_each = 4, 2, 2, 2, 8, 4
    assert set(held.values()) == {slots * keys_and_values * rows * heads * length * channels * bytes_each}


@torch.no_grad()
def test_the_shared_keys_and_values_are_those_of_the_first_loop():
    """The later loops' own would be others; a cache of one loop holds the same in the core as one of five."""
    model, tokens = tiny_model(std=1.0, **VARIANTS["nanbeige"]), random_tokens()
    one, five = (model(tokens, use_cache=True, num_loops=k).past_key_values for k in (1, 5))
    for layer in (0, 1, 2):
        assert torch.equal(one.layers[layer].keys, five.layers[layer].keys)
        assert torch.equal(one.layers[layer].values, five.layers[layer].values)
    assert (one.layers[3].keys - five.layers[3].keys).abs().max() > 0.1, "the coda reads another state"
    unshared = tiny_model(std=1.0, **{**VARIANTS["nanbeige"], "kv_sharing": "none"})
    unshared.load_state_dict(model.state_dict())
    assert_close(unshared(tokens, num_loops=1).logits, model(tokens, num_loops=1).logits, atol=0)
    assert (unshared(tokens, num_loops=2).logits - model(tokens, num_loops=2).logits).abs().max() > 0.1


@torch.no_grad()
def test_loops_keep_different_keys():
    """One slot per loop is not a formality: the shared layer's keys differ in every loop."""
    model = tiny_model(std=1.0)
    cache = model(random_tokens(), use_cache=True).past_key_values
    first, second, third = (cache.layers[model.config.slot_of(loop, 1)].keys for loop in range(3))
    assert (first - second).abs().max() > 0.1
    assert (second - third).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["concat", "lora", "shared"])
@torch.no_grad()
def test_a_cropped_cache_continues_as_if_the_tokens_had_not_been(variant):
    model = tiny_model(**VARIANTS[variant])
    kept, wrong, right = random_tokens(2, 9), random_tokens(2, 4, seed=1), random_tokens(2, 5, seed=2)
    cache = DynamicCache(config=model.config)
    model(torch.cat((kept, wrong), dim=1), past_key_values=cache)
    cache.crop(-4)
    logits = model(right, past_key_values=cache).logits
    assert_close(logits, model(torch.cat((kept, right), dim=1), use_cache=False).logits[:, 9:])


@torch.no_grad()
def test_a_cropped_sliding_cache_continues_as_if_the_tokens_had_not_been():
    model = tiny_model(**VARIANTS["sliding"])
    kept, wrong, right = random_tokens(2, 9), random_tokens(2, 3, seed=1), random_tokens(2, 5, seed=2)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(torch.cat((kept, wrong), dim=1), past_key_values=cache)
    cache.crop(-3)
    logits = model(right, past_key_values=cache).logits
    assert_close(logits, model(torch.cat((kept, right), dim=1), use_cache=False).logits[:, 9:])


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_reordered_rows_continue_their_own_text(make_cache):
    model = tiny_model()
    prompt, rest = random_tokens(3, 7), random_tokens(3, 2, seed=1)
    order = torch.tensor([2, 0, 0])
    cache = make_cache(model.config)
    model(prompt, past_key_values=cache)
    cache.reorder_cache(order)
    expected = model(torch.cat((prompt[order], rest), dim=1), use_cache=False).logits[:, 7:]
    assert_close(model(rest, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_repeated_and_selected_rows_continue_their_own_text():
    model = tiny_model()
    prompt, rest = random_tokens(2, 7), random_tokens(3, 2, seed=1)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    expected = model(torch.cat((prompt[[0, 0, 1]], rest), dim=1), use_cache=False).logits[:, 7:]
    assert_close(model(rest, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_a_reset_cache_starts_afresh(make_cache):
    model = tiny_model(**VARIANTS["sliding"])
    cache = make_cache(model.config)
    model(random_tokens(2, 9, seed=1), past_key_values=cache)
    cache.reset()
    tokens = random_tokens(2, 7)
    assert_close(stepwise_logits(model, tokens, cache, [3]), model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_a_cache_rebuilt_from_its_tensors_continues_the_text():
    """What DataParallel and prefix tuning do: a cache made from (keys, values) pairs, one per slot."""
    model = tiny_model()
    tokens = random_tokens(2, 9)
    filled = model(tokens[:, :6], use_cache=True).past_key_values
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in filled.layers])
    assert_close(model(tokens[:, 6:], past_key_values=rebuilt).logits, model(tokens, use_cache=False).logits[:, 6:])


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_a_cache_of_another_loop_count_is_refused(make_cache):
    model = tiny_model()
    cache = make_cache(model.config)
    model(random_tokens(), past_key_values=cache)
    for num_loops in (1, 2, 4):
        with pytest.raises(ValueError, match=f"num_loops={num_loops} needs a cache of {2 + 2 * num_loops} slots"):
            model(random_tokens(2, 1), past_key_values=cache, num_loops=num_loops)
    model(random_tokens(2, 1), past_key_values=cache, num_loops=3)
    assert int(cache.get_seq_length()) == 8, "a refused call must not have written to the cache"


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_where_loops_share_a_cache_of_another_loop_count_is_refused_too(make_cache):
    """Its slots are as many at every loop count, but the coda's keys are not the same."""
    model = tiny_model(**VARIANTS["shared"])
    cache = make_cache(model.config)
    model(random_tokens(), past_key_values=cache)
    for num_loops in (1, 4):
        with pytest.raises(ValueError, match=f"num_loops={num_loops} with a cache that num_loops=3 filled"):
            model(random_tokens(2, 1), past_key_values=cache, num_loops=num_loops)
    model(random_tokens(2, 1), past_key_values=cache, num_loops=3)
    assert int(cache.get_seq_length()) == 8, "a refused call must not have written to the cache"
    cache.reset()
    tokens = random_tokens(2, 7, seed=1)
    expected = model(tokens, use_cache=False, num_loops=4).logits
    assert_close(stepwise_logits(model, tokens, cache, [4], num_loops=4), expected)


def test_the_package_defines_no_cache_class():
    for file in Path(modeling_looped.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert not any("Cache" in base for base in bases), f"{file.name}: {node.name}"
