"""The heads: sequence and token classification, question answering, masked language modelling, over one base model."""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from reference import reference_trace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from modeling_looped import (
    LoopedConfig,
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
    LoopedModel,
    LoopedPreTrainedModel,
)
from modeling_looped.outputs import LOOP_FIELDS, LoopFields

EQUAL = {"rtol": 1e-5, "atol": 1e-5}
NUM_LABELS = 5

#: Head -> its Auto class, and labels for a batch of 3 sequences of 7 tokens.
HEADS = {
    LoopedForSequenceClassification: (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 4, 2])}),
    LoopedForTokenClassification: (
        AutoModelForTokenClassification,
        {"labels": torch.arange(21).reshape(3, 7) % NUM_LABELS},
    ),
    LoopedForQuestionAnswering: (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 2, 6]), "end_positions": torch.tensor([1, 2, 6])},
    ),
    LoopedForMaskedLM: (AutoModelForMaskedLM, {"labels": random_tokens(3, 7, seed=3)}),
    LoopedForCausalLM: (AutoModelForCausalLM, {"labels": random_tokens(3, 7, seed=3)}),
}
#: Heads of either direction.
CLASSIFIERS = (LoopedForSequenceClassification, LoopedForTokenClassification, LoopedForQuestionAnswering)
#: The heads of Transformers whose scores and losses they have.
GENERIC = dict(
    zip(
        CLASSIFIERS,
        (GenericForSequenceClassification, GenericForTokenClassification, GenericForQuestionAnswering),
        strict=True,
    )
)
#: What the heads run over: the default, and an encoder's embeddings, norms and masked-language head.
SETTINGS = {"default": {}, "albert": VARIANTS["albert"] | {"mlm_head": "transform"}}
every_setting = pytest.mark.parametrize("settings", SETTINGS)
every_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
every_classifier = pytest.mark.parametrize("head", CLASSIFIERS, ids=lambda head: head.__name__)


def head_model(head: type[LoopedPreTrainedModel], **settings) -> LoopedPreTrainedModel:
    settings = {"is_causal": head is not LoopedForMaskedLM, "num_labels": NUM_LABELS} | settings
    return randomise(head(tiny_config(**settings))).eval()


def results(output) -> torch.Tensor:
    """A head's scores as one tensor."""
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


def base_output(model: LoopedPreTrainedModel, tokens: torch.Tensor, num_loops: int | None = None) -> torch.Tensor:
    """What the plain reference gives the head, [B, S, D]."""
    weights = dict(model.named_parameters())
    return torch.stack([reference_trace(weights, model.config, row, num_loops=num_loops).hidden for row in tokens])


@every_head
@pytest.mark.parametrize("num_loops", [None, 1, 5])
def test_the_loss_is_the_heads_definition_on_the_reference(head, num_loops):
    model, labels = head_model(head), HEADS[head][1]
    tokens = random_tokens(3, 7)
    output = model(tokens, num_loops=num_loops, **labels)
    hidden = base_output(model, tokens, num_loops)
    if head is LoopedForSequenceClassification:
        scores = model.score(hidden[:, -1])
        loss = F.cross_entropy(scores, labels["labels"])
    elif head is LoopedForTokenClassification:
        scores = model.score(hidden)
        loss = F.cross_entropy(scores.flatten(0, 1), labels["labels"].flatten())
    elif head is LoopedForQuestionAnswering:
        scores = model.qa_outputs(hidden)
        start, end = (
            F.cross_entropy(scores[..., i], labels[f"{side}_positions"]) for i, side in enumerate(("start", "end"))
        )
        loss = (start + end) / 2
    else:
        scores = hidden @ model.lm_head.weight.T
        predicted, targets = scores, labels["labels"]
        if head is LoopedForCausalLM:
            predicted, targets = scores[:, :-1], targets[:, 1:]
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(results(output), scores, **EQUAL)
    torch.testing.assert_close(output.loss, loss, **EQUAL)


@every_head
@every_setting
@pytest.mark.parametrize("num_loops", [1, 4])
def test_every_parameter_gets_a_gradient(head, settings, num_loops):
    model = head_model(head, **SETTINGS[settings]).train()
    model(random_tokens(3, 7), num_loops=num_loops, **HEADS[head][1]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.model.layers[1].self_attn.q_proj.weight.grad.any()


@every_head
def test_the_loop_count_passed_is_the_loop_count_configured(head):
    model, labels = head_model(head), HEADS[head][1]
    tokens = random_tokens(3, 7)
    passed = {k: model(tokens, num_loops=k, **labels) for k in (1, 2, 6)}
    for k, output in passed.items():
        model.config.num_loops = k
        configured = model(tokens, **labels)
        assert torch.equal(results(configured), results(output))
        assert torch.equal(configured.loss, output.loss)
    assert not torch.allclose(results(passed[1]), results(passed[6]))


@every_head
def test_another_models_word_for_the_loop_count_is_refused(head):
    with pytest.raises(TypeError, match=r"num_steps.*num_loops"):
        head_model(head)(random_tokens(3, 7), num_steps=2, **HEADS[head][1])


@every_head
@every_setting
def test_saved_and_loaded_through_its_auto_class_it_is_bit_equal(head, settings, tmp_path):
    model = head_model(head, **SETTINGS[settings])
    model.save_pretrained(tmp_path)
    loaded = HEADS[head][0].from_pretrained(tmp_path).eval()
    assert type(loaded) is head
    assert loaded.config.num_labels == NUM_LABELS
    state, back = model.state_dict(), loaded.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
    assert torch.equal(results(model(random_tokens(3, 7))), results(loaded(random_tokens(3, 7))))


@every_head
def test_every_head_reads_the_base_model_of_every_other(head, tmp_path):
    """A language model's checkpoint starts a classifier, and the other way round: only the head itself is new."""
    causal = head is not LoopedForMaskedLM
    base = randomise(LoopedModel(tiny_config(is_causal=causal))).eval()
    base.save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(not key.startswith("model.") for key in report["missing_keys"])
    tokens = random_tokens()
    expected = base(tokens).last_hidden_state
    assert torch.equal(loaded.eval().model(tokens).last_hidden_state, expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens).last_hidden_state, expected)


@every_head
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_found_and_replaced(head, tied):
    # the masked-language head's own layer, and its bias for every token, come along
    model = head_model(head, tie_word_embeddings=tied, mlm_head="transform" if tied else "linear")
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.resize_token_embeddings(101)
    assert model.model.embed_tokens.weight.shape[0] == model.config.vocab_size == 101
    if hasattr(model, "lm_head"):
        assert model.lm_head.weight.shape[0] == 101
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert results(model(torch.full((1, 3), 100))).isfinite().all()


def test_the_tables_of_value_embeddings_grow_with_the_vocabulary(tmp_path):
    model = tiny_model(**VARIANTS["parcae_code"])
    before = model(random_tokens()).logits
    model.resize_token_embeddings(101)
    torch.testing.assert_close(model(random_tokens()).logits[..., :97], before)
    assert model(torch.full((1, 3), 100)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(random_tokens()).logits, model(random_tokens()).logits)


@every_head
def test_token_types_reach_the_base_model_and_its_tables(head):
    """By name in the signature: the Trainer takes a column that no argument is called after out of the batch."""
    assert "token_type_ids" in inspect.signature(head.forward).parameters
    model, tokens = head_model(head, **SETTINGS["albert"]), random_tokens(3, 7)
    types = torch.ones_like(tokens)
    assert torch.equal(results(model(tokens, token_type_ids=0 * types)), results(model(tokens)))
    assert not torch.allclose(results(model(tokens, token_type_ids=types)), results(model(tokens)), atol=1e-2)


@every_head
def test_inputs_embeds_replace_the_tokens(head):
    model, tokens = head_model(head, embedding_scale=2.0), random_tokens(1, 7)
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(results(model(inputs_embeds=embeds)), results(model(tokens)))


@pytest.mark.parametrize("is_causal", [True, False])
@every_classifier
def test_a_classifier_sees_one_side_or_both_as_configured(head, is_causal):
    model, tokens = head_model(head, is_causal=is_causal), random_tokens(1, 7)
    changed = tokens.clone()
    changed[0, -1] = 3 + (tokens[0, -1] - 2) % 90
    first, second = (model.model(t).last_hidden_state[0, 0] for t in (tokens, changed))
    assert torch.allclose(first, second, atol=1e-6) is is_causal


def test_the_masked_model_sees_both_sides_and_predicts_in_place():
    model = head_model(LoopedForMaskedLM)
    tokens = random_tokens(1, 7)
    for changed_at, seen_at in ((6, 0), (0, 6)):
        changed = tokens.clone()
        changed[0, changed_at] = 3 + (tokens[0, changed_at] - 2) % 90
        assert not torch.allclose(model(tokens).logits[0, seen_at], model(changed).logits[0, seen_at], atol=1e-6)
    labels = torch.full_like(tokens, -100)
    labels[0, 3] = 42
    loss = F.cross_entropy(model(tokens).logits[:, 3], torch.tensor([42]))
    torch.testing.assert_close(model(tokens, labels=labels).loss, loss)


@pytest.mark.parametrize("use_cache", [None, True])
def test_a_bidirectional_model_never_makes_a_cache(use_cache):
    model = LoopedModel(tiny_config(is_causal=False)).eval()
    assert model(random_tokens(), use_cache=use_cache).past_key_values is None


def test_a_causal_head_refuses_a_bidirectional_config_and_says_which_head_fits():
    with pytest.raises(ValueError, match=r"is_causal=False.*needs is_causal=True.*LoopedForMaskedLM"):
        LoopedForCausalLM(tiny_config(is_causal=False))


def test_the_masked_head_refuses_a_causal_config():
    with pytest.raises(ValueError, match=r"is_causal=True.*LoopedForMaskedLM.*is_causal=False"):
        LoopedForMaskedLM(tiny_config())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("is_causal", "settings"), [(True, "default"), (False, "albert")])
@every_classifier
def test_padded_rows_are_classified_as_if_alone(head, is_causal, settings, side):
    model, tokens = head_model(head, is_causal=is_causal, **SETTINGS[settings]), random_tokens(1, 5)
    pads = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat((pads, tokens) if side == "left" else (tokens, pads), dim=1)
    batch = torch.cat((row, random_tokens(1, 8, seed=2)))
    padded = results(model(batch, attention_mask=(batch != 0).long()))[0]
    alone = results(model(tokens))[0]
    if head is not LoopedForSequenceClassification:
        padded = padded[row[0] != 0]
    torch.testing.assert_close(padded, alone, **EQUAL)


def test_answers_are_sought_among_all_positions_and_those_outside_are_ignored():
    model, tokens = head_model(LoopedForQuestionAnswering), random_tokens(2, 7)
    inside = model(tokens[:1], start_positions=torch.tensor([1]), end_positions=torch.tensor([3])).loss
    ends = {"start_positions": torch.tensor([1, 99]), "end_positions": torch.tensor([3, 99])}
    torch.testing.assert_close(model(tokens, num_loops=3, **ends).loss, inside)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), "multi_label_classification"),
    ],
)
def test_sequence_classification_chooses_its_loss_by_the_labels(num_labels, labels, problem):
    model, tokens = head_model(LoopedForSequenceClassification, num_labels=num_labels), random_tokens(3, 7)
    output = model(tokens, labels=labels, num_loops=2)
    losses = {
        "regression": lambda: F.mse_loss(output.logits.squeeze(), labels),
        "single_label_classification": lambda: F.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(output.logits, labels),
    }
    assert model.config.problem_type == problem
    torch.testing.assert_close(output.loss, losses[problem]())


def test_dropout_before_the_token_classifier_is_the_configured_one():
    model = head_model(LoopedForTokenClassification, classifier_dropout=0.5).train()
    assert model.dropout.p == 0.5
    tokens = random_tokens()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)


@every_head
def test_outputs_can_be_had_as_a_tuple(head):
    model, tokens = head_model(head), random_tokens(1, 5)
    first = model(tokens, return_dict=False)[0]
    output = model(tokens)
    assert torch.equal(first, output.start_logits if "start_logits" in output else output.logits)


@every_head
@pytest.mark.parametrize("case", ["gate", "depths"])
@torch.no_grad()
def test_what_the_base_model_says_of_its_loops_is_passed_on(head, case):
    model, tokens = head_model(head, halting="gate" if case == "gate" else "none"), random_tokens(3, 7)
    asked = {"output_loop_hidden_states": True, "num_loops": 2 if case == "gate" else torch.tensor([1, 3, 2])}
    output, base = model(tokens, **asked), model.model(tokens, **asked)
    expected = {"loop_hidden_states"} | ({"exit_loops", "exit_probabilities"} if case == "gate" else {"num_loops"})
    assert {name for name in LOOP_FIELDS if getattr(output, name) is not None} == expected
    assert len(output.loop_hidden_states) == (3 if case == "gate" else 4)
    for name in expected:
        torch.testing.assert_close(output[name], base[name], rtol=0, atol=0)


@every_head
def test_an_output_begins_as_transformers_own_and_the_trainer_ignores_the_rest(head):
    output = inspect.signature(head.forward).return_annotation
    _, own, stock, *_ = output.__mro__
    assert own is LoopFields
    names = [field.name for field in dataclasses.fields(output)]
    assert names == [*(field.name for field in dataclasses.fields(stock)), *LOOP_FIELDS]
    ignored = LoopedConfig.keys_to_ignore_at_inference
    assert {*LOOP_FIELDS} - {*ignored} == {"cross_attentions"}  # which has to be asked for, as attentions have


@every_classifier
@pytest.mark.parametrize("case", ["right", "left", "unpadded", "embeds"])
def test_scores_and_loss_are_those_of_transformers_generic_head(head, case):
    model, labels = head_model(head, halting="gate"), HEADS[head][1]
    tokens = random_tokens(3, 7)
    if case in ("left", "right"):
        tokens[1, slice(0, 3) if case == "left" else slice(4, 7)] = 0
    inputs = {"inputs_embeds": model.get_input_embeddings()(tokens)} if case == "embeds" else {"input_ids": tokens}
    inputs |= {"attention_mask": (tokens != 0).long(), "num_loops": 2, **labels}
    expected, output = GENERIC[head].forward(model, **inputs), model(**inputs)
    assert torch.equal(results(output), results(expected))
    assert torch.equal(output.loss, expected.loss)
    as_tuples = GENERIC[head].forward(model, **inputs, return_dict=False), model(**inputs, return_dict=False)
    assert len(as_tuples[1]) == len(as_tuples[0]) + 2
    for own, stock in zip(as_tuples[1], as_tuples[0], strict=False):
        if isinstance(stock, torch.Tensor):
            assert torch.equal(own, stock)


def test_several_rows_whose_ends_nothing_shows_are_refused():
    model = head_model(LoopedForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id=None with a batch of 2"):
        model(random_tokens(2, 7))
    assert model(random_tokens(1, 7)).logits.shape == (1, NUM_LABELS)


@every_head
def test_hidden_states_and_attentions_are_recorded_per_slot(head):
    model = head_model(head)
    model.set_attn_implementation("eager")
    for num_loops, slots in ((None, 8), (5, 12)):
        output = model(random_tokens(), num_loops=num_loops, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == slots + 1
        assert len(output.attentions) == slots
