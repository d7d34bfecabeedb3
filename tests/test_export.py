"""`torch.export`: a forward at a fixed loop count becomes one program, loops unrolled, one key-value pair per slot."""

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_model
from transformers import DynamicCache
from transformers.integrations import executorch

SMALL = {"num_core_layers": 1, "num_loops": 2, "num_coda_layers": 0}


@pytest.mark.parametrize("variant", ["parcae", "concat", "norms", "halting_act"])
@torch.no_grad()
def test_an_exported_forward_equals_the_model(variant):
    model = tiny_model(**{**VARIANTS[variant], **SMALL})
    length = {1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(
        model,
        (random_tokens(),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": length, "use_cache": None},
        strict=False,
    )
    exported = program.module()
    for tokens in (random_tokens(2, 7, seed=1), random_tokens(2, 11)):
        assert_close(exported(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    attentions = [n for n in program.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(attentions) == model.config.num_hidden_layers == 3


@pytest.mark.slow
# Transformers' own: `merge_with_config_defaults` writes `config.is_causal`, `capture_outputs` its context variable.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@torch.no_grad()
def test_a_strict_export_equals_the_model():
    model = tiny_model(**SMALL)
    program = torch.export.export(model, (random_tokens(),), {"use_cache": False, "num_loops": 3}, strict=True)
    tokens = random_tokens(2, 7, seed=1)
    expected = model(tokens, use_cache=False, num_loops=3).logits
    assert_close(program.module()(tokens, use_cache=False, num_loops=3).logits, expected)


@torch.no_grad()
def test_an_exported_step_decodes_on_a_dynamic_cache():
    executorch.register_dynamic_cache_export_support()
    model = tiny_model(**SMALL)
    text = [random_tokens(1, 7), random_tokens(1, 1, seed=1)]

    def prefilled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(text[0], past_key_values=cache)
        return cache

    grows = [{2: torch.export.Dim.AUTO}] * model.config.num_hidden_layers
    program = torch.export.export(
        model,
        (),
        {"input_ids": text[1], "past_key_values": prefilled(), "use_cache": True},
        dynamic_shapes={"input_ids": None, "past_key_values": [grows, grows], "use_cache": None},
        strict=False,
    )
    exported, cache = program.module(), prefilled()
    for step in range(4):
        output = exported(input_ids=text[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert_close(output.logits, model(torch.cat(text, dim=1), use_cache=False).logits[:, -1:])
        assert len(cache) == model.config.num_hidden_layers
        text.append(random_tokens(1, 1, seed=2 + step))


@torch.no_grad()
def test_an_exported_static_cache_has_a_pair_of_buffers_per_slot():
    """Transformers' recipe for ExecuTorch, stepped by hand (its own `generate` starts a new module for each token)."""
    model = tiny_model(**SMALL)
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    program = executorch.convert_and_export_with_cache(model, strict=False)
    keys = [name for name, _ in program.named_buffers() if name.startswith("key_cache")]
    assert len(keys) == model.config.num_hidden_layers
    exported, tokens = program.module(), random_tokens(1, 9)
    logits = [
        exported(input_ids=tokens[:, position, None], cache_position=torch.tensor([position])) for position in range(9)
    ]
    assert_close(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits)
