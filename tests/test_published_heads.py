"""ALBERT's classifiers and the bidirectional Universal Transformer: the class that each checkpoint becomes."""

import json

import pytest
import torch
from fixtures.published import SETTINGS, described, published_folder
from helpers import assert_close, randomise
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)

import modeling_looped
from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM
from modeling_looped.conversion import export_checkpoint, import_checkpoint

HEADS = (
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertForQuestionAnswering,
)


def albert(head, **settings):
    config = AlbertConfig(
        vocab_size=97,
        embedding_size=12,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=4,
        max_position_embeddings=64,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
        **settings,
    )
    return randomise(head(config), std=1.0).eval()


def numbers(output) -> torch.Tensor:
    return output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), dim=-1)


@pytest.mark.parametrize("groups", [{"num_hidden_groups": 1, "inner_group_num": 2}, {"num_hidden_groups": 2}])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_every_albert_head_computes_what_transformers_does(head, groups, tmp_path):
    stock = albert(head, **groups)
    stock.save_pretrained(tmp_path / "stock")
    import_checkpoint(str(tmp_path / "stock"), tmp_path / "looped")
    name = json.loads((tmp_path / "looped" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    assert name == head.__name__.replace("Albert", "Looped")
    looped = getattr(modeling_looped, name).from_pretrained(tmp_path / "looped").eval()
    assert looped.config.id2label == {0: "no", 1: "yes"}
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    types, mask = (torch.arange(9) > 4).long().expand(2, 9), torch.ones_like(tokens)
    mask[1, 6:] = 0
    kept = mask.bool() if numbers(stock(tokens)).ndim == 3 else ...
    expected = numbers(stock(tokens, attention_mask=mask, token_type_ids=types))
    assert_close(numbers(looped(tokens, attention_mask=mask, token_type_ids=types))[kept], expected[kept])
    export_checkpoint(tmp_path / "looped", tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_a_left_padded_sequence_is_classified_as_alone(tmp_path):
    """The original reads position 0, padding or not."""
    stock = albert(AlbertForSequenceClassification)
    stock.save_pretrained(tmp_path / "stock")
    import_checkpoint(str(tmp_path / "stock"), tmp_path / "looped")
    looped = modeling_looped.LoopedForSequenceClassification.from_pretrained(tmp_path / "looped").eval()
    tokens = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(0))
    padded, mask = (torch.nn.functional.pad(each, (3, 0)) for each in (tokens, torch.ones_like(tokens)))
    assert_close(looped(padded, attention_mask=mask).logits, stock(tokens).logits)


def test_a_class_of_albert_that_has_no_counterpart_is_named(tmp_path):
    folder = tmp_path / "stock"
    albert(AlbertForMaskedLM).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AlbertForMultipleChoice"]}))
    with pytest.raises(ValueError, match=r"AlbertForMultipleChoice.*must be one of: AlbertForMaskedLM"):
        import_checkpoint(str(folder), tmp_path / "looped")


@torch.no_grad()
def test_the_universal_transformer_without_a_mask_sees_both_sides(tmp_path):
    """The weights are the causal fixture's; only the mask differs, so the last token's logits stay and others move."""
    source = published_folder("ut_act", tmp_path / "published")
    models = {}
    for use_mask in (True, False):
        folder = tmp_path / str(use_mask)
        import_checkpoint(str(source), folder, settings={**SETTINGS["ut_act"], "use_mask": use_mask, "num_layers": 1})
        models[use_mask] = (LoopedForCausalLM if use_mask else LoopedForMaskedLM).from_pretrained(folder).eval()
    tokens = torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(0))
    causal, both = (models[use_mask](tokens).logits for use_mask in (True, False))
    assert_close(both[:, -1], causal[:, -1])  # one loop: the last token attends to all of them either way
    assert (both[:, 0] - causal[:, 0]).abs().max() > 1e-2
    assert described("ut_act")["run"]["leak"] == 0
