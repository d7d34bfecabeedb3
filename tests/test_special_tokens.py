"""Special tokens: config, generation config, tokenizer and chat template agree after a conversion."""

import pytest
from teachers import tiny_tokenizer
from transformers import GenerationConfig, LlamaConfig

from modeling_looped.conversion import align_special_tokens
from modeling_looped.conversion.special_tokens import end_of_turn

PAD, START, END, EOS = range(4)


def configs(config: dict, generation: dict) -> tuple[LlamaConfig, GenerationConfig]:
    """A Llama config of the tokenizer's size with no special tokens but those given."""
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(**{"vocab_size": 300, **none, **config}), GenerationConfig(**generation)


def ids(config) -> tuple:
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


def test_what_agrees_is_left_alone():
    agreed = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    config, generation = configs(agreed, agreed)
    assert align_special_tokens(config, generation, tiny_tokenizer()) == []
    assert ids(config) == ids(generation) == (START, END, PAD)


def test_a_chat_that_ends_with_another_token_than_the_config_says_stops():
    """What Ouro shipped: all three ids 0, while the chat template ends a turn with another token."""
    wrong = {"bos_token_id": PAD, "eos_token_id": PAD, "pad_token_id": PAD}
    config, generation = configs(wrong, wrong)
    tokenizer = tiny_tokenizer(bos_token="<pad>", eos_token="<pad>", pad_token="<pad>")
    lines = align_special_tokens(config, generation, tokenizer)
    assert config.eos_token_id == generation.eos_token_id == [PAD, END]
    assert "config: eos_token_id 0 -> [0, 2]" in lines
    assert any("'<pad>' both pads and ends a text" in line for line in lines)


def test_the_tokenizer_decides_about_bos_and_pad():
    config, generation = configs({"bos_token_id": EOS, "pad_token_id": EOS}, {"pad_token_id": END})
    align_special_tokens(config, generation, tiny_tokenizer())
    assert ids(config) == ids(generation) == (START, END, PAD)


def test_every_token_that_ends_a_text_is_kept():
    config, generation = configs({"eos_token_id": START}, {"eos_token_id": [EOS, 7]})
    align_special_tokens(config, generation, tiny_tokenizer(eos_token="<pad>"))
    assert (
        config.eos_token_id == generation.eos_token_id == [EOS, 7, PAD, END]
    )  # generate has never read config's START


def test_a_pad_token_that_only_the_config_knows_goes_to_the_tokenizer():
    config, generation = configs({"pad_token_id": EOS}, {})
    tokenizer = tiny_tokenizer(pad_token=None)
    lines = align_special_tokens(config, generation, tokenizer)
    assert tokenizer.pad_token == "<eos>"
    assert generation.pad_token_id == EOS
    assert "tokenizer: pad_token None -> '<eos>' (as in the config)" in lines


def test_minus_one_means_that_there_is_none():
    config, generation = configs({"pad_token_id": -1}, {"pad_token_id": -1})
    tokenizer = tiny_tokenizer(pad_token=None)
    align_special_tokens(config, generation, tokenizer)
    assert config.pad_token_id is generation.pad_token_id is tokenizer.pad_token_id is None


def test_a_tokenizer_without_bos_leaves_it_to_the_configs():
    config, generation = configs({"bos_token_id": EOS}, {})
    align_special_tokens(config, generation, tiny_tokenizer(bos_token=None))
    assert config.bos_token_id == generation.bos_token_id == EOS


def test_an_id_without_an_embedding_is_refused():
    config, generation = configs({"vocab_size": 3}, {"eos_token_id": EOS})
    with pytest.raises(ValueError, match="special token id 3 must be below vocab_size=3"):
        align_special_tokens(config, generation, tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, []),
        ("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}", [EOS]),
        ("{% for m in messages %}{{ m['content'] }} <|end|>\n{% endfor %}", [END]),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", []),
        ("{% for m in messages %}<|start|>{{ m['content'] }} and so on<|end|>{% endfor %}", []),
    ],
    ids=["no template", "at once", "after a space", "no token", "text in between"],
)
def test_the_end_of_a_turn_is_read_from_the_chat_template(template, found):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == found


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('a system message must come first') }}", "a system message must come first"),
        ("{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError"),
    ],
    ids=["it refuses", "it is cut short"],
)
def test_a_chat_template_that_cannot_be_rendered_is_named(template, named):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat_template cannot write a question and its answer: .*{named}"):
        align_special_tokens(*configs({}, {}), tokenizer)
