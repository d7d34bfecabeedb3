"""Transformers' stock `EncoderDecoderModel` of two looped models: generation, training, saving, adapters."""

import pytest
import torch
from helpers import assert_close, random_tokens, randomise, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, EncoderDecoderModel

from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM, LoopedModel

DECODER = {"add_cross_attention": True, "is_decoder": True}
SOURCE, TARGET = random_tokens(2, 9), random_tokens(2, 7, seed=1)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
ENCODER_LOOPS, DECODER_LOOPS = 2, 3
VARIANTS = {
    "parcae": {},
    "lora": {"loop_adapter": {"type": "lora", "rank": 2}},
    "sliding": {"sliding_window": 3, "stored_layer_types": ["full_attention", "sliding_attention"] * 2},
    "universal": {
        "halting": {"type": "act", "form": "universal", "threshold": 0.9, "initial_bias": -0.5},
        "loop_conditioning": {"type": "sinusoidal", "positions": "every_loop"},
        "position_embedding": "none",
        "tie_word_embeddings": True,
    },
}


def encoder(**overrides):
    return randomise(LoopedModel(tiny_config(is_causal=False, num_loops=ENCODER_LOOPS, **overrides)), std=1.0).eval()


def pair(encoder_model=None, **overrides) -> EncoderDecoderModel:
    """A stock model whose decoder has options `overrides`; at this spread each loop count chooses other tokens."""
    torch.manual_seed(0)
    decoder = tiny_model(std=1.0, num_loops=DECODER_LOOPS, **DECODER, **overrides)
    model = EncoderDecoderModel(encoder=encoder() if encoder_model is None else encoder_model, decoder=decoder).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    return model


def generated(model, **options):
    inputs = {"attention_mask": MASK, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    return model.generate(SOURCE, **inputs, **options)


def logits(model, **options):
    with torch.no_grad():
        return model(SOURCE, attention_mask=MASK, decoder_input_ids=TARGET, **options).logits


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_cache_generates_what_no_cache_does(name, beams):
    model = pair(**VARIANTS[name])
    expected = generated(model, use_cache=False, num_beams=beams)
    assert torch.equal(generated(model, num_beams=beams), expected)
    assert torch.equal(generated(model, num_beams=beams, cache_implementation="static"), expected)
    # and one sequence alone, without its padding, what it does in a batch
    alone = model.generate(SOURCE[1:, :6], max_new_tokens=7, min_new_tokens=7, do_sample=False, num_beams=beams)
    assert torch.equal(alone[0], expected[1])


def test_prompt_lookup_and_an_assistant_give_the_greedy_tokens():
    """Assisted decoding takes back what was drafted, so it crops both halves of the cache; one sequence at a time."""
    model, assistant = pair(), pair()
    assistant.decoder.config.num_loops = 1
    options = {"max_new_tokens": 7, "do_sample": False}
    for row, length in ((0, 9), (1, 6)):
        source = SOURCE[row : row + 1, :length]
        expected = model.generate(source, **options)
        assert torch.equal(model.generate(source, prompt_lookup_num_tokens=3, **options), expected)
        assert torch.equal(model.generate(source, assistant_model=assistant, **options), expected)


def test_greedy_tokens_are_those_of_whole_forwards():
    model = pair()
    tokens = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(7):
            output = model(SOURCE, attention_mask=MASK, decoder_input_ids=tokens, use_cache=False)
            step = output.logits[:, -1]
            step[:, 2] = -torch.inf  # `min_new_tokens` forbids the end of the text
            tokens = torch.cat((tokens, step.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated(model), tokens)


@pytest.mark.parametrize("loops", [1, 4])
def test_either_side_runs_at_another_loop_count(loops):
    model = pair()
    default = logits(model)
    decoder_changed = logits(model, decoder_num_loops=loops)
    encoder_changed = logits(model, num_loops=loops)
    assert not torch.allclose(decoder_changed, default, atol=1e-3)
    assert not torch.allclose(encoder_changed, default, atol=1e-3)

    model.decoder.config.num_loops = loops
    assert_close(logits(model), decoder_changed)
    tokens = generated(model)
    assert torch.equal(tokens, generated(model, use_cache=False))
    assert torch.equal(tokens, generated(model, cache_implementation="static"))
    of_the_call = generated(model, num_loops=loops)  # the encoder's
    model.encoder.config.num_loops = loops
    assert torch.equal(generated(model), of_the_call)
    assert_close(logits(model), logits(model, num_loops=loops, decoder_num_loops=loops))


def test_both_sides_attend_by_the_implementation_that_is_set_later():
    """`EncoderDecoderModel` gives its two models configs of its own, which all their modules must read."""
    model = pair()
    model.set_attn_implementation("eager")
    output = model(SOURCE, attention_mask=MASK, decoder_input_ids=TARGET, output_attentions=True)
    assert len(output.encoder_attentions) == model.config.encoder.num_hidden_layers
    assert len(output.decoder_attentions) == model.config.decoder.num_hidden_layers
    assert len(output.cross_attentions) == model.config.decoder.num_hidden_layers
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), output.logits)


def test_a_decoder_generates_by_itself_from_the_encoders_output():
    """Without the model around it, `generate` makes a plain cache, which the decoder completes."""
    decoder = tiny_model(std=1.0, **DECODER)
    encoded = encoder()(SOURCE, attention_mask=MASK).last_hidden_state
    inputs = {"encoder_hidden_states": encoded, "encoder_attention_mask": MASK}
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    for more in ({}, {"num_loops": 2}, {"num_beams": 3}):
        expected = decoder.generate(TARGET, **inputs, **options, **more, use_cache=False)
        assert torch.equal(decoder.generate(TARGET, **inputs, **options, **more), expected)
        static = decoder.generate(TARGET, **inputs, **options, **more, cache_implementation="static")
        assert torch.equal(static, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_again_it_is_equal(name, tmp_path):
    model = pair(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    again, loading = EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert isinstance(again.encoder, LoopedModel)
    assert isinstance(again.decoder, LoopedForCausalLM)
    assert_close(logits(again.eval()), logits(model), 1e-5)
    assert torch.equal(generated(again), generated(model))


def test_two_checkpoints_become_one_model_with_new_cross_attentions(tmp_path):
    """A masked model and a causal one, neither of which has a cross-attention."""
    LoopedForMaskedLM(tiny_config(is_causal=False)).save_pretrained(tmp_path / "encoder")
    causal = tiny_model()
    causal.save_pretrained(tmp_path / "decoder")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    assert model.decoder.config.add_cross_attention
    new = {name for name in model.decoder.state_dict() if "cross_attn" in name}
    assert len(new) == 4 * 5  # a layer: q, k, v, o and the norm before them
    for name, weight in causal.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[name], weight)


def test_a_decoder_that_was_built_without_cross_attention_says_so():
    """`EncoderDecoderModel` writes `add_cross_attention=True` to the config of whatever it is given."""
    model = EncoderDecoderModel(encoder=encoder(), decoder=tiny_model())
    with pytest.raises(ValueError, match="add_cross_attention=True was written after the model was built with False"):
        logits(model)


@pytest.mark.parametrize("width", [None, 20])
def test_an_encoder_of_another_width_is_projected_or_read_as_it_is(width):
    """Without `cross_attention_hidden_size` the model around both has a projection."""
    bert = BertConfig(vocab_size=97, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = pair(BertModel(bert), cross_attention_hidden_size=width)
    assert hasattr(model, "enc_to_dec_proj") == (width is None)
    assert model.decoder.model.layers[0].cross_attn.k_proj.in_features == (width or 32)
    assert torch.equal(generated(model), generated(model, use_cache=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter_of_both_sides(checkpointing):
    model = pair().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    logits = model(SOURCE, attention_mask=MASK, decoder_input_ids=TARGET, use_cache=False).logits
    logits.square().mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_lora_on_both_attentions_trains_and_merges_exactly():
    model = pair()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    targets = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_modules() if ".lora_A" in name}
    for part in (
        "encoder.layers.1.self_attn",
        "decoder.model.layers.1.self_attn",
        "decoder.model.layers.1.cross_attn",
    ):
        assert {f"base_model.model.{part}.{name}_proj" for name in "qv"} <= targets
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    output = adapted(SOURCE, attention_mask=MASK, decoder_input_ids=TARGET, use_cache=False).logits
    output.square().mean().backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
    merged = adapted.merge_and_unload()
    assert not torch.allclose(logits(pair()), output, atol=1e-3)
    assert_close(logits(merged), output)
    assert torch.equal(generated(merged), generated(merged, use_cache=False))
