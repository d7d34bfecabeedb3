"""Model cards: what they say comes from the files, and their metadata survive the Hub's own reader."""

import math
from pathlib import Path

import pytest
from helpers import random_tokens
from huggingface_hub import ModelCard, metadata_load
from teachers import tiny_teacher

from modeling_looped.conversion.compress import compress
from modeling_looped.conversion.layer_plan import LayerPlan
from modeling_looped.reporting.card import TEMPLATE, CardFields, card_data, model_card
from modeling_looped.reporting.layer_map import LayerMap
from modeling_looped.reporting.report import measure, write_report
from modeling_looped.reporting.run_log import Curve, RunLog, read_json

FIELDS = CardFields(
    license="apache-2.0", repo_id="someone/small", base_model="HuggingFaceTB/SmolLM2-135M", language=("en",)
)
MANIFEST = {
    "made_by": "modeling_looped.conversion.compress",
    "date": "2026-11-24",
    "source": {"revision": "abc123", "sha256": {"model.safetensors": "f00d"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A compressed model, the figures of its report, and its layer map."""
    plan = LayerPlan((0,), ((1, 2), (2, 3)), (5,))
    model = compress(tiny_teacher("llama"), plan).model.eval()
    run = RunLog("tokens", {"training": Curve([10.0, 20.0], [5.0, 4.0])}, {"learning_rate": 3e-4}, 1e9, 2)
    folder = tmp_path_factory.mktemp("report")
    report = measure(model, {"Held-out text": [random_tokens(1, 9)]}, loops=[1, 2], context=16, run=run)
    write_report(report, model, folder, name="small")
    return model.config, read_json(folder / "report.json"), LayerMap(((0,), (1, 2), (2, 3), (5,)), 6, (4,))


def test_a_card_reads_back_as_what_it_was_made_from(made, tmp_path):
    config, figures, layers = made
    card = model_card(config, figures, FIELDS, manifest=MANIFEST, layers=layers)
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card_data(figures, FIELDS).to_dict() == metadata_load(tmp_path / "README.md")
    assert str(loaded) == str(card)
    assert loaded.data.base_model_relation == "finetune"
    for result, loops in zip(loaded.data.eval_results, (1, 2), strict=True):
        assert result.metric_args == {"num_loops": loops}
        assert result.metric_value == pytest.approx(math.exp(figures["losses"]["Held-out text"][str(loops)]), rel=1e-4)


def test_a_card_says_where_the_weights_come_from_what_loops_and_what_it_costs(made):
    config, figures, layers = made
    text = model_card(config, figures, FIELDS, manifest=MANIFEST, layers=layers).text
    for expected in (
        "| core | 1 | 1 in loop 1, 2 in loop 2 | 2 |",
        "Teacher layers that nothing stands for: 4.",
        "| revision | `abc123` |",
        "| SHA-256 of model.safetensors | `f00d` |",
        "Which loop counts were trained was not recorded.",
        'model = AutoModelForCausalLM.from_pretrained("someone/small", trust_remote_code=True)',
        "num_loops=2)",
        f"{figures['costs'][1]['kv_bytes_per_token']:,}",
        "2 optimiser steps, 20 tokens; last losses in nats per token: training 4.000.",
        '"learning_rate": 0.0003',
    ):
        assert expected in text
    trained = model_card(config, figures, FIELDS._replace(trained_loops="1-4")).text
    assert "Trained loop counts: 1-4." in trained
    assert "was not recorded" in trained
    assert "Trained from scratch" not in trained
    assert "Trained from scratch" in model_card(config, figures, FIELDS._replace(base_model=None)).text
    healed = {**figures, "run": {**figures["run"], "settings": {"teacher": {"name": "someone/large"}}}}
    text_of_healed = model_card(config, healed, FIELDS._replace(base_model=None)).text
    assert "Trained from scratch" not in text_of_healed
    assert "nats per token (of training: what the distillation minimised): training 4.000" in text_of_healed
    assert "{{" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "Apache License 2.0"}, "license='Apache License 2.0' must be the Hub's word"),
        ({"license": "other"}, "license_name and license_link go with license='other'"),
        ({"license_name": "mine", "license_link": "https://x.org"}, "go with license='other'"),
        ({"language": ("english",)}, "language='english' must be an ISO 639 code"),
        ({"base_model": "a/b/c"}, "base_model='a/b/c' must be an id on the Hub"),
        ({"datasets": ("no spaces",)}, "datasets='no spaces' must be an id on the Hub"),
        ({"relation": "child"}, "relation='child' must be one of: finetune, adapter, merge, quantized"),
    ],
)
def test_metadata_that_the_hub_would_refuse_are_refused_here(made, change, message):
    config, figures, _ = made
    with pytest.raises(ValueError, match=message):
        model_card(config, figures, FIELDS._replace(**change))


def test_the_template_in_model_cards_is_the_one_that_is_installed():
    folder = Path(__file__).parents[1] / "model_cards"
    assert (folder / "template.md").read_bytes() == TEMPLATE.read_bytes()


@pytest.mark.parametrize("card", sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"), key=str))
def test_every_card_in_the_repository_is_one(card):
    if card.name in ("README.md", "template.md"):
        return
    loaded = ModelCard.load(card)
    assert loaded.data.library_name == "transformers"
    assert loaded.data.eval_results
