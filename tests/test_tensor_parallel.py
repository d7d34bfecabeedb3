"""Tensor-parallel and FSDP plans: rules name something, every projection is split, two processes agree with one."""

import re

import pytest
import torch
from distributed.launch import launch
from distributed.tensor_parallel import MODELS, TOKENS
from helpers import VARIANTS, assert_close, tiny_model
from once import once_per_run

from modeling_looped import LoopedForCausalLM


def matching(rule: str, names: list[str]) -> list[str]:
    """The names that a plan's rule means, `*` standing for a number."""
    pattern = re.compile(re.escape(rule).replace(r"\*", r"\d+") + r"(\.|$)")
    return [name for name in names if pattern.match(name)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_of_the_tensor_parallel_plan_matches_and_every_projection_is_split(variant):
    model = tiny_model(**VARIANTS[variant])
    names = [name for name, _ in model.model.named_parameters()]
    matched = {rule: matching(rule, names) for rule in model.config.base_model_tp_plan}
    assert [rule for rule, found in matched.items() if not found] == []
    split = {name for rule, found in matched.items() if "norm" not in rule for name in found}
    projections = {
        name for name in names if re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.(weight|bias)$", name)
    }
    assert split == projections
    assert set(model._tp_plan) >= {"lm_head"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_of_the_fsdp_plan_matches(variant):
    """Transformers' default plan (`layers.*`, `embed_tokens`, `norm`) shards the stored layers one by one."""
    model = tiny_model(**VARIANTS[variant])
    modules = [name for name, _ in model.model.named_modules()]
    plan = model.config.base_model_fsdp_plan
    assert set(plan) == {"layers.*", "embed_tokens", "norm"}
    exact = {rule: [name for name in matching(rule, modules) if name.count(".") == rule.count(".")] for rule in plan}
    assert {rule: len(found) for rule, found in exact.items()} == {
        "layers.*": model.config.num_stored_layers,
        "embed_tokens": 1,
        "norm": 1,
    }
    assert set(model._no_split_modules) == {"LoopedDecoderLayer"}


def run_in_two_processes(folder) -> None:
    for name, settings in MODELS.items():
        tiny_model(**settings).save_pretrained(folder / name)
    launch("tensor_parallel.py", folder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two processes compute, and the same models here."""
    folder = once_per_run(tmp_path_factory, "tensor_parallel", run_in_two_processes)
    models = {name: LoopedForCausalLM.from_pretrained(folder / name) for name in MODELS}
    return {"models": models, **torch.load(folder / "seen.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
def test_a_split_model_computes_what_the_whole_one_does(seen, variant):
    """Logits at two loop counts, cached generation, and every gradient, of split and of whole weights."""
    model, split = seen["models"][variant], seen[variant]
    assert split["local_rows"] * 2 == model.config.intermediate_size
    with torch.no_grad():
        assert_close(split["logits"], model(TOKENS).logits)
        assert_close(split["one_loop"], model(TOKENS, num_loops=1).logits)
    assert torch.equal(split["generated"], model.generate(TOKENS, max_new_tokens=4, do_sample=False))
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(split["gradients"][name], parameter.grad, atol=1e-5)
