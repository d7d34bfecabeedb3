"""Retrofit: the looped model keeps the teacher's weights and function, and its loops are the damped ones."""

import pytest
import torch
from helpers import TOLERANCE, assert_close, random_tokens
from teachers import TEACHERS, tiny_teacher, tiny_tokenizer
from transformers import AutoModelForCausalLM, QuantoConfig

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.conversion import (
    ConversionError,
    check_split,
    compare_at_one_loop,
    identity_loops,
    loss_by_loops,
    retrofit,
    text_windows,
)
from modeling_looped.conversion.verification import HELD_OUT_TEXT, refuse_difference
from modeling_looped.conversion.verification import TOLERANCE as LOGIT_TOLERANCE


@pytest.mark.parametrize("name", TEACHERS)
def test_one_loop_is_the_teacher(name):
    teacher = tiny_teacher(name)
    looped, tokens = retrofit(teacher, 2, 3, 1, 4), random_tokens(length=11)
    expected = teacher(tokens).logits
    assert expected.std() > 0.1
    assert_close(looped(tokens, num_loops=1).logits, expected)
    assert (looped(tokens).logits - expected).abs().max() > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-windows", "qwen3", "olmo2"])
def test_one_loop_generates_what_the_teacher_generates(name):
    teacher, tokens = tiny_teacher(name), random_tokens(length=9)
    looped = retrofit(teacher, 2, 3, 1, 4)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(looped.generate(tokens, num_loops=1, **settings), teacher.generate(tokens, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_kept_bit_by_bit_in_its_dtype(dtype):
    teacher = tiny_teacher("qwen3-biases", dtype=dtype)
    looped = retrofit(teacher, 2, 3, 1, 4)
    renamed = {
        key.replace("post_attention_layernorm", "pre_feedforward_layernorm"): tensor
        for key, tensor in teacher.state_dict().items()
    }
    assert looped.state_dict().keys() == renamed.keys()
    for key, tensor in looped.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, renamed[key])
        assert tensor.data_ptr() != renamed[key].data_ptr()  # training the one must not change the other


def test_two_loops_take_two_half_steps_of_the_teachers_middle_layers():
    """The teacher itself is run by hand: prelude, s <- (s + core(s)) / 2 twice, coda."""
    teacher, tokens = tiny_teacher("llama"), random_tokens(length=11)
    looped = retrofit(teacher, 2, 3, 1, 2)
    state = teacher.model.embed_tokens(tokens)
    position_ids = torch.arange(11)[None]
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    shared = {"attention_mask": mask, "position_embeddings": teacher.model.rotary_emb(state, position_ids)}

    def run(layers: range, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            hidden_states = teacher.model.layers[layer](hidden_states, **shared)
        return hidden_states

    state = run(range(2), state)
    for _ in range(2):
        state = (state + run(range(2, 5), state)) / 2
    expected = teacher.lm_head(teacher.model.norm(run(range(5, 6), state)))
    assert_close(looped(tokens).logits, expected)


def test_defaults_of_generation_and_mode_come_along():
    teacher = tiny_teacher("llama").train()
    teacher.generation_config.temperature = 0.4
    teacher.config._attn_implementation = "eager"
    looped = retrofit(teacher, 2, 3, 1, 4)
    assert looped.training
    assert looped.generation_config.temperature == 0.4
    assert looped.config._attn_implementation == "eager"
    assert looped.config.num_loops == 4
    assert looped.config.max_trained_loops is None


def test_an_update_with_weights_of_its_own_starts_as_the_teacher_too():
    teacher, tokens = tiny_teacher("llama"), random_tokens()
    looped = retrofit(teacher, 2, 3, 1, 4, loop_update={"type": "gated", "initial_gate": 0.25, "free_loops": 1})
    assert torch.allclose(torch.sigmoid(looped.model.loop_update.gate), torch.tensor(0.25))
    assert_close(looped(tokens, num_loops=1).logits, teacher(tokens).logits)


def test_identity_loops_start_as_the_teacher_at_every_count_and_learn_at_once():
    teacher, tokens = tiny_teacher("llama"), random_tokens()
    looped = retrofit(teacher, 2, 3, 1, 4, **identity_loops(2, 4))
    for loops in (1, 2, 4, 6):
        assert_close(looped(tokens, num_loops=loops).logits, teacher(tokens).logits)
    looped(tokens, labels=tokens, num_loops=4).loss.backward()
    for layer in looped.model.layers[2:5]:
        for adapter in (layer.self_attn.loop_adapters.o_proj, layer.mlp.loop_adapters.down_proj):
            assert adapter.A.shape[0] == 3  # one for each loop after the first
            assert adapter.B.grad.flatten(1).norm(dim=1).min() > 0
            assert adapter.shared_scale.grad.norm(dim=1).min() > 0


def test_identity_loops_are_refused_where_nothing_loops_and_behind_norms():
    with pytest.raises(ValueError, match="loops=1 must be at least 2"):
        identity_loops(2, 1)
    with pytest.raises(ValueError, match="would start branches of olmo2 at zero"):
        retrofit(tiny_teacher("olmo2"), 2, 3, 1, 4, **identity_loops(2, 4))
    with pytest.raises(ValueError, match="is the start of shared_scale='per_channel', not of 'none'"):
        LoopedConfig(loop_adapter={"type": "lora", "initial_scale": 0.0})


@pytest.mark.parametrize("update", ["learned_scale", {"type": "damped", "steps": 2}, "gated"], ids=str)
def test_an_update_that_changes_the_function_at_one_loop_is_refused(update):
    with pytest.raises(ValueError, match=r"loop_update=.* would change the function at one loop"):
        retrofit(tiny_teacher("llama"), 2, 3, 1, 4, loop_update=update)


@pytest.mark.parametrize(
    ("split", "nearest"),
    [((10, 4, 10), "13/4/13 or 10/10/10 or 10/4/16 or 16/4/10"), ((15, 0, 15), "14/1/15"), ((-1, 29, 2), "0/29/1")],
    ids=str,
)
def test_parts_that_are_not_all_layers_are_refused_with_the_nearest_that_are(split, nearest):
    with pytest.raises(ValueError, match=f"must be the teacher's 30 layers.*{nearest}"):
        check_split(30, *split)


def test_every_suggested_split_is_accepted():
    with pytest.raises(ValueError, match="for example") as raised:
        check_split(30, 10, 4, 10)
    suggestions = str(raised.value).split("for example ")[1].rstrip(".").split(" or ")
    assert len(suggestions) == 4
    for suggestion in suggestions:
        check_split(30, *map(int, suggestion.split("/")))


def test_a_loop_count_below_one_is_refused():
    with pytest.raises(ValueError, match="num_loops=0 must be an integer of at least 1"):
        retrofit(tiny_teacher("llama"), 2, 3, 1, 0)


def test_a_quantised_teacher_is_refused_by_the_name_of_its_method(tmp_path):
    tiny_teacher("llama").save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    with pytest.raises(ValueError, match=r"the teacher is quantised \(quanto\).*without a quantization_config"):
        retrofit(teacher, 2, 3, 1, 4)


def test_packed_weights_are_refused_by_their_keys():
    teacher = tiny_teacher("llama")
    teacher.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"not floating-point numbers.*: model\.layers\.0\.mlp\.up_proj\.weight"):
        retrofit(teacher, 2, 3, 1, 4)


def test_a_looped_model_is_no_teacher():
    with pytest.raises(ValueError, match="model_type='looped' is not a supported family"):
        retrofit(LoopedForCausalLM(LoopedConfig(vocab_size=97, hidden_size=24)), 2, 3, 1, 4)


@pytest.fixture
def windows() -> list[torch.Tensor]:
    return [random_tokens(1, 20, seed=1), random_tokens(1, 15, seed=2)]


def test_the_comparison_reports_the_losses_that_transformers_computes(windows):
    teacher = tiny_teacher("llama")
    looped = retrofit(teacher, 2, 3, 1, 4)
    comparison = compare_at_one_loop(teacher, looped, windows)
    losses = loss_by_loops(looped, windows, [1, 4])
    counts = [window.numel() - 1 for window in windows]

    def mean(model, **kwargs) -> float:
        total = sum(model(w, labels=w, **kwargs).loss.item() * n for w, n in zip(windows, counts, strict=True))
        return total / sum(counts)

    assert comparison.max_difference <= LOGIT_TOLERANCE
    assert comparison.tokens == 35
    assert comparison.max_logit == pytest.approx(max(teacher(window).logits.abs().max().item() for window in windows))
    assert comparison.teacher_loss == pytest.approx(mean(teacher), abs=1e-5)
    assert comparison.loss == pytest.approx(mean(looped, num_loops=1), abs=1e-5)
    assert losses == pytest.approx({1: mean(looped, num_loops=1), 4: mean(looped, num_loops=4)}, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_wrong_weight_is_found_and_its_layer_named(name, layer, windows):
    teacher = tiny_teacher(name)
    looped = retrofit(teacher, 2, 3, 1, 4)
    with torch.no_grad():  # as if a rotary checkpoint had been read without undoing its permutation
        weight = looped.model.layers[layer].self_attn.k_proj.weight
        weight.copy_(weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape))
    comparison = compare_at_one_loop(teacher, looped, windows)
    assert comparison.max_difference > 10 * LOGIT_TOLERANCE
    assert comparison.diverges_at == layer
    with pytest.raises(ConversionError, match=f"grows most in layer {layer}"):
        refuse_difference(comparison, LOGIT_TOLERANCE)


def test_a_model_that_is_not_a_number_is_refused(windows):
    teacher = tiny_teacher("llama")
    looped = retrofit(teacher, 2, 3, 1, 4)
    torch.nn.init.constant_(looped.model.norm.weight, torch.nan)
    with pytest.raises(ConversionError, match="by inf"):
        refuse_difference(compare_at_one_loop(teacher, looped, windows), LOGIT_TOLERANCE)


def test_windows_hold_the_whole_text_in_pieces_of_about_equal_size():
    tokenizer = tiny_tokenizer()
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    windows = text_windows(tokenizer, text, length=512)
    assert tokenizer.decode(torch.cat(windows, dim=1)[0]) == text
    assert max(window.shape[1] for window in windows) <= 512
    assert min(window.shape[1] for window in windows) > 256


def test_a_text_without_anything_to_predict_is_refused():
    with pytest.raises(ValueError, match="a loss needs at least 2"):
        text_windows(tiny_tokenizer(), "a")
