"""One battery for every registered strategy: registering a type is all it takes to be covered here.

The equations of each type are in `test_strategy_equations.py`; parity with the plain reference in
`test_reference_parity.py`.
"""

import copy
import dataclasses
import json
import re

import pytest
import torch
from helpers import TOLERANCE, random_tokens, randomise, tiny_config

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.configuration_looped import STRATEGY_FIELDS
from modeling_looped.registry import BuildContext, LayerShape, Strategy

EVERY_TYPE = [(field, name) for field, registry in STRATEGY_FIELDS.items() for name in registry]
every_type = pytest.mark.parametrize(("field", "name"), EVERY_TYPE, ids=[f"{f}-{n}" for f, n in EVERY_TYPE])

#: Tables of two rows, so that the third loop is the first one beyond them.
TABLE_LOOPS = 2
#: Fewer loops than rows, and more.
LOOP_COUNTS = (1, 5)

#: What the other fields must be beside a type.
BESIDE: dict[str, dict] = {
    "nested": {"injection": "none", "state_init": "input"},
    "expected_exit": {"halting": "gate"},
    "exit_gate": {"halting": "gate"},
}
#: With which parameters a type that looks at the whole sequence does not, and so goes with a cache.
CAUSAL: dict[str, dict] = {"expert_choice": {"selection": "threshold"}}


def spec_of(field: str, name: str, **params) -> dict:
    """A spec of this type with its defaults, and short tables where it has tables."""
    fields = {parameter.name for parameter in dataclasses.fields(STRATEGY_FIELDS[field][name].Params)}
    tables = {"table_loops": TABLE_LOOPS} if "table_loops" in fields else {}
    return {"type": name, **tables, **params}


def config_with(field: str, name: str, params: dict | None = None, **settings) -> LoopedConfig:
    settings = BESIDE.get(name, {}) | settings | {field: spec_of(field, name, **(params or {}))}
    types = {f: spec["type"] if isinstance(spec, dict) else spec for f, spec in settings.items()}
    carriers = [STRATEGY_FIELDS[f][types.get(f, d)] for f, d in
                (("injection", "diagonal"), ("state_init", "zeros"))]  # fmt: skip
    if not any(cls.carries_prelude for cls in carriers):
        settings["state_init"] = {"type": "input"}
    return tiny_config(**settings)


def model_with(field: str, name: str, params: dict | None = None, **settings) -> LoopedForCausalLM:
    model = randomise(LoopedForCausalLM(config_with(field, name, params, **settings))).eval()
    if name == "exit_gate":  # the one that asks for it
        model.requires_grad_(False)
        model.model.halting.requires_grad_(True)
    return model


@every_type
def test_builds_from_its_defaults(field, name):
    registry = STRATEGY_FIELDS[field]
    spec = registry.normalise(name, num_loops=3)
    shape = LayerShape(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    context = BuildContext(
        hidden_size=8,
        num_core_layers=2,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        vocab_size=5,
        layer_shapes=(shape, shape),
    )
    module = registry.build(spec, context)
    assert isinstance(module, Strategy)
    assert isinstance(module, registry[name])


@every_type
def test_a_spec_is_complete_idempotent_and_survives_json(field, name):
    registry = STRATEGY_FIELDS[field]
    spec = registry.normalise(name, num_loops=3)
    parameters = {parameter.name for parameter in dataclasses.fields(registry[name].Params)}
    assert set(spec) == {"type", *parameters}
    assert registry.normalise(spec, num_loops=7) == spec
    assert json.loads(json.dumps(spec)) == spec
    assert registry.normalise(json.loads(json.dumps(spec))) == spec
    assert registry.normalise({"type": name}, num_loops=3) == spec


@every_type
def test_normalising_leaves_the_given_spec_as_it_was(field, name):
    given = spec_of(field, name)
    before = copy.deepcopy(given)
    STRATEGY_FIELDS[field].normalise(given, num_loops=3)
    assert given == before


@every_type
def test_an_unknown_parameter_is_refused_by_field_type_and_name(field, name):
    with pytest.raises(ValueError, match=rf"{field}: type '{name}' has no parameter 'nonsense'"):
        STRATEGY_FIELDS[field].normalise({"type": name, "nonsense": 1})


PARAMETERS = [
    (field, name, parameter.name)
    for field, name in EVERY_TYPE
    for parameter in dataclasses.fields(STRATEGY_FIELDS[field][name].Params)
]


@pytest.mark.parametrize(("field", "name", "parameter"), PARAMETERS, ids=["-".join(p) for p in PARAMETERS])
@pytest.mark.parametrize("value", ["nonsense", [], {}, float("nan")], ids=repr)
def test_a_value_of_the_wrong_kind_is_refused_by_field_type_and_name(field, name, parameter, value):
    with pytest.raises(ValueError, match=rf"{field}: type '{name}': .*{parameter}="):
        STRATEGY_FIELDS[field].normalise({"type": name, parameter: value})


@pytest.mark.parametrize(("field", "name", "parameter"), PARAMETERS, ids=["-".join(p) for p in PARAMETERS])
def test_every_parameter_is_documented(field, name, parameter):
    assert re.search(rf"^\s*{parameter}: \S", STRATEGY_FIELDS[field][name].Params.__doc__, re.MULTILINE)


@every_type
def test_has_a_docstring_of_its_own(field, name):
    cls = STRATEGY_FIELDS[field][name]
    assert cls.__doc__
    assert all(cls.__doc__ != base.__doc__ for base in cls.__mro__[1:])


@every_type
def test_is_named_in_the_documentation_of_the_config(field, name):
    entry = re.search(
        rf"^        {field} \(.*?(?=^        \w|^    \w)", LoopedConfig.__doc__, re.MULTILINE | re.DOTALL
    )
    assert f"`{name}`" in entry.group()


@every_type
@pytest.mark.parametrize("num_loops", LOOP_COUNTS)
def test_every_parameter_gets_a_gradient(field, name, num_loops):
    model = model_with(field, name).train()
    model(random_tokens(), labels=random_tokens(), num_loops=num_loops).loss.backward()
    trained = {parameter: p for parameter, p in model.named_parameters() if p.requires_grad}
    assert [parameter for parameter, p in trained.items() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in trained.values())


@every_type
def test_beyond_its_tables_every_parameter_moves_the_loss(field, name):
    """With all loops of the tables in use, and a first state that is not zero, no row of any parameter is dead."""
    model = model_with(field, name, **({} if field == "state_init" else {"state_init": {"type": "input"}})).train()
    model(random_tokens(), labels=random_tokens(), num_loops=TABLE_LOOPS + 2).loss.backward()
    trained = {parameter: p for parameter, p in model.named_parameters() if p.requires_grad}
    assert [parameter for parameter, p in trained.items() if not p.grad.any()] == []
    for parameter, p in trained.items():
        if "layers" not in parameter and p.shape[:1] == (TABLE_LOOPS,):
            assert p.grad.flatten(1).any(dim=1).all(), f"a row of {parameter} has no gradient"


@every_type
def test_loops_beyond_the_tables_change_no_shape_and_use_the_last_row(field, name):
    model = model_with(field, name)
    shapes = {parameter: p.shape for parameter, p in model.named_parameters()}
    model.config.num_loops = 6
    assert model(random_tokens()).logits.isfinite().all()
    assert {parameter: p.shape for parameter, p in model.named_parameters()} == shapes
    rebuilt = LoopedForCausalLM(copy.deepcopy(model.config))
    assert {parameter: p.shape for parameter, p in rebuilt.named_parameters()} == shapes


@every_type
def test_saved_and_loaded_it_is_bit_equal(field, name, tmp_path):
    model = model_with(field, name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # loading must not draw anything that it keeps
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict()[field] == model.config.to_dict()[field]
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[key], loaded_state[key]) for key in state)
    assert torch.equal(model(random_tokens(), num_loops=4).logits, loaded(random_tokens(), num_loops=4).logits)


@every_type
def test_evaluation_is_deterministic_and_draws_no_random_numbers(field, name):
    model = model_with(field, name)
    before = torch.get_rng_state()
    first = model(random_tokens()).logits
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(model(random_tokens()).logits, first)


@every_type
def test_cached_steps_equal_the_uncached_forward(field, name):
    model = model_with(field, name, CAUSAL.get(name))
    tokens = random_tokens(2, 6)
    whole = model(tokens, use_cache=False).logits
    cache, steps = None, []
    for column in tokens.split(1, dim=1):
        output = model(column, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=TOLERANCE[torch.float32])


@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype_and_near_fp32(field, name, dtype):
    model = model_with(field, name)
    expected = model(random_tokens(), num_loops=4).logits
    output = model.to(dtype)(random_tokens(), num_loops=4, output_loop_hidden_states=True)
    assert output.logits.dtype == dtype
    assert {state.dtype for state in output.loop_hidden_states} == {dtype}
    assert output.logits.isfinite().all()
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.logits.float(), expected, rtol=0, atol=0.05 * scale)


@every_type
def test_initialisation_is_finite_and_repeats_with_the_seed(field, name):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(LoopedForCausalLM(config_with(field, name)))
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@every_type
def test_meta_construction_and_loading_initialise_what_the_checkpoint_lacks(field, name, tmp_path):
    """A checkpoint without this strategy's weights, as a conversion makes it, gets the documented start."""
    model = model_with(field, name)
    counter = "model.depth_sampling.step"  # no weight: a checkpoint that lacks it is complete
    own = [key for key in model.state_dict() if (field in key or "loop_adapters" in key) and key != counter]
    kept = {key: tensor for key, tensor in model.state_dict().items() if key not in own}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, report = LoopedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(own)
    fresh = LoopedForCausalLM(config_with(field, name)).state_dict()
    for key in own:
        assert loaded.state_dict()[key].isfinite().all()
        assert_like_draws(loaded.state_dict()[key], fresh[key])


def assert_like_draws(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Equal if constant, else mean and spread agree as far as that many draws allow."""
    spread, slack = other.std(correction=0).item(), 5 / other.numel() ** 0.5
    assert tensor.std(correction=0).item() == pytest.approx(spread, rel=slack, abs=1e-6)
    assert tensor.mean().item() == pytest.approx(other.mean().item(), abs=slack * spread + 1e-6)
