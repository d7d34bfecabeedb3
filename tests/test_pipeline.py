"""Transformers' pipelines on a looped model: text generation, classification, and fill-mask."""

import pytest
import torch
from helpers import assert_close, randomise, tiny_config, tiny_model
from training import SENTENCES, tiny_tokenizer
from transformers import pipeline

from modeling_looped import (
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer, to save a model into."""
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_loops", [None, 1, 5])
def test_text_generation_equals_generate(folder, num_loops):
    """One by one and in padded batches, at the default loop count and at another."""
    model, tokenizer = tiny_model(std=1.0), tiny_tokenizer()
    model.save_pretrained(folder)
    generator = pipeline("text-generation", model=str(folder))
    knob = {} if num_loops is None else {"num_loops": num_loops}
    settings = {"max_new_tokens": 6, "do_sample": False, **knob}
    expected = []
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, **settings)
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    for batch_size in (1, 4):
        texts = generator(SENTENCES, batch_size=batch_size, **settings)
        assert [text[0]["generated_text"] for text in texts] == expected
    assert type(generator.model) is type(model)


def test_text_generation_takes_a_chat(folder):
    tiny_model().save_pretrained(folder)
    chat = [{"role": "user", "content": "Hello."}]
    answer = pipeline("text-generation", model=str(folder))(chat, max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][:-1] == chat
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("is_causal", [True, False])
def test_text_classification_equals_the_models_probabilities(folder, is_causal):
    """Also in padded batches: a causal model reads the last real token of each row, a bidirectional one too."""
    model = randomise(LoopedForSequenceClassification(tiny_config(num_labels=3, is_causal=is_causal)), std=1.0).eval()
    model.save_pretrained(folder)
    classify, tokenizer = pipeline("text-classification", model=str(folder), top_k=None), tiny_tokenizer()
    for batch_size in (1, 4):
        for sentence, scores in zip(SENTENCES, classify(SENTENCES, batch_size=batch_size), strict=True):
            with torch.no_grad():
                logits = model(tokenizer(sentence, return_tensors="pt")["input_ids"]).logits[0]
            seen = {score["label"]: score["score"] for score in scores}
            assert_close(torch.tensor([seen[f"LABEL_{i}"] for i in range(3)]), logits.softmax(-1))


def test_token_classification_labels_every_token(folder):
    model = randomise(LoopedForTokenClassification(tiny_config(num_labels=3)), std=1.0).eval()
    model.save_pretrained(folder)
    found = pipeline("token-classification", model=str(folder), ignore_labels=[])(SENTENCES[0])
    with torch.no_grad():
        logits = model(tiny_tokenizer()(SENTENCES[0], return_tensors="pt")["input_ids"]).logits[0]
    assert [token["entity"] for token in found] == [f"LABEL_{label}" for label in logits.argmax(-1).tolist()]


def test_fill_mask_ranks_what_the_model_ranks(folder):
    model = randomise(LoopedForMaskedLM(tiny_config(is_causal=False)), std=1.0).eval()
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "@"
    tokenizer.save_pretrained(folder)
    best = pipeline("fill-mask", model=str(folder), tokenizer=tokenizer)("The c@t sat.")
    ids = tokenizer("The c@t sat.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(ids).logits[ids == tokenizer.mask_token_id].softmax(-1)
    assert [candidate["token"] for candidate in best] == probabilities[0].topk(5).indices.tolist()


def test_question_answering_head_is_found_by_its_auto_class(folder):
    from transformers import AutoModelForQuestionAnswering

    model = randomise(LoopedForQuestionAnswering(tiny_config())).eval()
    model.save_pretrained(folder)
    loaded = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    ids = tiny_tokenizer()(SENTENCES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).start_logits, model(ids).start_logits)
