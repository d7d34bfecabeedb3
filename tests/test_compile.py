"""`torch.compile`: block by block the graphs do not depend on the loop count, and a whole forward is one graph.

The graphs are counted by a backend that runs them as traced, or by dynamo's own counters; `aot_eager` adds the
backward, and one slow test goes through inductor.
"""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from modeling_looped import LoopedForCausalLM

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
# Four slots: tracing a whole forward costs seconds per slot.
SMALL = {"num_core_layers": 1, "num_loops": 2}


class CountingBackend:
    """Runs graphs as they were traced, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        self.graphs += 1
        return graph_module.forward


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs that dynamo has compiled in this test."""
    return counters["stats"]["unique_graphs"]


def untouched_copy(model: LoopedForCausalLM) -> LoopedForCausalLM:
    copy = LoopedForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(
    "variant", ["parcae", "in_place", "norms", "lora", "albert", "sliding", "universal", "stacked", "shared", "wide"]
)
@torch.no_grad()
def test_compiled_blocks_have_as_many_graphs_for_sixteen_loops_as_for_two(variant):
    model = tiny_model(**VARIANTS[variant])
    reference, backend = untouched_copy(model), CountingBackend()
    model.compile_blocks(backend=backend)
    tokens, counts = random_tokens(), []
    for num_loops in range(1, 17):
        expected = reference(tokens, num_loops=num_loops).logits
        assert_close(model(tokens, num_loops=num_loops).logits, expected)
        counts.append(backend.graphs)
    config = model.config
    shares = config.kv_sharing != "none"
    settled = 2 if shares else 1  # what only later loops run is met in the second one, and again in the third
    assert counts[settled:] == [counts[settled]] * (16 - settled)
    # Two halves of a block. The core's are graphs of their own only where it has other sizes, or where a table with
    # one row per loop is read: one for the first loop and one for all others.
    per_loop_tables = config.loop_conditioning["type"] == "norms" or config.loop_adapter["type"] == "lora"
    # Where loops share keys and values, the first one projects all three and later ones the queries alone.
    assert counts[-1] == 2 * (1 + 2 if per_loop_tables else 2 if config.core_hidden_size else 1) + shares
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("variant", ["parcae", "lora"])
def test_compiled_blocks_have_the_gradients_of_plain_ones(variant):
    model = tiny_model(**VARIANTS[variant]).train()
    reference = untouched_copy(model).train()
    model.compile_blocks(backend="aot_eager")
    tokens = random_tokens()
    for num_loops in (2, 4):
        for each in (model, reference):
            each.zero_grad()
            each(tokens, labels=tokens, num_loops=num_loops).loss.backward()
        for (name, weight), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", ["parcae", "shared"])
def test_a_copy_of_compiled_blocks_has_weights_of_its_own(variant):
    """`copy.deepcopy` is how trainers make reference models; a copy is not compiled."""
    model, tokens = tiny_model(**VARIANTS[variant]), random_tokens()
    model.compile_blocks(backend="eager")
    with torch.no_grad():
        expected = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert_close(twin(tokens).logits, expected)
        twin(tokens, labels=tokens).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        with torch.no_grad():
            for parameter, ours in zip(twin.parameters(), model.parameters(), strict=True):
                ours.copy_(parameter)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_compiled_blocks_generate_the_same_tokens(cache):
    model = tiny_model(std=1.0, **VARIANTS["norms"])
    tokens = random_tokens(2, 7)
    expected = {k: model.generate(tokens, num_loops=k, **GREEDY).tolist() for k in (1, 3, 5)}
    model.compile_blocks(backend=CountingBackend())
    for num_loops, text in expected.items():
        generated = model.generate(tokens, num_loops=num_loops, cache_implementation=cache, **GREEDY)
        assert generated.tolist() == text
        assert model.with_num_loops(num_loops).generate(tokens, **GREEDY).tolist() == text


@pytest.mark.slow
@torch.no_grad()
def test_blocks_compiled_by_inductor_have_the_same_logits():
    model = tiny_model(**VARIANTS["norms"])
    reference = untouched_copy(model)
    model.compile_blocks()
    for num_loops in (1, 3, 6):
        tokens = random_tokens(seed=num_loops)
        assert_close(model(tokens, num_loops=num_loops).logits, reference(tokens, num_loops=num_loops).logits)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["parcae", "lora", "sliding"])
@torch.no_grad()
def test_a_whole_forward_is_one_graph(variant):
    model = tiny_model(
        **{**VARIANTS[variant], **SMALL, **({"stored_layer_types": None} if variant == "sliding" else {})}
    )
    tokens = random_tokens(2, 7)
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    reference = untouched_copy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # with fewer loops, as many, and more than there are dispatchers registered
    for kwargs in ({}, {"num_loops": 1}, {"num_loops": 3}, {"attention_mask": mask}):
        seen = kwargs.get("attention_mask", torch.ones_like(tokens)).bool()
        logits = compiled(tokens, use_cache=False, **kwargs).logits
        assert_close(logits[seen], reference(tokens, use_cache=False, **kwargs).logits[seen])
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(random_tokens(2, 7, seed=1), use_cache=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("num_loops", [None, 3])
@pytest.mark.parametrize("variant", ["parcae", "lora"])
@torch.no_grad()
def test_compiled_decoding_does_not_recompile_after_its_first_step(variant, num_loops):
    model = tiny_model(**{**VARIANTS[variant], **SMALL})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config.with_num_loops(num_loops or 2), max_cache_len=24)
    for text in range(2):
        cache.reset()
        tokens = random_tokens(2, 12, seed=text)
        expected = model(tokens, num_loops=num_loops).logits
        logits = [model(tokens[:, :5], past_key_values=cache, num_loops=num_loops).logits]
        for position in range(5, 12):
            first_step = text == 0 and position == 5
            with torch.compiler.set_stance("default" if first_step else "fail_on_recompile"):
                step = compiled(tokens[:, position, None], past_key_values=cache, num_loops=num_loops)
            logits.append(step.logits)
        assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.slow
def test_compiled_generation_compiles_once_per_loop_count():
    """What `generate` does on a GPU with a static cache: shorter prompts and a return to an earlier loop count find
    their graph, also where the call's loop count is not the config's.
    """
    model = tiny_model(std=1.0, **SMALL)
    compiling = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    counts = []
    for num_loops in (None, 3, None, 3):
        for length in (7, 5):
            tokens = random_tokens(1, length)
            generated = model.generate(
                tokens, cache_implementation="static", compile_config=compiling, num_loops=num_loops, **GREEDY
            )
            assert generated.tolist() == model.generate(tokens, num_loops=num_loops, **GREEDY).tolist()
            counts.append(graphs())
    assert counts == [1, 1, 2, 2, 2, 2, 2, 2]
