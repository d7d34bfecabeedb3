"""Depth attention: which layers and loops a value is mixed over, and that every path carries them along.

Its equation is compared with `mix_depth` of `reference.py` in `test_reference_parity.py` and on random configurations.
"""

import pytest
import torch
from helpers import assert_close, random_tokens, tiny_model
from test_published_variants import NANBEIGE, convert, fields_of, random_published

from modeling_looped.depth_attention import mix_values


def test_without_anchors_a_value_is_its_own():
    query, key, value = (torch.randn(2, heads, 3, 4) for heads in (4, 2, 2))
    assert torch.equal(mix_values(query, key, value, ()), value)


def test_equal_keys_give_the_mean_of_the_values():
    query, key = torch.randn(2, 4, 3, 4), torch.randn(2, 2, 3, 4)
    values = torch.randn(3, 2, 2, 3, 4)
    mixed = mix_values(query, key, values[2], ((key, values[0]), (key, values[1])))
    assert_close(mixed, values.mean(0), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("stride", "anchors"), [(1, 8), (2, 4), (3, 2), (9, 1)])
def test_every_invocation_of_an_anchor_is_read_by_all_later_ones(stride, anchors):
    model = tiny_model(depth_attention={"type": "anchors", "stride": stride})
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, kwargs, ___: seen.append(len(kwargs["anchors"])), with_kwargs=True)
    model(random_tokens())
    # stored layers 0, then 1 and 2 in each of 3 loops, then 3
    layers = [0, 1, 2, 1, 2, 1, 2, 3]
    assert seen == [sum(layer % stride == 0 for layer in layers[:index]) for index in range(8)]
    assert seen[-1] + (3 % stride == 0) == anchors


@torch.no_grad()
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_beams_and_streams_beside_it(cache):
    model = tiny_model(std=1.0, depth_attention="anchors", residual_streams="mhc")
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    tokens = random_tokens()
    texts = model.generate(tokens, **options, **cache)
    alone = [model.generate(row[None], **options)[0] for row in tokens]
    assert torch.equal(texts, torch.stack(alone))


@torch.no_grad()
def test_compiled_blocks_take_the_anchors():
    model = tiny_model(depth_attention="anchors")
    expected = model(random_tokens(), num_loops=4).logits
    model.compile_blocks(backend="eager", fullgraph=True)
    assert_close(model(random_tokens(), num_loops=4).logits, expected)


def test_nanbeige_split_with_it_comes_in_and_goes_back_in_every_bit(tmp_path):
    options = {"enable_double_loop_split": True, "num_hidden_layers": 4, "enable_depth_attention": True}
    config = {**NANBEIGE, **options}
    looped = convert(config, random_published("nanbeige", config, []), tmp_path)
    # their default: half of the layers
    assert looped.config.depth_attention == {"type": "anchors", "stride": 2}
    with pytest.raises(ValueError, match=r"loop_share_kv=True \(with enable_depth_attention their code cannot"):
        fields_of("nanbeige", {**config, "loop_share_kv": True})
