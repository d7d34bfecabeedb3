"""N-gram embeddings: what a token knows of those before it, on every path by which those can get lost.

The hash is compared with the one in `reference.py` in `test_reference_parity.py` and on random configurations.
"""

import copy
import pickle

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, stepwise_logits, tiny_model
from test_published_variants import NANBEIGE, convert, fields_of, random_published
from transformers import DynamicCache, StaticCache

from modeling_looped import LoopedForCausalLM
from modeling_looped.conversion.published.nanbeige import next_prime

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> LoopedForCausalLM:
    return tiny_model(std=1.0, **VARIANTS["ngrams"])


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Two rows, the first with the boundary token in its middle."""
    rows = random_tokens(2, 9)
    rows[0, 4] = VARIANTS["ngrams"]["ngram_embedding"]["boundary_token_id"]
    return rows


@torch.no_grad()
def test_a_token_reads_as_many_before_it_as_the_longest_n_gram_has(model, tokens):
    embedding, nowhere = model.model.ngram_embedding, torch.zeros(1, 9, 32)
    places = torch.arange(9)[None]
    row = tokens[1:]
    before = embedding(nowhere, row, None, places)
    for changed in range(9):
        other = row.clone()
        other[0, changed] = 96 if row[0, changed] != 96 else 95
        differs = (embedding(nowhere, other, None, places) != before).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == [i for i in range(changed, changed + 3) if i < 9]


@torch.no_grad()
def test_nothing_is_seen_across_a_boundary_but_the_boundary_itself_sees_back(model, tokens):
    logits = model.model.ngram_embedding.hashes(tokens[:1], None, torch.arange(9)[None])
    behind = model.model.ngram_embedding.hashes(tokens[:1, 5:], None, torch.arange(4)[None])
    assert all(torch.equal(whole[:, 5:], alone) for whole, alone in zip(logits, behind, strict=True))
    boundary = model.model.ngram_embedding.hashes(tokens[:1, 4:5], None, torch.arange(1)[None])
    assert any(not torch.equal(whole[:, 4:5], alone) for whole, alone in zip(logits, boundary, strict=True))


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model, tokens):
    packed = torch.cat((tokens[:1], tokens[1:]), dim=1)
    positions = torch.arange(9).repeat(2)[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    assert_close(together, torch.cat([model(row[None]).logits for row in tokens], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,), (4, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_by_hand_need_no_tokens_given(model, tokens, chunks, kind):
    made = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config=config, max_cache_len=12)}
    assert_close(stepwise_logits(model, tokens, made[kind](config=model.config), chunks), model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
        {"num_loops": 5},
    ],
    ids=str,
)
def test_generation_equals_generation_without_a_cache(model, tokens, options):
    expected = model.generate(tokens, use_cache=False, **GREEDY, **{
        name: value for name, value in options.items() if name in ("num_beams", "num_loops")
    })  # fmt: skip
    assert torch.equal(model.generate(tokens, **GREEDY, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
def test_a_left_padded_row_generates_what_it_does_alone(model, tokens, options):
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    padded[0, 3:], mask[0, 3:] = tokens[0], 1
    padded[1], mask[1] = random_tokens(1, 12)[0], 1
    together = model.generate(padded, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(together[0, 3:], model.generate(tokens[:1], **GREEDY)[0])
    assert torch.equal(together[1], model.generate(padded[1:], **GREEDY)[0])


@torch.no_grad()
def test_assisted_and_prompt_lookup_decoding_equal_plain(model, tokens):
    row = tokens[:1]
    plain = model.generate(row, **GREEDY)
    assert torch.equal(model.generate(row, prompt_lookup_num_tokens=2, **GREEDY), plain)
    assert torch.equal(model.generate(row, assistant_model=model.with_num_loops(1), **GREEDY), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 1])),
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
    ],
    ids=["reordered", "cropped", "repeated", "selected", "copied", "pickled"],
)
def test_a_cache_that_changed_hands_is_refused_until_the_tokens_are_given(model, tokens, change):
    cache = model(tokens, use_cache=True).past_key_values
    cache = change(cache) or cache
    rows = cache.layers[0].keys.shape[0]
    step = tokens[:1, :1].expand(rows, -1)
    with pytest.raises(ValueError, match=r"ngram_embedding='hashed' hashes the 2 tokens .* pass previous_input_ids"):
        model(step, past_key_values=cache)
    model(step, past_key_values=cache, previous_input_ids=tokens[:1, -2:].expand(rows, -1))
    model(step, past_key_values=cache)  # known again


@torch.no_grad()
def test_given_tokens_are_those_that_count(model, tokens):
    whole = model(tokens).logits
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    step = model(tokens.flip(0)[:, 6:], past_key_values=cache, previous_input_ids=tokens.flip(0)[:, :6])
    assert_close(step.logits, whole.flip(0)[:, 6:])


@pytest.mark.slow
@torch.no_grad()
def test_a_step_on_a_static_cache_is_one_graph():
    model = tiny_model(num_core_layers=1, num_coda_layers=0, num_loops=1, **VARIANTS["ngrams"])
    tokens = random_tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(tokens[:, :6], past_key_values=cache)
    step = compiled(
        tokens[:, 6:], past_key_values=cache, previous_input_ids=tokens[:, 4:6], position_ids=torch.tensor([[6]])
    )
    assert_close(step.logits, model(tokens).logits[:, 6:])


def test_what_has_no_token_ids_is_refused(model, tokens):
    embeds = model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match=r"ngram_embedding='hashed' reads the token ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"ngram_embedding='hashed': continuous batching"):
        model.generate_batch(tokens.tolist())


NGRAMS = {"emb_neighbor_num": 3, "emb_split_num": 1, "ngram_vocab_size_ratio": 0.4, "emb_tp_num": 8}


def test_nanbeige_concatenated_tables_come_in_and_go_back_in_every_bit(tmp_path):
    config = {**NANBEIGE, **NGRAMS, "ngram_fused_mode": "concat", "eos_token_id": None}
    state = random_published("nanbeige", config, [])
    state["model.ngram_embeddings.word_embeddings.weight"] = state["model.embed_tokens.weight"].clone()
    assert state["model.ngram_embeddings.embedders.0.weight"].shape == (56, 32)
    looped = convert(config, state, tmp_path)
    # 0.4 * 128 = 51.2, and the odd numbers counted from it that their code takes
    assert looped.config.ngram_embedding["table_sizes"] == [52, 54]
    assert looped.config.ngram_embedding["boundary_token_id"] is None


def test_nanbeige_prime_moduli_follow_each_other():
    config = fields_of("nanbeige", {**NANBEIGE, **NGRAMS, "ngram_mod_force_prime": True}, [])
    assert (config.ngram_embedding["table_sizes"], config.ngram_embedding["hash_base"]) == ([53, 59], 131)
    assert [next_prime(n) for n in (0, 1, 2, 3, 13, 24)] == [2, 2, 3, 5, 17, 29]
