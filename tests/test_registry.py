"""The registry that turns a spec in the config into a strategy in the model, on types made up here."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import random_tokens, tiny_config

from modeling_looped import LoopedConfig, LoopedForCausalLM, injection
from modeling_looped.injection import INJECTIONS
from modeling_looped.registry import BuildContext, NoParams, Registry, Strategy, of_kind

CONTEXT = BuildContext(hidden_size=4, num_core_layers=1, initializer_range=0.02, rms_norm_eps=1e-5)


@pytest.fixture
def spices() -> Registry:
    registry: Registry[Strategy] = Registry("spice")

    @registry.register("salt")
    class Salt(Strategy):
        pass

    @registry.register("pepper", "black_pepper", "white_pepper")
    class Pepper(Strategy):
        @dataclasses.dataclass(frozen=True)
        class Params:
            grams: float = 1.0
            grains: tuple[str, ...] = ("whole",)
            turns: int | None = None
            table_loops: int | None = None

            def __post_init__(self):
                if self.grams < 0:
                    raise ValueError(f"grams={self.grams!r} must not be negative.")

    return registry


def test_a_name_alone_is_a_spec_with_the_types_defaults(spices):
    assert spices.normalise("salt") == {"type": "salt"}
    expected = {"type": "pepper", "grams": 1.0, "grains": ["whole"], "turns": None, "table_loops": None}
    assert spices.normalise("pepper") == spices.normalise({"type": "pepper"}) == expected
    assert list(spices) == ["salt", "pepper"]


@pytest.mark.parametrize("alias", ["black_pepper", "white_pepper"])
def test_an_alias_means_its_type_and_is_not_listed(spices, alias):
    assert spices.normalise(alias) == spices.normalise("pepper")
    assert spices.normalise({"type": alias, "grams": 3.0})["type"] == "pepper"
    assert alias not in list(spices)


def test_open_tables_are_filled_with_the_loop_count_and_given_ones_kept(spices):
    assert spices.normalise("pepper", num_loops=4)["table_loops"] == 4
    assert spices.normalise({"type": "pepper", "table_loops": 2}, num_loops=4)["table_loops"] == 2
    assert "table_loops" not in spices.normalise("salt", num_loops=4)


def test_building_gives_the_module_its_parameters_as_they_were_declared(spices):
    module = spices.build(spices.normalise({"type": "pepper", "grains": ["fine", "coarse"]}), CONTEXT)
    assert isinstance(module, spices["pepper"])
    assert module.params.grains == ("fine", "coarse")
    assert module.context is CONTEXT
    assert "grams=1.0" in repr(module)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cumin", "spice: unknown type 'cumin'; known types: pepper, salt."),
        ({"type": "cumin"}, "spice: unknown type 'cumin'; known types: pepper, salt."),
        ({"grams": 1}, "spice={'grams': 1} must be a type name or a mapping"),
        (None, "spice=None must be a type name or a mapping"),
        ({"type": "salt", "grams": 1}, "spice: type 'salt' has no parameter 'grams' (its parameters: none)."),
        ({"type": "pepper", "gram": 1}, "(its parameters: grams, grains, turns, table_loops). Did you mean 'grams'?"),
        ({"type": "pepper", "grams": -1}, "spice: type 'pepper': grams=-1.0 must not be negative."),
        ({"type": "pepper", "grams": "1"}, "spice: type 'pepper': grams='1' must be of type float."),
        ({"type": "pepper", "turns": True}, "spice: type 'pepper': turns=True must be of type int | None."),
    ],
    ids=str,
)
def test_errors_name_the_field_the_value_and_what_is_allowed(spices, spec, said):
    with pytest.raises(ValueError, match="spice") as error:
        spices.normalise(spec)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (None, int | None, None),
        (2, float | None, 2.0),
        ("a", str, "a"),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        (("a",), tuple[str, ...], ("a",)),
        ([], tuple[str, ...], ()),
        (True, bool, True),
    ],
    ids=str,
)
def test_values_from_json_become_what_the_annotation_says(value, kind, expected):
    found = of_kind("name", value, kind)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3.0, int),
        (True, int),
        (True, float),
        ("3", int | None),
        (None, int),
        ("ab", tuple[str, ...]),
        ([1], tuple[str, ...]),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused(value, kind):
    with pytest.raises(TypeError, match="name"):
        of_kind("name", value, kind)


def test_a_type_without_parameters_needs_no_declaration():
    assert Strategy.Params is NoParams
    assert dataclasses.fields(NoParams) == ()


def test_registering_a_type_is_all_that_a_new_one_takes(monkeypatch, tmp_path):
    """The type is the example of CONTRIBUTING.md, as it stands there."""
    monkeypatch.setattr(INJECTIONS, "_types", dict(INJECTIONS._types))
    monkeypatch.setattr(INJECTIONS, "_aliases", dict(INJECTIONS._aliases))
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"## Add an injection\n.*?```python\n(.*?)```", guide, flags=re.DOTALL)
    exec(example, dict(vars(injection)))

    model = LoopedForCausalLM(tiny_config(injection={"type": "scaled_add", "initial_scale": 0.25})).eval()
    assert torch.equal(model.model.injection.scale, torch.full((model.config.hidden_size,), 0.25))
    model.save_pretrained(tmp_path)
    assert LoopedConfig.from_pretrained(tmp_path).injection == {"type": "scaled_add", "initial_scale": 0.25}
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(random_tokens()).logits, model(random_tokens()).logits)
