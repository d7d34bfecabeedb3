"""Attention is dispatched by one module per slot, which is what engines with a cache of their own hold on to.

vLLM's Transformers backend was not installed here. What it demands of a model is checked on the model instead: it keys
its cache by `module.layer_idx`, reads the dispatching `forward` as a syntax tree, and calls with `use_cache=False`.
"""

import ast
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, random_tokens, tiny_config, tiny_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_looped import LoopedForCausalLM
from modeling_looped.attention import AttentionSlot

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}


def dispatchers(model: nn.Module) -> list[AttentionSlot]:
    return [module for module in model.modules() if isinstance(module, AttentionSlot)]


@pytest.mark.parametrize("num_loops", [1, 2, 5])
@pytest.mark.parametrize("variant", ["parcae", "sliding", "stacked", "sequence", "nanbeige", "wide"])
def test_the_dispatchers_are_the_slots(variant, num_loops):
    model = tiny_model(num_loops=num_loops, **VARIANTS[variant])
    config = model.config
    found = dispatchers(model)
    assert sorted(slot.layer_idx for slot in found) == list(range(config.num_hidden_layers))
    for slot in found:
        assert type(slot.layer_idx) is int
        assert slot.config is config
        assert slot.scaling == config.head_dim**-0.5
        assert slot.num_key_value_groups == 2
        assert slot.is_causal is True
        slides = config.layer_types[slot.layer_idx] == "sliding_attention"
        assert slot.sliding_window == (config.sliding_window if slides else None)
        assert list(slot.parameters()) == list(slot.buffers()) == []


@torch.no_grad()
def test_running_other_loop_counts_leaves_the_registered_dispatchers_alone():
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    for num_loops in (6, 1, 3):
        model(random_tokens(), num_loops=num_loops)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert sorted(slot.layer_idx for slot in dispatchers(model)) == list(range(8))


@pytest.mark.parametrize("num_loops", [1, 3, 6])
@torch.no_grad()
def test_a_forward_dispatches_every_slot_once_and_in_order(num_loops, monkeypatch):
    seen = []

    def observed(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, kwargs["scaling"], kwargs["sliding_window"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "observed", observed)
    model = tiny_model(**VARIANTS["sliding"])
    model.set_attn_implementation("observed")
    model(random_tokens(), num_loops=num_loops)
    types = model.config.with_num_loops(num_loops).layer_types
    windows = [4 if kind == "sliding_attention" else None for kind in types]
    assert seen == [(slot, 8**-0.5, window) for slot, window in enumerate(windows)]


class EngineCache:
    """A serving engine's attention: keeps keys and values itself, by `module.layer_idx`."""

    def __init__(self):
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None, "an implementation without a mask function must not get one"
        if module.layer_idx in self.held:
            past_keys, past_values = self.held[module.layer_idx]
            key, value = torch.cat((past_keys, key), dim=2), torch.cat((past_values, value), dim=2)
        self.held[module.layer_idx] = key, value
        distance = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None] - torch.arange(key.shape[2])
        seen = distance >= 0
        if module.sliding_window is not None:
            seen &= distance < module.sliding_window
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=module.scaling, enable_gqa=module.num_key_value_groups > 1
        )
        return attended.transpose(1, 2), None


def tokens_of_engine(model: LoopedForCausalLM, prompt: torch.Tensor, engine: EngineCache) -> list[int]:
    """Greedy decoding the way vLLM calls a model: the base model, without cache or mask, with positions."""
    fed, position, tokens = prompt, 0, []
    for _ in range(GREEDY["max_new_tokens"]):
        positions = torch.arange(position, position + fed.shape[1])[None]
        hidden = model.model(fed, position_ids=positions, use_cache=False, return_dict=False)[0]
        position += fed.shape[1]
        fed = model.to_logits(hidden[:, -1:]).argmax(-1)
        tokens.append(int(fed))
    return tokens


@pytest.mark.parametrize("variant", ["parcae", "concat", "in_place", "sliding", "lora", "sandwich", "halting_act"])
@torch.no_grad()
def test_an_engine_that_keys_its_cache_by_layer_idx_gets_the_tokens_of_generate(variant, monkeypatch):
    model = tiny_model(std=1.0, **VARIANTS[variant])
    prompt = random_tokens(1, 7)
    expected = model.generate(prompt, **GREEDY)[0, 7:].tolist()
    engine = EngineCache()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm_like", engine)
    model.set_attn_implementation("vllm_like")
    assert tokens_of_engine(model, prompt, engine) == expected
    assert sorted(engine.held) == list(range(model.config.num_hidden_layers))


@torch.no_grad()
def test_an_engine_would_notice_a_dispatcher_shared_by_the_loops(monkeypatch):
    model = tiny_model(std=1.0, **VARIANTS["in_place"])
    prompt = random_tokens(1, 7)
    expected = model.generate(prompt, **GREEDY)[0, 7:].tolist()
    for layer in model.model.layers:
        layer.self_attn._slot_at = dict.fromkeys(layer.self_attn._slot_at, layer.self_attn.slots[0])
    engine = EngineCache()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm_like", engine)
    # the first slot's second pass now finds the first pass's keys in the way of its own
    model.set_attn_implementation("vllm_like")
    assert tokens_of_engine(model, prompt, engine) != expected


def test_the_dispatching_forward_calls_one_attention_interface():
    """vLLM's AttentionFuser reads this from the source: one local bound to `get_interface(...)`, called once."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(AttentionSlot.forward)))
    bound = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    ]
    assert bound == ["attention_interface"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == bound[0]]
    assert len(calls) == 1
    assert ast.unparse(calls[0].args[0]) == "self"
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords if keyword.arg}["scaling"] == (
        "self.scaling"
    )


def test_the_base_model_has_what_an_engine_asks_for():
    model = LoopedForCausalLM(tiny_config())
    assert model._supports_attention_backend
    assert model.base_model_prefix == "model"
    assert model.model.get_input_embeddings() is model.model.embed_tokens
    assert "AutoModel" in model.config.auto_map
