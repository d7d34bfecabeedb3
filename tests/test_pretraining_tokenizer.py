"""The tokenizer that a pretraining run trains, and the bytes that its tokens stand for."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from modeling_looped.training.data import Source, packed_with_bytes, token_bytes
from modeling_looped.training.tokenizer import END_OF_TEXT, PADDING, train_tokenizer, trained_tokenizer

TEXTS = ["The cat sat on the mat. ", "Naïve cats sat, 1234 of them!", "другой кот \u4f60\u597d \U0001f600"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 320, 64)


def test_it_is_the_same_for_the_same_text(tokenizer):
    again = train_tokenizer(iter(TEXTS), 320, 64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert 258 < len(tokenizer) <= 320


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_every_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    counts = token_bytes(text, [end for _, end in encoded["offset_mapping"]])
    assert counts.sum() == len(text.encode())
    assert (counts >= 0).all()


def test_bytes_are_those_of_each_token_where_none_splits_a_character(tokenizer):
    text = "The cat sat, naïve."
    encoded = tokenizer(text, return_offsets_mapping=True)
    counts = token_bytes(text, [end for _, end in encoded["offset_mapping"]]).tolist()
    assert counts[:3] == [len(tokenizer.decode([token]).encode()) for token in encoded["input_ids"][:3]]


def test_blocks_know_the_bytes_below_their_tokens(tokenizer):
    blocks = list(packed_with_bytes(iter(TEXTS), tokenizer, 8))
    ends = [bytes_ for block in blocks for token, bytes_ in block.T.tolist() if token == tokenizer.eos_token_id]
    assert ends
    assert not any(ends)
    text = "".join(TEXTS).encode()
    left_out = sum(len(tokenizer(t)["input_ids"]) + 1 for t in TEXTS) - 8 * len(blocks)
    assert len(text) - 16 * left_out <= sum(int(block[1].sum()) for block in blocks) <= len(text)


def test_special_tokens_are_no_text(tokenizer):
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT, END_OF_TEXT, PADDING)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer("a cat")["input_ids"] == tokenizer("a cat", add_special_tokens=False)["input_ids"]


def test_it_is_trained_once_and_another_one_is_refused(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    said: list[str] = []
    wanted = {"vocab_size": 300, "max_length": 64, "max_characters": 10_000}
    first = trained_tokenizer(tmp_path / "tokenizer", Source(str(file), seed=0), **wanted, report=said.append)
    second = trained_tokenizer(tmp_path / "tokenizer", Source(str(file), seed=0), **wanted, report=said.append)
    assert said == ["training a tokenizer of 300 tokens"]
    assert first.get_vocab() == second.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    with pytest.raises(ValueError, match=r"trained with vocab_size=300 \(here 400\)"):
        trained_tokenizer(tmp_path / "tokenizer", Source(str(file), seed=0), **{**wanted, "vocab_size": 400})
