"""The loop count is one knob: every way to turn it gives the same logits and tokens, and every wrong way says so."""

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.utils import logging

from modeling_looped import LoopedConfig, LoopedForCausalLM

LOOPS = 5  # asked for in every way; the saved model has 3
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}


@pytest.fixture(params=["parcae", "damped", "norms", "lora", "sliding", "shared"])
def folder(request, tmp_path) -> Path:
    """A saved model with three loops."""
    tiny_model(std=1.0, **VARIANTS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **kwargs) -> LoopedForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def set_attribute(folder: Path) -> LoopedForCausalLM:
    model = load(folder)
    model.config.num_loops = LOOPS
    return model


def edit_json(folder: Path) -> LoopedForCausalLM:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_loops"] = LOOPS  # and nothing else: `num_hidden_layers` and `layer_types` now contradict it
    path.write_text(json.dumps(config))
    return load(folder)


def pass_a_config(folder: Path) -> LoopedForCausalLM:
    return load(folder, config=LoopedConfig.from_pretrained(folder, num_loops=LOOPS))


ROUTES_TO_A_MODEL: dict[str, Callable[[Path], LoopedForCausalLM]] = {
    "from_pretrained(num_loops=)": lambda folder: load(folder, num_loops=LOOPS),
    "from_pretrained(config=)": pass_a_config,
    "config.num_loops =": set_attribute,
    "with_num_loops": lambda folder: load(folder).with_num_loops(LOOPS),
    "config.json": edit_json,  # the last, since the folder stays edited
}


@torch.no_grad()
def test_every_route_gives_the_same_logits(folder):
    tokens = random_tokens(2, 9)
    plain = load(folder)
    expected = plain(tokens, num_loops=LOOPS).logits
    assert (expected - plain(tokens).logits).abs().max() > 0.1
    for name, route in ROUTES_TO_A_MODEL.items():
        model = route(folder)
        slots = model.config.slot_layout(LOOPS).num_slots
        assert model.config.num_hidden_layers == len(model.config.layer_types) == slots, name
        assert_close(model(tokens).logits, expected, atol=0)
        cache = model(tokens, use_cache=True).past_key_values
        assert len(cache) == model.config.num_hidden_layers, name


def test_every_route_gives_the_same_tokens(folder):
    tokens = random_tokens(2, 7)
    plain = load(folder)
    expected = plain.generate(tokens, use_cache=False, num_loops=LOOPS, **GREEDY).tolist()
    assert expected != plain.generate(tokens, **GREEDY).tolist()
    of_this_call = GenerationConfig(num_loops=LOOPS, **GREEDY)
    models = {name: route(folder) for name, route in ROUTES_TO_A_MODEL.items()}
    for cache in ("dynamic", "static"):
        for name, model in models.items():
            assert model.generate(tokens, cache_implementation=cache, **GREEDY).tolist() == expected, name
        assert plain.generate(tokens, cache_implementation=cache, num_loops=LOOPS, **GREEDY).tolist() == expected
        of_this_call.cache_implementation = cache
        assert plain.generate(tokens, generation_config=of_this_call).tolist() == expected


def test_a_saved_generation_config_keeps_the_loop_count(tmp_path):
    model = tiny_model(std=1.0)
    tokens = random_tokens(2, 7)
    expected = model.generate(tokens, num_loops=LOOPS, **GREEDY).tolist()
    model.generation_config.num_loops = LOOPS
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["num_loops"] == LOOPS
    again = load(tmp_path)
    assert again.config.num_loops == 3
    assert again.generate(tokens, **GREEDY).tolist() == expected
    assert again.generate(tokens, generation_config=GenerationConfig(**GREEDY)).tolist() == expected


def test_the_nearest_setting_wins():
    """Argument, then the generation config of the call, then the model's, then the config."""
    model = tiny_model(std=1.0, num_loops=1)
    tokens = random_tokens(2, 7)
    of = {k: model.generate(tokens, num_loops=k, **GREEDY).tolist() for k in (1, 2, 3, 4)}
    assert len({str(tokens) for tokens in of.values()}) == 4
    assert model.generate(tokens, **GREEDY).tolist() == of[1]
    model.generation_config.num_loops = 2
    assert model.generate(tokens, **GREEDY).tolist() == of[2]
    given = GenerationConfig(num_loops=3, **GREEDY)
    assert model.generate(tokens, generation_config=given).tolist() == of[3]
    assert model.generate(tokens, generation_config=given, num_loops=4).tolist() == of[4]
    assert (model.config.num_loops, model.generation_config.num_loops, given.num_loops) == (1, 2, 3)


@pytest.mark.parametrize("num_loops", [np.int64(2), np.int32(2), torch.tensor(2), torch.tensor(2, dtype=torch.int32)])
@torch.no_grad()
def test_integers_of_other_libraries_are_integers(num_loops):
    model = tiny_model(std=1.0)
    tokens = random_tokens()
    assert_close(model(tokens, num_loops=num_loops).logits, model(tokens, num_loops=2).logits, atol=0)
    expected = model.generate(tokens, num_loops=2, **GREEDY).tolist()
    assert model.generate(tokens, num_loops=num_loops, **GREEDY).tolist() == expected
    assert model.with_num_loops(num_loops).config.num_loops == 2


@pytest.mark.parametrize("num_loops", [0, -1, True, False, "4", 2.5, 2.0, torch.tensor(2.5)])
@torch.no_grad()
def test_a_loop_count_that_makes_no_sense_is_refused(num_loops):
    model = tiny_model()
    tokens = random_tokens()
    calls: list[Callable[[], object]] = [
        lambda: model(tokens, num_loops=num_loops),
        lambda: model.generate(tokens, num_loops=num_loops, **GREEDY),
        lambda: model.generate(tokens, generation_config=GenerationConfig(num_loops=num_loops, **GREEDY)),
        lambda: model.generate_batch([[5, 6]], num_loops=num_loops),
        lambda: model.with_num_loops(num_loops),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            call()


@pytest.mark.parametrize("num_loops", [0, -1, True, "4", 2.5, None])
def test_a_config_refuses_a_loop_count_that_makes_no_sense(num_loops):
    config = tiny_config()
    for assign in (lambda: tiny_config(num_loops=num_loops), lambda: setattr(config, "num_loops", num_loops)):
        with pytest.raises((ValueError, StrictDataclassError), match="num_loops"):
            assign()
    assert (config.num_loops, config.num_hidden_layers) == (3, 8), "a refused value leaves the config as it was"


@pytest.mark.parametrize(
    "name", ["num_steps", "n_loops", "total_ut_steps", "num_recursions", "H_cycles", "loop_count"]
)
def test_another_models_word_for_the_loop_count_is_refused_by_name(name):
    """`**kwargs` would take it in and run the default; Transformers' check in `generate` cannot say what to write."""
    model = tiny_model()
    tokens = random_tokens()
    calls: list[Callable[[], object]] = [
        lambda: model(tokens, **{name: 2}),
        lambda: model.model(tokens, **{name: 2}),
        lambda: model.generate(tokens, **{name: 2}),
        lambda: model.generate(tokens, generation_config=GenerationConfig(**{name: 2})),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"{name}.*num_loops"):
            call()


def test_any_other_unknown_argument_of_generate_meets_transformers_check():
    with pytest.raises(ValueError, match=r"model_kwargs.*num_lops"):
        tiny_model().generate(random_tokens(), num_lops=2)


@pytest.mark.parametrize("knows_its_size", [True, False])
def test_the_loop_count_cannot_change_on_a_filled_cache(knows_its_size):
    model = tiny_model()
    cache = DynamicCache(config=model.config) if knows_its_size else DynamicCache()
    tokens = random_tokens(2, 7)
    text = model.generate(tokens, past_key_values=cache, **GREEDY)
    for call in (model, functools.partial(model.generate, **GREEDY)):
        with pytest.raises(ValueError, match="a cache belongs to one loop count"):
            call(text, past_key_values=cache, num_loops=2)
    model.config.num_loops = 2
    with pytest.raises(ValueError, match="a cache belongs to one loop count"):
        model(text[:, -1:], past_key_values=cache)


@pytest.fixture
def warnings_of_the_library(monkeypatch) -> list[str]:
    """What Transformers' loggers warn of once, from a clean start."""
    logger = logging.get_logger("modeling_looped.modeling_looped")
    type(logger).warning_once.cache_clear()
    messages: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    return messages


@torch.no_grad()
def test_more_loops_than_trained_warn_once(warnings_of_the_library):
    model = tiny_model(max_trained_loops=3)
    tokens = random_tokens()
    model(tokens)
    model(tokens, num_loops=1)
    model.train()(tokens, num_loops=4)  # trains them
    assert model.training_flops_per_token(num_loops=4) > model.training_flops_per_token()  # counted in such a run
    assert warnings_of_the_library == []
    model.eval()
    for _ in range(3):
        model(tokens, num_loops=4)
    model.generate(tokens, num_loops=4, **GREEDY)
    assert len(warnings_of_the_library) == 1
    assert "num_loops=4 is more than max_trained_loops=3" in warnings_of_the_library[0]
    tiny_model()(tokens, num_loops=50)
    assert len(warnings_of_the_library) == 1, "nothing is known of a model without max_trained_loops"


@pytest.mark.parametrize("variant", ["parcae", "lora"])
def test_threads_with_different_loop_counts_do_not_disturb_each_other(variant):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    tokens = random_tokens(2, 7)
    # from three loops up and down, so that dispatchers are made while others are in use
    counts = (1, 2, 3, 4, 6, 8)
    with torch.no_grad():
        reference = tiny_model(std=1.0, **VARIANTS[variant])
        reference.load_state_dict(model.state_dict())
        expected = {k: reference(tokens, num_loops=k).logits for k in counts}
    failures: list[str] = []
    start = threading.Barrier(len(counts))

    def work(num_loops: int) -> None:
        start.wait()
        for attempt in range(15):
            with torch.no_grad():
                output = model(tokens, num_loops=num_loops, output_hidden_states=attempt % 2 == 0, use_cache=True)
            if not torch.equal(output.logits, expected[num_loops]):
                failures.append(f"{num_loops} loops, attempt {attempt}: other logits")
            if attempt % 2 == 0 and len(output.hidden_states) != 2 + 2 * num_loops + 1:
                failures.append(f"{num_loops} loops, attempt {attempt}: {len(output.hidden_states)} hidden states")
            if len(output.past_key_values) != 2 + 2 * num_loops:
                failures.append(f"{num_loops} loops, attempt {attempt}: {len(output.past_key_values)} slots")

    threads = [threading.Thread(target=work, args=(num_loops,)) for num_loops in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_may_generate_with_different_loop_counts():
    model = tiny_model(std=1.0)
    tokens = random_tokens(1, 7)
    counts = (1, 3, 5)
    expected = {k: model.generate(tokens, num_loops=k, **GREEDY).tolist() for k in counts}
    assert len({str(tokens) for tokens in expected.values()}) == 3
    results: dict[int, list[bool]] = {k: [] for k in counts}

    def work(num_loops: int) -> None:
        for _ in range(4):
            results[num_loops].append(
                model.generate(tokens, num_loops=num_loops, **GREEDY).tolist() == expected[num_loops]
            )

    threads = [threading.Thread(target=work, args=(num_loops,)) for num_loops in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [True] * 4 for k in counts}
