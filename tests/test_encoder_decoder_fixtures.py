"""The recorded Universal Transformers with a decoder: imported, they compute what the original code did."""

import json

import pytest
import torch
from fixtures.published import (
    ENCODER_DECODERS,
    SETTINGS,
    imported_folder,
    load,
    published_folder,
    recording,
    tolerance,
    weights_file,
)
from helpers import assert_close
from safetensors.torch import load_file, save_file
from transformers import EncoderDecoderModel

from modeling_looped.conversion import export_checkpoint, import_checkpoint
from modeling_looped.conversion.tensor_map import same_bits


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def imported(request, tmp_path_factory):
    """Name of the fixture, and the folder that `import_checkpoint` made of it."""
    return request.param, imported_folder(request.param, tmp_path_factory.mktemp(request.param))


def test_the_logits_are_those_of_the_original(imported):
    name, folder = imported
    original, model = recording(name), load(name, folder)
    with torch.no_grad():
        output = model(original["input_ids"], decoder_input_ids=original["decoder_input_ids"])
        exact = model.double()(original["input_ids"], decoder_input_ids=original["decoder_input_ids"]).logits
    assert isinstance(model, EncoderDecoderModel)
    assert_close(output.logits, original["logits"], tolerance(name))
    assert_close(exact, original["logits_fp64"], tolerance(name))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_padded_source_gives_the_logits_of_the_original_on_the_row_alone(imported, attn_implementation):
    """The original knows no padding, so it was run on the shorter row by itself."""
    name, folder = imported
    original, model = recording(name), load(name, folder)
    model.set_attn_implementation(attn_implementation)
    inputs = {key: original[f"short.{key}"] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=original["decoder_input_ids"]).logits
    assert_close(logits[1:], original["short.logits"], tolerance(name))
    assert_close(logits[:1], original["logits"][:1], tolerance(name))


def test_each_token_of_both_sides_halts_where_the_original_does(tmp_path):
    original = recording("ut_decoder_act")
    model = load("ut_decoder_act", imported_folder("ut_decoder_act", tmp_path))
    with torch.no_grad():
        encoded = model.encoder(original["input_ids"])
        decoded = model.decoder(original["decoder_input_ids"], encoder_hidden_states=encoded.last_hidden_state)
    assert len(original["encoder_act_n_updates"].unique()) > 1
    assert len(original["act_n_updates"].unique()) > 1
    assert torch.equal(encoded.exit_loops, original["encoder_act_n_updates"].long())
    assert torch.equal(decoded.exit_loops, original["act_n_updates"].long())


def test_exported_again_it_is_the_original_in_every_bit(imported, tmp_path):
    name, folder = imported
    export_checkpoint(folder, tmp_path / "back")
    before, after = load_file(weights_file(name)), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    config = [json.loads((at / "config.json").read_text()) for at in (tmp_path / "back", folder.parent / "published")]
    assert config[0] == config[1]


def test_saved_and_loaded_again_it_generates_the_same_with_and_without_a_cache(imported, tmp_path):
    name, folder = imported
    model, tokens = load(name, folder), recording(name)["short.input_ids"]
    mask = recording(name)["short.attention_mask"]
    model.save_pretrained(tmp_path)
    again = load(name, tmp_path)

    def generate(model, **options):
        return model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)

    expected = generate(model, use_cache=False)
    assert torch.equal(generate(model), expected)
    assert torch.equal(generate(again, cache_implementation="static"), expected)


def test_embeddings_that_have_come_to_differ_cannot_be_one_table_again(imported, tmp_path):
    """The original has one table for both sides; ours may be trained apart."""
    name, folder = imported
    model = load(name, folder)
    with torch.no_grad():
        model.encoder.embed_tokens.weight += 1.0
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="have come to differ"):
        export_checkpoint(tmp_path / "trained", tmp_path / "back", like=folder)


def test_the_recording_is_compared_with_before_anything_is_written(tmp_path):
    source = published_folder("ut_decoder", tmp_path / "published")
    original = recording("ut_decoder")
    options = {"settings": SETTINGS["ut_decoder"], "tolerance": tolerance("ut_decoder")}
    save_file(original, tmp_path / "recording.safetensors")
    manifest = import_checkpoint(str(source), tmp_path / "a", recording=tmp_path / "recording.safetensors", **options)
    assert manifest["checks"]["original"]["logits"] <= tolerance("ut_decoder")
    save_file({**original, "logits": original["logits"] + 1e-3}, tmp_path / "recording.safetensors")
    with pytest.raises(RuntimeError, match="is not what the original was"):
        import_checkpoint(str(source), tmp_path / "b", recording=tmp_path / "recording.safetensors", **options)
    assert not (tmp_path / "b").exists()


def test_convolutions_are_refused_by_name(tmp_path):
    """The port's own layers are fixed to `layer_config="cc"`; see the limits in conversion/README.md."""
    source = published_folder("ut_decoder", tmp_path / "published")
    weights = load_file(source / "model.safetensors")
    for part in ("enc.enc", "dec.dec"):
        for index in (0, 1):
            stem = f"{part}.positionwise_feed_forward.layers.{index}"
            weights[f"{stem}.conv.weight"] = weights.pop(f"{stem}.weight")[..., None].repeat(1, 1, 3)
            weights[f"{stem}.conv.bias"] = weights.pop(f"{stem}.bias")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="convolutions in the feed-forward layers"):
        import_checkpoint(str(source), tmp_path / "a", settings=SETTINGS["ut_decoder"])
