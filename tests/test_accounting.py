"""FLOPs, parameters and cache bytes are what torch counts on real runs."""

import json
from pathlib import Path

import pytest
import torch
from helpers import VARIANTS, random_tokens, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_configs import configs, few
from teachers import tiny_teacher
from torch.utils.flop_counter import FlopCounterMode
from training import run_arguments, sentence_dataset, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, DynamicCache, Trainer

from modeling_looped import (
    LoopedConfig,
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForTokenClassification,
    LoopedModel,
)
from modeling_looped.accounting import (
    PARTS,
    count_flops,
    kv_cache_bytes,
    parameter_counts,
    skeleton,
    token_flops,
)

MORE = {
    "expert_choice": {"halting": {"type": "expert_choice", "capacity": [1.0, 0.5]}},
    "token_choice": {"halting": "token_choice"},
    "nested": {
        "schedule": {"type": "nested", "inner_loops": 2},
        "injection": "none",
        "state_init": "input",
        "prelude_norm": False,
    },
    "truncated": {"backprop_loops": 1},
    "truncated_concat": {"backprop_loops": 2, "injection": "concat"},
}
#: Those of the variants whose products differ.
STRATEGIES = (
    "parcae",
    "in_place",
    "lora",
    "halting_act",
    "stacked",
    "huginn",
    "parcae_code",
    "shared",
    "wide",
    "albert",
)
STRATEGIES += ("gated_attention", "skip", "sequence")
CONFIGURATIONS = Path(__file__).parents[1] / "configuration"


def eager_model(config: LoopedConfig, model_class: type = LoopedForCausalLM):
    config._attn_implementation = "eager"  # the fused CPU kernel is one whose products torch does not count
    return model_class(config)


def counted(model, tokens: torch.Tensor, **inputs) -> tuple[int, int]:
    """FLOPs of forward and of backward that torch counts in a real step."""
    with FlopCounterMode(display=False) as counter:
        output = model.train()(tokens, use_cache=False, **inputs)
        forward = counter.get_total_flops()
        sum(
            tensor.sum() for tensor in output.to_tuple() if torch.is_tensor(tensor) and tensor.requires_grad
        ).backward()
        return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("name", [*STRATEGIES, *MORE])
def test_flops_of_a_training_step_are_those_that_torch_counts(name):
    config = tiny_config(**{**VARIANTS, **MORE}[name])
    model = eager_model(config)
    for num_loops in (1, 3) if name in MORE else (2,):
        forward, backward = counted(model, random_tokens(2, 4), num_loops=num_loops)
        flops = token_flops(model, num_loops=num_loops, sequence_length=4)
        assert (8 * flops.forward, 8 * flops.backward) == (forward, backward)
        assert min(flops.parts.values()) >= 0


@settings(few, max_examples=4)
@given(config=configs(is_causal=True), num_loops=st.integers(1, 4), length=st.integers(2, 7))
def test_flops_of_a_decoding_step_are_those_that_torch_counts(config, num_loops, length):
    model = eager_model(config).eval()
    tokens = random_tokens(1, length)
    cache = DynamicCache(config=config.with_num_loops(num_loops))
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache, num_loops=num_loops)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], past_key_values=cache, num_loops=num_loops)
    expected = model.flops_per_token(num_loops=num_loops, sequence_length=length)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (LoopedModel, {}),
        (LoopedForMaskedLM, {"is_causal": False, "mlm_head": "transform"}),
        (LoopedForTokenClassification, {}),
        (LoopedForQuestionAnswering, {}),
    ],
)
def test_every_head_is_counted(model_class, fields):
    model = eager_model(tiny_config(**fields), model_class)
    forward, backward = counted(model, random_tokens(2, 5))
    flops = token_flops(model, sequence_length=5)
    assert (10 * flops.forward, 10 * flops.backward) == (forward, backward)
    assert (flops.parts["head"] == 0) == (model_class is LoopedModel)


def test_flops_by_part_follow_the_loops_in_the_core_and_the_adapters_alone():
    model = tiny_model(loop_adapter={"type": "lora", "rank": 3})
    two, four = (token_flops(model, num_loops=loops, sequence_length=16).parts for loops in (2, 4))
    assert tuple(two) == PARTS
    assert {part for part in PARTS if two[part] != four[part]} == {"core", "adapters"}
    assert four["core"] == 2 * two["core"]
    assert four["adapters"] == 2 * two["adapters"] > 0


@pytest.mark.parametrize("name", ["lora", "norms", "capped", "stacked", "parcae_code", "wide", "albert"])
def test_parameters_are_counted_once_stored_and_once_per_invocation_effective(name):
    model = tiny_model(**VARIANTS[name])
    counts = parameter_counts(model, 5)
    assert counts.unique == sum(counts.parts.values()) == model.num_parameters()
    assert counts.stored == counts.unique
    one = parameter_counts(model, 1)
    core = one.effective_parts["core"]
    assert counts.effective == one.effective + 4 * core
    assert counts.effective_parts["adapters"] == 0
    layers = [*model.model.layers]
    alone = sum(p.numel() for layer in layers for n, p in layer.named_parameters() if "loop_adapters" not in n)
    rows = 3 if name == "norms" else 1
    norms = sum(p.numel() for i in (1, 2) for n, p in layers[i].named_parameters() if rows > 1 and "norm" in n)
    effective_layers = sum(one.effective_parts[part] for part in ("prelude", "core", "coda"))
    assert effective_layers == alone - norms + norms // rows


def test_effective_parameters_are_those_of_the_unrolled_model():
    model = tiny_model(injection="none", state_init="input", prelude_norm=False)
    assert parameter_counts(model, 4).effective == model.unroll(4).num_parameters()


def test_buffers_that_a_checkpoint_holds_are_stored_and_not_parameters():
    model = tiny_model(**MORE["nested"])
    counts = parameter_counts(model)
    assert counts.stored - counts.unique == 32  # the fast state's start
    assert counts.unique == model.num_parameters()


@few
@given(config=configs(is_causal=True), num_loops=st.integers(1, 4), length=st.integers(1, 9))
def test_cache_bytes_are_those_of_a_real_cache(config, num_loops, length):
    model = LoopedForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(random_tokens(2, length), use_cache=True, num_loops=num_loops).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model.kv_cache_bytes(length, num_loops=num_loops, batch_size=2) == held


def test_published_sizes_are_counted_without_their_weights():
    """Ouro 1.4B: 24 layers, 4 loops; 1.43 billion parameters by its model card."""
    config = LoopedConfig.from_dict(json.loads((CONFIGURATIONS / "ouro-1.4b.json").read_text()))
    counts = parameter_counts(skeleton(LoopedForCausalLM, config))
    assert counts.unique == pytest.approx(1.43e9, rel=0.01)
    assert counts.effective_parts["core"] == 4 * counts.parts["core"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_prelude_layers": 3, "num_core_layers": 0, "num_coda_layers": 0},
        {"depth_sampling": "poisson", "num_loops": 8},
        {"depth_sampling": {"type": "poisson", "granularity": "sequence"}, "num_loops": 6, "backprop_loops": 2},
        {"depth_sampling": {"type": "uniform", "granularity": "token"}, "num_loops": 4, "backprop_loops": 1},
    ],
    ids=["fixed", "stack", "batch", "sequence", "token"],
)
def test_the_trainer_counts_what_torch_counts(fields, tmp_path):
    """Also with a length and, where depth is sampled, loops and so a count of its own in every batch."""
    model = eager_model(tiny_config(**fields))
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    trainer = Trainer(model, run_arguments(tmp_path), train_dataset=sentence_dataset(), data_collator=collator)
    count_flops(trainer)
    step, counted = trainer.training_step, []

    def counting(*args):
        with FlopCounterMode(display=False) as counter:
            loss = step(*args)
        counted.append(counter.get_total_flops())
        return loss

    trainer.training_step = counting  # and not all of `train`: what the model counts with would be counted too
    trainer.train()
    assert trainer.state.total_flos == sum(counted)
    assert len(set(counted)) > 1


def test_a_call_with_depths_of_its_own_is_counted():
    model = eager_model(tiny_config(backprop_loops=2))
    depths = torch.tensor([2, 5])
    forward, backward = counted(model, random_tokens(2, 4), num_loops=depths)
    inputs = {"input_ids": random_tokens(2, 4), "num_loops": depths}
    assert model.floating_point_ops(inputs) == forward + backward


def test_a_stock_trainer_counts_too_few(tmp_path):
    """Why `count_flops` is there; a Trainer that asks the model would make it needless."""
    model = eager_model(tiny_config(num_loops=8))
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    arguments = run_arguments(tmp_path, max_steps=1)
    trainer = Trainer(model, arguments, train_dataset=sentence_dataset(), data_collator=collator)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    assert trainer.state.total_flos < counter.get_total_flops() / 4


def test_what_cannot_be_counted_is_refused_by_name():
    model = tiny_model()
    with pytest.raises(ValueError, match="num_loops=0 must be an integer of at least 1"):
        model.flops_per_token(num_loops=0)
    with pytest.raises(ValueError, match=r"sequence_length=2\.5 must be an integer of at least 1"):
        model.training_flops_per_token(sequence_length=2.5)
    with pytest.raises(ValueError, match="batch_size=0"):
        model.kv_cache_bytes(4, batch_size=0)
    with pytest.raises(ValueError, match="is_causal=False"):
        kv_cache_bytes(tiny_config(is_causal=False), 4)
    with pytest.raises(ValueError, match="add_cross_attention=True: FLOPs per token depend on the encoder's output"):
        tiny_model(add_cross_attention=True, is_decoder=True).flops_per_token()
    with pytest.raises(TypeError, match="model_type='llama': accounting is for looped models"):
        token_flops(tiny_teacher("llama"), sequence_length=4)
