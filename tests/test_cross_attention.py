"""Cross-attention: a looped decoder reads an encoder's output as the naive reference does, on every path."""

import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, stepwise_logits, tiny_config, tiny_model
from hypothesis import given
from random_configs import configs, few, random_model
from reference import reference_logits
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from modeling_looped import LoopedConfig, LoopedForMaskedLM
from modeling_looped.config_checks import NORM_PLACEMENTS

DECODER = {"add_cross_attention": True, "is_decoder": True}
LORA = {"loop_adapter": {"type": "lora", "rank": 2}}
#: What cross-attention meets: every norm placement, and every option that acts on projections, loops or caches.
DECODERS = {
    **{name: VARIANTS[name] for name in ("parcae", "norms", "lora", "sliding", "huginn", "shared", "wide")},
    **{name: VARIANTS[name] for name in ("sequence", "universal", "gated_attention", "skip", "stacked")},
    **{f"norm_{placement}": {"norm_placement": placement} for placement in NORM_PLACEMENTS},
    "shared_lora": {"kv_sharing": "first_loop", **LORA},
    "query_lora": {"loop_adapter": {"type": "lora", "rank": 2, "targets": ["q_proj", "o_proj"]}},
    "flat": {"qk_norm": "flat", "attention_output_bias": True, "cross_attention_hidden_size": 20},
}
#: Those whose keys and values differ from loop to loop.
VARYING = {"norms", "lora"}
#: What the reference does not compute.
ROUTED = {"halting": "token_choice"}
NESTED = {"schedule": "nested", "injection": "none", "state_init": "input"}


def decoder(name, **overrides):
    return tiny_model(**{**DECODERS[name], **DECODER, **overrides})


def encoded_for(config, *, batch=2, length=5):
    """An encoder's output [batch, length, width]."""
    width = config.cross_attention_hidden_size or config.hidden_size
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(5))


def reference_of(model, tokens, encoded, **options):
    weights = dict(model.named_parameters())
    rows = [
        reference_logits(weights, model.config, row, encoded=source, **options)
        for row, source in zip(tokens, encoded, strict=True)
    ]
    return torch.stack(rows)


def gradients(model, output, encoded):
    """Gradient of a weighted sum of `output` by every parameter and by the encoder's output."""
    model.zero_grad()
    encoded.grad = None
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**found, "encoded": encoded.grad}


def assert_same_gradients(actual, expected):
    assert {name for name, grad in actual.items() if grad is None} == {
        n for n, grad in expected.items() if grad is None
    }
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(
                actual[name], grad, atol=1e-4, rtol=1e-3, msg=lambda text, at=name: f"{at}: {text}"
            )


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients_are_those_of_the_reference(name):
    model, tokens = decoder(name), random_tokens(length=6)
    encoded = encoded_for(model.config).requires_grad_()
    for loops in (None, 2):
        ours = model(tokens, encoder_hidden_states=encoded, num_loops=loops, use_cache=False).logits
        theirs = reference_of(model, tokens, encoded, num_loops=loops)
        assert_close(ours, theirs)
        assert_same_gradients(gradients(model, ours, encoded), gradients(model, theirs, encoded))
    changed = model(tokens, encoder_hidden_states=encoded.flip(1) * 2, use_cache=False).logits
    assert not torch.allclose(changed, model(tokens, encoder_hidden_states=encoded, use_cache=False).logits, atol=1e-3)


@few
@given(configs(**DECODER))
def test_any_decoder_is_the_reference_with_and_without_a_cache(config):
    model, tokens, encoded = random_model(config), random_tokens(length=5), encoded_for(config, length=4)
    with torch.no_grad():
        whole = model(tokens, encoder_hidden_states=encoded, use_cache=False).logits
        assert_close(whole, reference_of(model, tokens, encoded))
        cache = DynamicCache(config=config)
        both = EncoderDecoderCache(cache, DynamicCache(config=config))
        assert_close(stepwise_logits(model, tokens, both, (3,), encoder_hidden_states=encoded), whole)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_is_not_seen(attn_implementation, side):
    model = decoder("parcae", attn_implementation=attn_implementation)
    tokens, encoded = random_tokens(), encoded_for(model.config)
    mask = torch.ones(2, 5, dtype=torch.long)
    hidden = slice(0, 2) if side == "left" else slice(3, 5)
    mask[1, hidden] = 0
    with torch.no_grad():
        padded = model(tokens, encoder_hidden_states=encoded, encoder_attention_mask=mask).logits
        alone = model(tokens[1:], encoder_hidden_states=encoded[1:, mask[1].bool()]).logits
        seen = model(tokens, encoder_hidden_states=encoded).logits
    assert_close(padded[1:], alone)
    assert_close(padded[:1], seen[:1])
    assert not torch.allclose(padded[1], seen[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static", "plain"])
@pytest.mark.parametrize(
    "name", ["parcae", "lora", "norms", "shared_lora", "sliding", "sequence", "universal", "wide"]
)
def test_a_step_on_a_cache_is_the_whole(name, kind):
    model, tokens = decoder(name), random_tokens(length=9)
    config, encoded = model.config, encoded_for(model.config, length=7)
    match kind:
        case "dynamic":
            cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        case "static":
            # longer than the encoder's output, as one that served a longer source before
            kinds = [StaticCache(config=config, max_cache_len=length) for length in (12, 10)]
            cache = EncoderDecoderCache(*kinds)
        case _:
            cache = DynamicCache(config=config)
    with torch.no_grad():
        whole = model(tokens, encoder_hidden_states=encoded, use_cache=False).logits
        if kind == "plain":  # the model completes it, and returns what it made
            first = model(tokens[:, :4], encoder_hidden_states=encoded, past_key_values=cache)
            cache = first.past_key_values
            assert isinstance(cache, EncoderDecoderCache)
            rest = stepwise_logits(model, tokens[:, 4:], cache, (2,), encoder_hidden_states=encoded)
            assert_close(torch.cat((first.logits, rest), dim=1), whole)
        else:
            assert_close(stepwise_logits(model, tokens, cache, (4, 2), encoder_hidden_states=encoded), whole)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_holds_the_encoder_once_per_layer_unless_loops_differ(name):
    model = decoder(name)
    config, layout = model.config, model.config.slot_layout()
    output = model(random_tokens(), encoder_hidden_states=encoded_for(config), use_cache=True)
    layers = output.past_key_values.cross_attention_cache.layers
    filled = {slot for slot, layer in enumerate(layers) if layer.get_seq_length() == 5}
    if name in VARYING:
        assert filled == set(range(layout.num_slots))
    else:
        assert filled == {layout.slot(layer) for layer in range(layout.stored_layers)}
    assert all(layer.get_seq_length() == 0 for slot, layer in enumerate(layers) if slot not in filled)


@pytest.mark.parametrize("options", [NESTED, {**NESTED, **LORA}, ROUTED], ids=["nested", "nested_lora", "routed"])
def test_nested_and_routed_loops_read_the_encoder_on_a_cache_as_without(options):
    model, tokens = tiny_model(**options, **DECODER), random_tokens(length=6)
    encoded = encoded_for(model.config)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        whole = model(tokens, encoder_hidden_states=encoded, use_cache=False).logits
        assert_close(stepwise_logits(model, tokens, cache, (3,), encoder_hidden_states=encoded), whole)
        # zeroing the output projections of the core takes the encoder's part in the loops away
        for layer in model.model.layers[1:3]:
            layer.cross_attn.o_proj.weight.zero_()
        assert not torch.allclose(model(tokens, encoder_hidden_states=encoded).logits, whole, atol=1e-3)


@pytest.mark.parametrize("granularity", ["layer", "loop"])
@pytest.mark.parametrize("name", ["parcae", "lora", "shared_lora"])
def test_recomputed_layers_have_the_same_gradients(name, granularity):
    model = decoder(name, checkpoint_granularity=granularity).train()
    tokens, encoded = random_tokens(), encoded_for(model.config).requires_grad_()

    def of_a_call():
        return gradients(model, model(tokens, encoder_hidden_states=encoded, use_cache=False).logits, encoded)

    plain = of_a_call()
    model.activation_checkpointing_enable()
    assert_same_gradients(of_a_call(), plain)


@pytest.mark.parametrize("backprop_loops", [1, 2])
def test_truncated_loops_give_the_encoder_the_gradient_of_those_that_keep_a_graph(backprop_loops):
    """Keys and values that a loop without a graph handed on would leave their projections and the encoder without."""
    model = decoder("parcae", backprop_loops=backprop_loops).train()
    tokens, encoded = random_tokens(), encoded_for(model.config).requires_grad_()
    ours = gradients(model, model(tokens, encoder_hidden_states=encoded, use_cache=False).logits, encoded)
    assert ours["model.layers.1.cross_attn.k_proj.weight"].abs().max() > 0
    # the leading loops as a given state, so that nothing truncates what follows
    with torch.no_grad():
        states = model(
            tokens, encoder_hidden_states=encoded, use_cache=False, output_loop_hidden_states=True
        ).loop_hidden_states
    model.config.backprop_loops = None
    start = states[model.config.num_loops - backprop_loops]
    logits = model(
        tokens, encoder_hidden_states=encoded, use_cache=False, num_loops=backprop_loops, initial_state=start
    ).logits
    assert_same_gradients(ours, gradients(model, logits, encoded))


def test_attention_weights_of_both_kinds_are_returned():
    model = decoder("parcae", attn_implementation="eager")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    output = model(
        random_tokens(),
        encoder_hidden_states=encoded_for(model.config),
        encoder_attention_mask=mask,
        output_attentions=True,
    )
    slots = model.config.num_hidden_layers
    assert [len(output.attentions), len(output.cross_attentions)] == [slots, slots]
    for weights in output.cross_attentions:
        assert weights.shape == (2, 4, 7, 5)
        assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert weights[1, ..., 3:].max() == 0


@pytest.mark.slow
def test_a_whole_forward_is_one_graph_and_a_decoding_step_another():
    model, tokens = decoder("parcae", num_prelude_layers=0, num_core_layers=1, num_loops=2), random_tokens()
    encoded = encoded_for(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=8) for _ in range(2)))
    with torch.no_grad():
        whole = model(tokens, encoder_hidden_states=encoded, use_cache=False).logits
        assert_close(compiled(tokens, encoder_hidden_states=encoded, use_cache=False).logits, whole)
        model(tokens[:, :6], encoder_hidden_states=encoded, past_key_values=cache)
        step = compiled(tokens[:, 6:], encoder_hidden_states=encoded, past_key_values=cache).logits
    assert_close(step, whole[:, 6:])
    torch._dynamo.reset()


def test_every_projection_of_the_cross_attention_is_in_the_tensor_parallel_plan():
    plan = tiny_config(**DECODER, attention_gate="per_channel", qk_norm="per_head").base_model_tp_plan
    rule = {name: how for name, how in plan.items() if name.startswith("layers.*.cross_attn.")}
    assert rule == {
        **{f"layers.*.cross_attn.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.cross_attn.o_proj": "rowwise",
        **{f"layers.*.cross_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True with is_decoder=False"),
        ({**DECODER, "is_causal": False}, "is_decoder=True with is_causal=False"),
        ({**DECODER, "residual_streams": "mhc"}, "add_cross_attention=True with residual_streams='mhc'"),
        ({"cross_attention_hidden_size": 8}, "cross_attention_hidden_size=8 with add_cross_attention=False"),
        ({**DECODER, "cross_attention_hidden_size": 0}, "cross_attention_hidden_size=0 must be None or at least 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        LoopedConfig(**fields)


def test_input_that_does_not_fit_is_refused_by_name():
    model, plain, tokens = decoder("parcae"), tiny_model(), random_tokens()
    encoded = encoded_for(model.config)
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        model(tokens)
    with pytest.raises(ValueError, match=r"has the shape \(2, 5, 30\) and must have \(2, tokens, 32\)"):
        model(tokens, encoder_hidden_states=encoded[..., :30])
    with pytest.raises(ValueError, match=r"has the shape \(1, 5, 32\) and must have \(2, tokens, 32\)"):
        model(tokens, encoder_hidden_states=encoded[:1])
    with pytest.raises(ValueError, match=r"encoder_attention_mask has the shape \(2, 4\) and must have \(2, 5\)"):
        model(tokens, encoder_hidden_states=encoded, encoder_attention_mask=torch.ones(2, 4))
    packings = {"cu_seq_lens_q": torch.tensor([0, 3, 7]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    for name, packing in packings.items():
        with pytest.raises(ValueError, match=f"{name}.* with add_cross_attention=True"):
            model(tokens[:1], encoder_hidden_states=encoded[:1], **{name: packing})
    with pytest.raises(ValueError, match="add_cross_attention=False: nothing would read it"):
        plain(tokens, encoder_hidden_states=encoded)
    with pytest.raises(ValueError, match="is an EncoderDecoderCache, and add_cross_attention=False"):
        plain(tokens, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    with pytest.raises(ValueError, match="num_loops=2 needs a cache of 6 slots"):
        model(tokens, encoder_hidden_states=encoded, past_key_values=cache, num_loops=2)


@torch.no_grad()
def test_positions_that_pack_nothing_are_taken():
    """Counted on from another start, on a cache, or those of a padded row beside its mask."""
    model, tokens = decoder("parcae"), random_tokens()
    encoded, positions = encoded_for(model.config), torch.arange(7)[None]
    expected = model(tokens, encoder_hidden_states=encoded).logits
    assert_close(model(tokens, encoder_hidden_states=encoded, position_ids=positions + 3).logits, expected)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    steps = [
        model(tokens[:, at], encoder_hidden_states=encoded, position_ids=positions[:, at], past_key_values=cache)
        for at in (slice(0, 4), slice(4, 5), slice(5, 7))
    ]
    assert_close(torch.cat([step.logits for step in steps], dim=1), expected)
    padded, mask = torch.cat((tokens[:, :2], tokens), dim=1), torch.tensor([[0, 0, *[1] * 7]] * 2)
    shifted = torch.cat((torch.zeros_like(positions[:, :2]), positions), dim=1)
    output = model(padded, attention_mask=mask, position_ids=shifted, encoder_hidden_states=encoded)
    assert_close(output.logits[:, 2:], expected)


def test_what_a_decoder_with_an_encoder_cannot_do_is_refused_by_name():
    model = decoder("parcae")
    with pytest.raises(ValueError, match="add_cross_attention=True: a paged cache has no place"):
        model.generate_batch([[5, 6]])
    with pytest.raises(ValueError, match=r"add_cross_attention=True \(layers read an encoder's output"):
        model.unroll()
    model.config.add_cross_attention = False
    with pytest.raises(ValueError, match="add_cross_attention=False was written after the model was built"):
        model(random_tokens())
    with pytest.raises(ValueError, match="is_causal=True: LoopedForMaskedLM"):
        LoopedForMaskedLM(tiny_config(**DECODER))
