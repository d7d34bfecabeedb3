"""`generate` in every mode gives the tokens of a model without a cache, at every loop count, for stock caches."""

import functools
from collections.abc import Iterator

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_model
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import QuantizedCache

KEY_VARIANTS = ("parcae", "concat", "in_place", "norms", "lora", "sliding", "universal", "shared", "parcae_code")

# eos_token_id=-1: nothing stops early, so that every comparison covers all the tokens
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": -1}
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
SAMPLING = {**GREEDY, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5}


def generated(model, tokens, **kwargs) -> list[list[int]]:
    torch.manual_seed(7)  # for the sampling modes
    return model.generate(tokens, **kwargs)[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("mode", [GREEDY, BEAMS, SAMPLING], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("variant", KEY_VARIANTS)
def test_cached_generation_equals_uncached(variant, mode):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    tokens = random_tokens(2, 7)
    of_loops = []
    for num_loops in (1, 4):
        uncached = generated(model, tokens, use_cache=False, num_loops=num_loops, **mode)
        for cache in ("dynamic", "static"):
            assert generated(model, tokens, cache_implementation=cache, num_loops=num_loops, **mode) == uncached
        of_loops.append(uncached)
    assert of_loops[0] != of_loops[1], "the loop count must matter for this test to mean anything"


@pytest.mark.parametrize("num_loops", [3, 5])
@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized"])
def test_the_cache_that_generate_makes_has_the_slots_of_the_call(cache, num_loops):
    model = tiny_model()
    settings = {"cache_config": {"backend": "hqq", "nbits": 8, "q_group_size": 16, "axis_key": 1, "axis_value": 1}}
    output = model.generate(
        random_tokens(),
        cache_implementation=cache,
        num_loops=num_loops,
        return_dict_in_generate=True,
        **(settings if cache == "quantized" else {}),
        **GREEDY,
    )
    made = output.past_key_values
    assert type(made) is {"dynamic": DynamicCache, "static": StaticCache, "quantized": QuantizedCache}[cache]
    assert len(made) == model.config.with_num_loops(num_loops).num_hidden_layers == 2 + 2 * num_loops
    assert made.is_initialized
    assert int(made.get_seq_length()) == 13  # the last token's keys are never needed
    assert model.config.num_hidden_layers == 8


@pytest.mark.parametrize("num_loops", [None, 2])
@pytest.mark.usefixtures("quanto_without_compiler")
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_generate_with_a_quantised_cache_equals_a_quantised_cache_passed_in(backend, num_loops):
    model = tiny_model(std=1.0)
    tokens = random_tokens(1, 8)
    settings = {"backend": backend, "q_group_size": 16, "axis_key": 0, "axis_value": 0}
    made_by_generate = generated(
        model, tokens, cache_implementation="quantized", cache_config=settings, num_loops=num_loops, **GREEDY
    )
    passed = QuantizedCache(config=model.config.with_num_loops(num_loops or 3), **settings)
    assert generated(model, tokens, past_key_values=passed, num_loops=num_loops, **GREEDY) == made_by_generate


@pytest.mark.parametrize("num_loops", [None, 2])
@pytest.mark.parametrize("variant", ["concat", "sliding", "shared"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_on_the_old_cache_equals_a_fresh_start(kind, variant, num_loops):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    config = model.config.with_num_loops(num_loops or 3)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
    text = random_tokens(2, 7)
    for turn in range(2):
        text = torch.cat((text, random_tokens(2, 4, seed=turn)), dim=1)
        fresh = model.generate(text, num_loops=num_loops, **GREEDY)
        text = model.generate(text, past_key_values=cache, num_loops=num_loops, **GREEDY)
        assert text.tolist() == fresh.tolist()


@pytest.mark.parametrize("num_loops", [None, 2])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("variant", ["concat", "sliding", "universal"])
def test_prefill_in_chunks_changes_no_token(variant, cache, num_loops):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    tokens = random_tokens(2, 13)
    padded = {"attention_mask": torch.tensor([[0] * 3 + [1] * 10, [1] * 13])}
    for mask in ({}, padded):
        whole = generated(model, tokens, num_loops=num_loops, **mask, **GREEDY)
        for size in (1, 5):
            chunked = generated(
                model,
                tokens,
                num_loops=num_loops,
                cache_implementation=cache,
                prefill_chunk_size=size,
                **mask,
                **GREEDY,
            )
            assert chunked == whole


@pytest.mark.parametrize(("variant", "attention"), [*((name, "sdpa") for name in KEY_VARIANTS), ("sliding", "eager")])
def test_left_padded_rows_continue_as_they_would_alone(variant, attention):
    model = tiny_model(std=1.0, attn_implementation=attention, **VARIANTS[variant])
    prompts = [random_tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
    alone = [generated(model, prompt[None], **GREEDY)[0] for prompt in prompts]
    for cache in ("dynamic", "static"):
        batch, mask = left_padded(prompts)
        assert generated(model, batch, attention_mask=mask, cache_implementation=cache, **GREEDY) == alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", [*KEY_VARIANTS, "huginn", "albert", "wide"])
@torch.no_grad()
def test_padding_on_either_side_leaves_a_rows_logits_alone(variant, attention):
    model = tiny_model(attn_implementation=attention, **VARIANTS[variant])
    prompts = [random_tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
    batch, mask = left_padded(prompts)
    left = model(batch, attention_mask=mask).logits
    right = model(batch.flip(1), attention_mask=mask.flip(1)).logits
    for row, prompt in enumerate(prompts):
        assert_close(left[row, -len(prompt) :], model(prompt[None]).logits[0])
        assert_close(right[row, : len(prompt)], model(prompt.flip(0)[None]).logits[0])


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts as one batch, and its attention mask."""
    longest = max(map(len, prompts))
    batch = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    return batch, mask


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_model_sharded_by_fsdp2_generates_at_any_loop_count(one_rank):
    model = tiny_model(std=1.0)
    tokens = random_tokens(2, 7)
    expected = {k: generated(model, tokens, num_loops=k, **GREEDY) for k in (1, 3, 5)}
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    assert {k: generated(model, tokens, num_loops=k, **GREEDY) for k in expected} == expected


def test_generation_from_embeddings_equals_generation_from_tokens():
    model = tiny_model(std=1.0)
    tokens = random_tokens(2, 7)
    embeds = model.get_input_embeddings()(tokens)
    assert model.generate(inputs_embeds=embeds, **GREEDY).tolist() == generated(model, tokens, **GREEDY)


def test_generation_from_embeddings_of_a_model_that_reads_the_tokens_again_is_refused():
    model, tokens = tiny_model(**VARIANTS["parcae_code"]), random_tokens(2, 7)
    embeds = model.get_input_embeddings()(tokens)
    for call in (model, functools.partial(model.generate, **GREEDY)):
        with pytest.raises(ValueError, match=r"value_embedding='gated' reads the token ids.*input_ids"):
            call(inputs_embeds=embeds)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_token_types_equals_generation_without_a_cache(cache):
    model = tiny_model(std=1.0, **VARIANTS["albert"])
    tokens, types = random_tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1]])
    cached = generated(model, tokens, token_type_ids=types, cache_implementation=cache, **GREEDY)
    assert cached == generated(model, tokens, token_type_ids=types, use_cache=False, **GREEDY)
    assert cached != generated(model, tokens, **GREEDY)


def test_more_tokens_than_learned_positions_are_refused_with_both_numbers():
    model = tiny_model(**{**VARIANTS["albert"], "max_position_embeddings": 8})
    model(random_tokens(1, 8))
    with pytest.raises(ValueError, match=r"position 8 .*max_position_embeddings=8.*'learned'"):
        model(random_tokens(1, 9))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_past_the_learned_positions_is_refused_with_both_numbers(cache):
    model = tiny_model(**{**VARIANTS["albert"], "max_position_embeddings": 8})
    # the last token's own position is never needed
    fitting = generated(model, random_tokens(1, 5), cache_implementation=cache, **GREEDY | {"max_new_tokens": 4})
    assert len(fitting[0]) == 4
    with pytest.raises(ValueError, match=r"position 8 .*max_position_embeddings=8.*'learned'"):
        model.generate(random_tokens(1, 5), cache_implementation=cache, **GREEDY)


def test_generation_stops_at_the_end_token():
    model = tiny_model(std=1.0)
    tokens = random_tokens(1, 7)
    free = generated(model, tokens, **GREEDY)[0]
    end = free[4]
    stopped = generated(model, tokens, **{**GREEDY, "eos_token_id": end})[0]
    assert stopped == free[: free.index(end) + 1]


# What drafts tokens must not change them: greedy assisted decoding is exact whatever the drafter.


@pytest.mark.parametrize("num_loops", [None, 5])
@pytest.mark.parametrize("variant", ["parcae", "sliding", "sequence", "shared"])
def test_assisted_decoding_equals_greedy(variant, num_loops):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    slots = model.config.num_hidden_layers
    llama = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    tokens = random_tokens(1, 7)
    alone = generated(model, tokens, num_loops=num_loops, **GREEDY)
    drafters = {
        "a smaller looped model": {"assistant_model": tiny_model(seed=1, num_core_layers=1, num_loops=2)},
        "itself with one loop": {"assistant_model": model.with_num_loops(1)},
        "itself with as many loops": {"assistant_model": model.with_num_loops(num_loops or 3)},
        "a stacked model": {"assistant_model": LlamaForCausalLM(llama).eval()},
        "the prompt": {"prompt_lookup_num_tokens": 3},
        "its first slots": {"assistant_early_exit": 2},
        "two of its loops": {"assistant_early_exit": 5},
        "more slots than it has": {"assistant_early_exit": 50},
    }
    for name, drafter in drafters.items():
        if variant == "shared" and "assistant_early_exit" in drafter:
            continue  # the next test
        assert generated(model, tokens, num_loops=num_loops, **drafter, **GREEDY) == alone, name
        assert model.config.num_hidden_layers == slots, name


@pytest.mark.parametrize("early_exit", [1, 3])
def test_early_exit_where_loops_share_keys_and_values_is_refused_with_what_to_do(early_exit):
    model, tokens = tiny_model(std=1.0, **VARIANTS["shared"]), random_tokens(1, 7)
    message = (
        rf"assistant_early_exit={early_exit} with kv_sharing='first_loop'.*assistant_model=model\.with_num_loops\(1\)"
    )
    expected = generated(model, tokens, **GREEDY)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, assistant_early_exit=early_exit, **GREEDY)
    assert model.config.num_hidden_layers == 4, "what the refused call has written must not stay"
    assert generated(model, tokens, **GREEDY) == expected


@pytest.mark.parametrize("where", ["argument", "generation config", "model's generation config"])
def test_a_drafter_keeps_its_own_loop_count(where):
    model = tiny_model(std=1.0)
    if where == "model's generation config":
        model.generation_config.num_loops = 4
    drafter = model.with_num_loops(1)
    loops = {"drafter": set(), "model": set()}
    for name, owner in (("drafter", drafter), ("model", model)):
        owner.model.layers[1].register_forward_hook(lambda _, args, __, name=name: loops[name].add(args[2]))
    kwargs = {
        "argument": {"num_loops": 4, **GREEDY},
        "generation config": {"generation_config": GenerationConfig(num_loops=4, **GREEDY)},
        "model's generation config": GREEDY,
    }[where]
    model.generate(random_tokens(1, 7), assistant_model=drafter, **kwargs)
    assert loops == {"drafter": {0}, "model": {0, 1, 2, 3}}


@pytest.mark.parametrize("num_loops", [None, 5])
@pytest.mark.parametrize("last_slot", range(1, 9))
@pytest.mark.parametrize("variant", ["parcae", "sequence"])
@torch.no_grad()
def test_early_exit_runs_the_first_slots_and_no_others(variant, last_slot, num_loops):
    model = tiny_model(**VARIANTS[variant])
    slots: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, __: slots.append(args[1]))
    model.config.num_hidden_layers = last_slot
    cache = model(random_tokens(), use_cache=True, num_loops=num_loops).past_key_values
    # 8 is the number of slots at the config's three loops, and so no early exit
    ran = 12 if (num_loops, last_slot) == (5, 8) else last_slot
    assert slots == list(range(ran))
    assert len(cache) == ran


def test_a_twin_shares_every_weight_and_no_setting():
    model = tiny_model()
    twin = model.with_num_loops(1)
    assert [id(weight) for weight in twin.parameters()] == [id(weight) for weight in model.parameters()]
    assert (twin.config.num_loops, model.config.num_loops) == (1, 3)
    tokens = random_tokens()
    with torch.no_grad():
        assert_close(twin(tokens).logits, model(tokens, num_loops=1).logits, atol=0)
        twin.set_attn_implementation("eager")
        assert model.config._attn_implementation == "sdpa"
        assert twin(tokens, output_attentions=True).attentions is not None
        assert_close(model(tokens).logits, model(tokens, num_loops=3).logits, atol=0)
