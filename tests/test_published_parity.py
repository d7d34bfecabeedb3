"""Every recorded checkpoint, imported, computes what its original code did, and what that code gets wrong, right."""

import pytest
import torch
from fixtures.published import FIXTURES, described, imported_folder, load, recording, tolerance
from helpers import assert_close, stepwise_logits
from transformers import DynamicCache

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.conversion.parity import compare_with_recording

#: Those that can generate with a cache: ALBERT is an encoder, and top-k routing looks at the whole sequence.
CACHED = [name for name in FIXTURES if name not in ("albert", "mor_expert")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Imports a fixture on first use and gives its folder."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = imported_folder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def model(folders):
    return lambda name: load(name, folders(name))


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_states_and_padded_rows_are_those_of_the_original(name, model):
    parity = compare_with_recording(model(name), recording(name))
    assert max(parity.original.values()) <= tolerance(name), parity
    assert all(difference <= tolerance(name) for difference in parity.padding.values()), parity
    # where the original gets a padded row right, ours is its too
    for side, wrong_by in described(name)["run"]["pads"].items():
        if wrong_by < 1e-3:
            assert parity.original_padding[side] <= tolerance(name), parity


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone_on_both_sides(name, side, model):
    looped, tokens, lengths = model(name), recording(name)["input_ids"], (16, 11)
    padded = torch.zeros_like(tokens)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        place = slice(16 - length, 16) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    with torch.no_grad():
        logits = looped(padded, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = looped(tokens[row : row + 1, :length]).logits[0]
            assert_close(logits[row][mask[row].bool()], alone)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("chunks", [(9,), (5, 4, 4)], ids=str)
def test_cached_and_chunked_equal_uncached(name, chunks, model):
    looped, tokens = model(name), recording(name)["input_ids"]
    with torch.no_grad():
        whole = looped(tokens, use_cache=False).logits
        assert_close(stepwise_logits(looped, tokens, DynamicCache(config=looped.config), chunks), whole)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_model_that_is_saved_and_loaded_again_is_equal(name, model, tmp_path):
    looped, tokens = model(name), recording(name)["input_ids"]
    looped.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(name, tmp_path)(tokens).logits, looped(tokens).logits)


@pytest.mark.parametrize("name", FIXTURES)
def test_evaluation_without_a_given_state_is_deterministic(name, model):
    looped, tokens = model(name), recording(name)["input_ids"]
    with torch.no_grad():
        assert torch.equal(looped(tokens).logits, looped(tokens).logits)


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_ouro_read_from_any_loop_is_the_original_that_exits_there(loops, model):
    original = recording("ouro")
    logits = model("ouro")(original["input_ids"], num_loops=loops).logits
    assert_close(logits, original[f"exit_at_{loops - 1}"], tolerance("ouro"))


def test_ouro_exits_at_a_threshold_where_the_original_does(folders):
    original, halting = recording("ouro"), {"type": "gate", "threshold": 0.6}
    looped = load_with(folders("ouro"), halting=halting)
    assert_close(looped(original["input_ids"]).logits, original["exit_threshold_0.6"], tolerance("ouro"))


def test_ouro_expected_output_is_the_originals_mixture_of_logits(folders):
    original, halting = recording("ouro"), {"type": "gate", "output": "expected"}
    looped = load_with(folders("ouro"), halting=halting)
    assert_close(looped(original["input_ids"]).logits, original["weighted"], tolerance("ouro"))


def test_ouro_exit_distribution_is_that_of_the_originals_gate(model):
    original = recording("ouro")
    stop = original["gate_logits"].squeeze(-1).sigmoid()
    stop[-1] = 1.0  # the last loop takes the rest
    reached = torch.cat((torch.ones_like(stop[:1]), (1 - stop[:-1]).cumprod(dim=0)))
    output = model("ouro")(original["input_ids"])
    assert_close(output.exit_probabilities, (stop * reached).permute(1, 2, 0), 1e-6)


def test_the_universal_transformer_halts_each_token_where_the_original_does(model):
    original = recording("ut_act")
    output = model("ut_act")(original["input_ids"])
    assert torch.equal(output.exit_loops, original["act_n_updates"].long())


def load_with(folder, **fields):
    """The model in `folder` with other config fields."""
    config = LoopedConfig.from_pretrained(folder, **fields)
    return LoopedForCausalLM.from_pretrained(folder, config=config).eval()
