"""The README's compatibility table: what every published family can do here, on checkpoints that its own code made.

One test per column. The rows are imported once per run; each claim compares the imported model with itself used
plainly.
"""

from __future__ import annotations

import pytest
import torch
from fixtures.published import FIXTURES as ALL_FIXTURES
from fixtures.published import imported_folder, load
from once import once_per_run
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

#: One checkpoint per family: the options that a family's other fixtures are about have batteries of their own.
FIXTURES = [name for name in ALL_FIXTURES if not name.startswith("nanbeige_")]
#: Masked language models do not generate.
ENCODERS = {"albert"}
#: Choosing the best tokens of a sequence looks ahead, so nothing of it can be cached.
LOOKS_AHEAD = {"mor_expert"}
GENERATES = [name for name in FIXTURES if name not in ENCODERS]
CACHES = [name for name in GENERATES if name not in LOOKS_AHEAD]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model(request, tmp_path_factory) -> PreTrainedModel:
    name = request.param
    folder = once_per_run(tmp_path_factory, f"compatibility-{name}", lambda folder: imported_folder(name, folder))
    return load(name, folder / "looped")


def prompts(length: int = 9) -> torch.Tensor:
    """Two rows of token ids, none of them 0."""
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(5))


def generated(model: PreTrainedModel, tokens: torch.Tensor, **options) -> torch.Tensor:
    """What comes behind `tokens`."""
    options = {"attention_mask": torch.ones_like(tokens), **GREEDY, **options}
    return model.generate(tokens, **options)[:, tokens.shape[1] :]


@pytest.mark.parametrize("model", FIXTURES, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_has_its_own_logits(model, side):
    tokens, alone = prompts(), prompts()[1:, :5]
    padded = tokens.clone()
    place = slice(4, 9) if side == "left" else slice(0, 5)
    mask = torch.zeros_like(tokens)
    mask[0], mask[1, place] = 1, 1
    padded[1] = 0
    padded[1, place] = alone[0]
    together = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(together[1:, place], model(alone).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[:1], model(tokens[:1]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", GENERATES, indirect=True)
@torch.no_grad()
def test_a_left_padded_batch_continues_every_row_as_alone(model):
    tokens = prompts()
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 0, 0
    options = {"use_cache": not (model.config.num_core_layers and model.model.halting.reads_whole_sequence)}
    together = generated(model, tokens, attention_mask=mask, **options)
    assert torch.equal(together[:1], generated(model, tokens[:1], **options))
    assert torch.equal(together[1:], generated(model, tokens[1:, 4:], **options))


@pytest.mark.parametrize("model", CACHES, indirect=True)
@torch.no_grad()
def test_cached_chunked_and_uncached_logits_agree(model):
    tokens = prompts()
    whole = model(tokens, use_cache=False).logits
    step = model(tokens[:, :4], use_cache=True)
    pieces = [step.logits, model(tokens[:, 4:7], past_key_values=step.past_key_values).logits]
    pieces += [model(tokens[:, i : i + 1], past_key_values=step.past_key_values).logits for i in (7, 8)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", CACHES, indirect=True)
@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens(model):
    tokens = prompts()
    assert torch.equal(
        generated(model, tokens, cache_implementation="static", disable_compile=True),
        generated(model, tokens, use_cache=False),
    )


@pytest.mark.parametrize("model", CACHES, indirect=True)
@torch.no_grad()
def test_continuous_batching_gives_the_same_tokens(model):
    rows = [prompts()[0].tolist(), prompts()[1, :5].tolist()]
    outputs = model.generate_batch(
        rows,
        generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(block_size=4, num_blocks=64, max_batch_tokens=32),
    )
    continued = sorted(output.generated_tokens for output in outputs.values())
    assert continued == sorted(generated(model, torch.tensor([row]))[0].tolist() for row in rows)


@pytest.mark.parametrize("model", CACHES, indirect=True)
@torch.no_grad()
def test_beams_with_a_cache_are_those_without(model):
    tokens = prompts()
    assert torch.equal(generated(model, tokens, num_beams=3), generated(model, tokens, num_beams=3, use_cache=False))


@pytest.mark.parametrize("model", CACHES, indirect=True)
@torch.no_grad()
def test_a_drafter_of_one_loop_changes_no_token(model):
    tokens = prompts()[:1]
    drafted = generated(model, tokens, assistant_model=model.with_num_loops(1))
    assert torch.equal(drafted, generated(model, tokens))


@pytest.mark.parametrize("model", FIXTURES, indirect=True)
def test_lora_on_every_projection_trains_once_per_weight_and_merges(model):
    tokens = prompts()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    tuned.double().eval()  # rounding grows through Huginn's loops to more than a wrong merge of one layer would show
    adapted = [name for name, _ in tuned.named_parameters() if name.endswith("lora_A.default.weight")]
    assert 0 < len(adapted) <= len(linears)
    with torch.no_grad():
        expected = tuned(tokens).logits
        merged = tuned.merge_and_unload()(tokens).logits
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["layer", "loop"])
@pytest.mark.parametrize("model", FIXTURES, indirect=True)
def test_checkpointing_gives_the_same_gradients(model, granularity):
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        torch.manual_seed(0)  # a first state that is drawn
        logits = model(prompts(), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), prompts().flatten()).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    expected = {name: gradient.clone() for name, gradient in gradients().items() if gradient is not None}
    model.config.checkpoint_granularity = granularity
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", FIXTURES, indirect=True)
@torch.no_grad()
def test_a_forward_compiles_into_one_graph(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(prompts(), use_cache=False)
    torch.testing.assert_close(outputs.logits, model(prompts(), use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", FIXTURES, indirect=True)
@torch.no_grad()
def test_any_loop_count_runs_and_one_name_sets_it(model):
    tokens = prompts()
    for num_loops in (1, 2, 6):
        passed = model(tokens, num_loops=num_loops, use_cache=False).logits
        assert passed.isfinite().all()
        model.config.num_loops = num_loops
        assert torch.equal(model(tokens, use_cache=False).logits, passed)


@pytest.mark.parametrize("model", FIXTURES, indirect=True)
@torch.no_grad()
def test_a_saved_and_reloaded_model_is_bit_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(prompts()).logits, model(prompts()).logits)
