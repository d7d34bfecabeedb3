"""Quantised and offloaded caches: one slot per loop and layer here too, each filled with its own keys.

The offloaded caches need CUDA streams: `Cache.__init__` makes a `torch.Stream()` and `Cache.update` asks for
`torch.cuda.default_stream()`, and both raise in a torch built without CUDA. Here they run with a stand-in for the
stream, so that Transformers' own prefetching and offloading decides which layers are where. Copies that overlap with
computation were not run: there was no GPU.
"""

from collections.abc import Callable

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, stepwise_logits, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

pytestmark = pytest.mark.usefixtures("quanto_without_compiler")

LOOPS = (1, 4)

QUANTISED = {
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 16},
    "hqq": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16},
    "fp8": {"backend": "fp8"},
}


@pytest.mark.parametrize(("num_loops", "variant"), [(1, "parcae"), (4, "parcae"), (4, "shared")])
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@torch.no_grad()
def test_a_quantised_cache_equals_a_dynamic_one_holding_the_quantised_values(backend, num_loops, variant):
    """Exact, so that the coarseness of four bits hides nothing: put what the quantiser makes of each slot's keys and
    values into a dynamic cache, and both must continue alike (later tokens stay in the residual, unquantised).
    """
    model = tiny_model(num_loops=num_loops, **VARIANTS[variant])
    prompt, rest = random_tokens(1, 16), random_tokens(1, 5, seed=1)
    quantised = QuantizedCache(config=model.config, **QUANTISED[backend])
    assert len(quantised) == model.config.num_hidden_layers
    exact = DynamicCache(config=model.config)
    assert_close(model(prompt, past_key_values=quantised).logits, model(prompt, past_key_values=exact).logits)
    for layer, source in zip(exact.layers, quantised.layers, strict=True):
        layer.keys = source._dequantize(source._quantized_keys)
        layer.values = source._dequantize(source._quantized_values)
    assert_close(stepwise_logits(model, rest, quantised, []), stepwise_logits(model, rest, exact, []))


@pytest.mark.parametrize("backend", QUANTISED)
@torch.no_grad()
def test_quantised_steps_stay_near_the_uncached_logits(backend):
    """Over many requantisations (`residual_length=4`): nearer than the logits of any other loop count are."""
    model = tiny_model(**VARIANTS["sandwich"])
    tokens = random_tokens(1, 40)
    settings = QUANTISED[backend] | ({} if backend == "fp8" else {"residual_length": 4})
    expected = model(tokens, use_cache=False).logits
    logits = stepwise_logits(model, tokens, QuantizedCache(config=model.config, **settings), [16])
    error = (logits - expected)[:, 16:].abs().mean()
    other = min((model(tokens, use_cache=False, num_loops=k).logits - expected)[:, 16:].abs().mean() for k in (2, 4))
    assert 0 < error < other / 2


def test_a_quantised_cache_says_that_it_does_not_slide():
    with pytest.raises(ValueError, match="sliding_attention"):
        QuantizedCache(config=tiny_model(**VARIANTS["sliding"]).config, **QUANTISED["hqq"])


class StreamOfOneDevice:
    """Stands in for a CUDA stream where there is one device: everything has happened when a call returns."""

    def wait_stream(self, other: "StreamOfOneDevice") -> None:
        pass

    def __enter__(self) -> "StreamOfOneDevice":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.mark.parametrize("num_loops", LOOPS)
@pytest.mark.parametrize("variant", ["in_place", "sliding", "shared"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_offloaded_caches_equal_uncached_and_prefetch_what_comes_next(kind, variant, num_loops, monkeypatch):
    monkeypatch.setattr(torch, "Stream", StreamOfOneDevice)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: StreamOfOneDevice())
    model = tiny_model(num_loops=num_loops, **VARIANTS[variant])
    if kind == "dynamic":
        cache = DynamicCache(config=model.config, offloading=True)
    else:
        cache = StaticCache(config=model.config, max_cache_len=24, offloading=True)
    events: list[tuple[str, int]] = []
    for slot, layer in enumerate(cache.layers):
        for name in ("prefetch", "update", "offload"):
            monkeypatch.setattr(layer, name, recorded(events, name, slot, getattr(layer, name)))
    tokens = random_tokens(2, 12)
    expected = model(tokens, use_cache=False).logits
    assert_close(stepwise_logits(model, tokens, cache, [7]), expected)

    sliding = {slot for slot, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"}
    offloaded = set(range(len(cache))) - (sliding if cache.only_non_sliding else set())
    updates = [slot for name, slot in events if name == "update"]
    assert updates == 6 * list(range(len(cache))), "six forwards visit the slots in ascending order"
    assert {slot for name, slot in events if name == "offload"} == offloaded
    fetched_for_next = {slot for name, slot in events if name == "prefetch"}
    assert fetched_for_next == offloaded


def recorded(events: list[tuple[str, int]], name: str, slot: int, function: Callable) -> Callable:
    def record(*args, **kwargs):
        events.append((name, slot))
        return function(*args, **kwargs)

    return record
