"""The flash-attention path, with a stand-in for the kernel: NO GPU RAN THIS, and no flash-attn package was installed.

Everything of Transformers' path runs as it would for `flash_attention_2` and `flash_attention_3` (masks, unpadding,
packing, dtype casts, windows), down to the two functions it imports from the flash-attn package. Those are replaced by
plain attention per sequence, which also checks what the real ones demand of their arguments.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS, assert_close, random_tokens, tiny_config, tiny_model
from transformers import DynamicCache, GenerationConfig, modeling_flash_attention_utils
from transformers.generation import ContinuousBatchingConfig

from modeling_looped import LoopedForCausalLM, LoopedForMaskedLM

NAMES = ("flash_attention_2", "flash_attention_3")
KEY_VARIANTS = ("concat", "in_place", "norms", "sliding", "shared")
PACKED_LENGTHS = (4, 1, 9, 6)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}


class FlashStandIn:
    """`flash_attn_func` and `flash_attn_varlen_func` in plain operations.

    Attributes:
        calls: (name, dtype, causal, window_size) of every call.
    """

    def __init__(self):
        self.calls: list[tuple[str, torch.dtype, bool, tuple[int, int]]] = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        """q [B, S, H, K], k and v [B, S', Hkv, K] -> [B, S, H, K]."""
        self._check("flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size)
        assert q.ndim == 4
        assert q.shape[0] == k.shape[0] == v.shape[0]
        return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        """q [tokens of all sequences, H, K], k and v likewise -> as q."""
        self._check("flash_attn_varlen_func", q, k, v, dropout_p, softmax_scale, causal, window_size)
        assert q.ndim == 3
        for begins, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert begins.dtype == torch.int32
            assert begins[0] == 0
            assert begins[-1] == len(tokens)
            assert int(longest) == begins.diff().max()
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        pieces = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([attend(*piece, softmax_scale, causal, window_size) for piece in pieces])

    def _check(self, name, q, k, v, dropout_p, softmax_scale, causal, window_size):
        assert q.dtype == k.dtype == v.dtype
        # float64 is not the kernel's: it lets the tests compare exactly
        assert q.dtype in (torch.float16, torch.bfloat16, torch.float64)
        assert q.shape[-2:] in ((4, 8), (6, 8)), "heads before channels"
        assert k.shape[-2:] == v.shape[-2:] == (q.shape[-2] // 2, 8), "key-value heads are not repeated"
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the kernel wants contiguous channels"
        assert softmax_scale == 8**-0.5
        assert dropout_p == 0.0
        self.calls.append((name, q.dtype, causal, tuple(window_size)))


def attend(q, k, v, scale, causal, window) -> torch.Tensor:
    """One sequence, [S, H, K] and [S', Hkv, K] -> [S, H, K]; causality and window count from the last key."""
    position = torch.arange(len(q))[:, None] + len(k) - len(q)
    distance = position - torch.arange(len(k))[None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    left, right = window
    if left >= 0:
        seen &= distance <= left
    if causal:
        seen &= distance >= 0
    elif right >= 0:
        seen &= -distance <= right
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.fixture
def flash(monkeypatch) -> FlashStandIn:
    stand_in = FlashStandIn()
    utils = modeling_flash_attention_utils
    functions = (stand_in.flash_attn_func, stand_in.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    return stand_in


def flash_model(name: str = NAMES[0], dtype: torch.dtype = torch.float64, **overrides) -> LoopedForCausalLM:
    model = tiny_model(std=1.0, **overrides).to(dtype)
    use(model, name)
    return model


def use(model: LoopedForCausalLM, name: str) -> LoopedForCausalLM:
    """Past the check that asks for a GPU: `set_attn_implementation` refuses a flash name on a machine without one."""
    model.config._attn_implementation_internal = name
    return model


def sdpa_logits(model: LoopedForCausalLM, *args, **kwargs) -> torch.Tensor:
    name = model.config._attn_implementation
    try:
        return use(model, "sdpa")(*args, **kwargs).logits
    finally:
        use(model, name)


@pytest.mark.parametrize(("variant", "name"), [*((variant, NAMES[0]) for variant in VARIANTS), ("sliding", NAMES[1])])
@torch.no_grad()
def test_flash_equals_sdpa(variant, name, flash):
    model = flash_model(name, **VARIANTS[variant])
    tokens = random_tokens(2, 11)
    expected = sdpa_logits(model, tokens)
    assert_close(model(tokens, use_cache=False).logits, expected)
    assert len(flash.calls) == model.config.slot_layout().num_invocations
    assert {(call, causal) for call, _, causal, _ in flash.calls} == {("flash_attn_func", True)}
    if variant == "sliding":
        windows = [window for *_, window in flash.calls]
        sliding = [kind == "sliding_attention" for kind in model.config.layer_types]
        assert windows == [(3, 3) if slides else (-1, -1) for slides in sliding]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_flash_gets_the_models_half_precision(dtype, flash):
    # the tolerance of bf16 is for logits of order one from weights of usual size
    model = use(tiny_model().to(dtype), NAMES[0])
    tokens = random_tokens(2, 11)
    assert_close(model(tokens).logits, sdpa_logits(model, tokens), atol=5e-2)
    assert {seen for _, seen, *_ in flash.calls} == {dtype}


@torch.no_grad()
def test_flash_gets_the_dtype_of_autocast(flash):
    model = use(tiny_model(), NAMES[0])
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens())
    assert {seen for _, seen, *_ in flash.calls} == {torch.bfloat16}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", KEY_VARIANTS)
@torch.no_grad()
def test_padding_is_cut_out(variant, side, flash):
    model = flash_model(**VARIANTS[variant])
    tokens = random_tokens(3, 9)
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9, [0] * 2 + [1] * 7])
    if side == "right":
        mask = mask.flip(1)
    logits = model(tokens, attention_mask=mask).logits
    assert {call for call, *_ in flash.calls} == {"flash_attn_varlen_func"}
    for row in range(3):
        seen = mask[row].bool()
        assert_close(logits[row, seen], sdpa_logits(model, tokens[row, seen][None])[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("variant", KEY_VARIANTS)
@torch.no_grad()
def test_packed_texts_equal_separate_texts(variant, use_cache, flash):
    model = flash_model(**VARIANTS[variant])
    tokens = random_tokens(1, sum(PACKED_LENGTHS))
    expected = torch.cat([sdpa_logits(model, text) for text in tokens.split(PACKED_LENGTHS, dim=1)], dim=1)
    positions = torch.cat([torch.arange(length) for length in PACKED_LENGTHS])[None]
    begins = torch.tensor([0, *torch.tensor(PACKED_LENGTHS).cumsum(0)], dtype=torch.int32)
    lengths = {"max_length_q": max(PACKED_LENGTHS), "max_length_k": max(PACKED_LENGTHS)}
    by_lengths = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, **lengths}
    for kwargs in ({"position_ids": positions}, by_lengths, {"position_ids": positions, **by_lengths}):
        assert_close(model(tokens, use_cache=use_cache, **kwargs).logits, expected)
    assert {call for call, *_ in flash.calls} == {"flash_attn_varlen_func"}
    assert len(flash.calls) == 3 * model.config.slot_layout().num_invocations, "the packing reached every loop"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", KEY_VARIANTS)
@torch.no_grad()
def test_generation_equals_sdpa(variant, kind, flash):
    model = flash_model(**VARIANTS[variant])
    tokens = random_tokens(2, 7)
    for num_loops in (1, 4):
        for mask in (torch.ones_like(tokens), torch.tensor([[0] * 3 + [1] * 4, [1] * 7])):
            kwargs = {"attention_mask": mask, "num_loops": num_loops, **GREEDY}
            generated = model.generate(tokens, cache_implementation=kind, **kwargs)
            expected = use(model, "sdpa").generate(tokens, **kwargs)
            use(model, NAMES[0])
            assert generated.tolist() == expected.tolist()
    assert flash.calls


@torch.no_grad()
def test_chunks_on_a_cache_equal_sdpa(flash):
    for variant in ("parcae", "sliding"):
        model = flash_model(**VARIANTS[variant])
        tokens = random_tokens(2, 12)
        cache = DynamicCache(config=model.config)
        logits = [model(piece, past_key_values=cache).logits for piece in tokens.split([5, 4, 1, 2], dim=1)]
        assert_close(torch.cat(logits, dim=1), sdpa_logits(model, tokens))


@pytest.mark.parametrize("num_loops", [None, 1])
@pytest.mark.parametrize("variant", ["parcae", "sliding", "shared"])
def test_generate_batch_equals_sdpa(variant, num_loops, flash):
    model = flash_model(**VARIANTS[variant])
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6)]
    results = model.generate_batch(
        prompts,
        GenerationConfig(**GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(page_size=256, num_blocks=4, max_batch_tokens=32),
        warmup=False,
        num_loops=num_loops,
    )
    use(model, "sdpa")
    for prompt, result in zip(prompts, results.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), num_loops=num_loops, **GREEDY)[0, len(prompt) :]
        assert result.generated_tokens == expected.tolist()
    assert {call for call, *_ in flash.calls} == {"flash_attn_varlen_func"}


@torch.no_grad()
def test_an_encoder_asks_for_no_causality(flash):
    model = LoopedForMaskedLM(tiny_config(is_causal=False)).eval().to(torch.float64)
    tokens = random_tokens(2, 9)
    use(model, NAMES[0])
    assert_close(model(tokens).logits, sdpa_logits(model, tokens))
    assert {causal for _, _, causal, _ in flash.calls} == {False}


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_pass_transformers_support_check(name, flash, monkeypatch):
    """As on a machine that has the package and a GPU: what remains to be checked is what the class says of itself."""
    version = int(name[-1])
    monkeypatch.setitem(
        modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version],
        "general_availability_check",
        lambda: True,
    )
    monkeypatch.setattr(LoopedForCausalLM, "_flash_attn_import_error", lambda *args, **kwargs: None)
    config = tiny_config(dtype="bfloat16")
    model = LoopedForCausalLM._from_config(config, attn_implementation=name)
    assert model.config._attn_implementation == name
    model.eval()(random_tokens())
    assert len(flash.calls) == model.config.num_hidden_layers
