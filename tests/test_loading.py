"""Loading gives back the model that was saved: whatever the loader, the seed, the dtype, or what memory held before.

`poisoned_memory` fills everything that torch allocates without a value with NaN, so that a parameter or a buffer that
nobody initialises or loads shows in the logits.
"""

import copy
import pickle

import accelerate
import pytest
import torch
from helpers import TOLERANCE, VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, QuantoConfig

from modeling_looped import (
    LoopedForCausalLM,
    LoopedForMaskedLM,
    LoopedForQuestionAnswering,
    LoopedForSequenceClassification,
    LoopedForTokenClassification,
    LoopedModel,
)

TOKENS = random_tokens(2, 9)
TABLES = [name for name in VARIANTS if name in ("scaled", "embedding", "norms", "lora")]


@pytest.fixture
def poisoned_memory(monkeypatch):
    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return poisoned

    # The first time that a device context is entered, torch remembers its constructors: let it see the real ones.
    with torch.device("meta"):
        torch.empty(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@torch.no_grad()
def logits(model, **kwargs):
    return model.eval()(TOKENS, **kwargs).logits


def realigned(model):
    """A copy, whose weights lie in memory as torch aligns it: equal weights that lie as in their file can give other
    last bits.
    """
    return copy.deepcopy(model)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", VARIANTS)
def test_loading_gives_the_saved_model_whatever_the_seed_and_the_loader(tmp_path, name):
    model = tiny_model(**VARIANTS[name])
    saved(model, tmp_path)
    for seed, how in ((1, {}), (2, {}), (3, {"device_map": "cpu"}), (4, {"dtype": "auto"})):
        torch.manual_seed(seed)
        loaded, info = LoopedForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **how)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert_same_tensors(dict(loaded.named_buffers()), dict(LoopedForCausalLM(model.config).named_buffers()))
        assert torch.equal(logits(realigned(loaded)), logits(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_and_buffer_is_initialised_when_a_model_is_built(poisoned_memory, name):
    assert torch.empty(3).isnan().all()
    model = LoopedForCausalLM(tiny_config(**VARIANTS[name]))
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), key
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_loading_leaves_nothing_uninitialised(tmp_path, poisoned_memory, name):
    model = tiny_model(**VARIANTS[name])
    assert torch.equal(logits(realigned(LoopedForCausalLM.from_pretrained(saved(model, tmp_path)))), logits(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_built_without_memory_recovers_everything_in_init_weights(name):
    """As FSDP does it: built on the meta device, given memory, initialised, and only then loaded."""
    model = tiny_model(**VARIANTS[name])
    with torch.device("meta"):
        loaded = LoopedForCausalLM(model.config)
    assert all(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.fill_(float("nan"))
    for module in loaded.modules():
        module._is_hf_initialized = False
    loaded.initialize_weights()
    assert logits(loaded).isfinite().all()
    loaded.load_state_dict(model.state_dict())
    loaded.tie_weights()
    assert_same_tensors(dict(loaded.named_buffers()), dict(model.named_buffers()))
    assert torch.equal(logits(loaded), logits(model))


def test_accelerate_loads_into_a_model_without_memory(tmp_path):
    model = tiny_model()
    saved(model, tmp_path)
    with accelerate.init_empty_weights():
        loaded = LoopedForCausalLM(model.config)
    loaded = accelerate.load_checkpoint_and_dispatch(loaded, str(tmp_path / "model.safetensors"), {"": "cpu"})
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_checkpoints_keep_their_dtype_and_compute_nearly_the_same(tmp_path, name):
    model = tiny_model(**VARIANTS[name])
    expected = logits(model)
    saved(model, tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert (logits(loaded).float() - expected).abs().max() < TOLERANCE[torch.bfloat16]
    saved(loaded, tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same_tensors(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_equals_loading_it_in_that_dtype(tmp_path, dtype):
    """The rotary frequencies stay in fp32: rounded, they would be off by almost a radian at position 2000."""
    model = tiny_model()
    saved(model, tmp_path)
    loaded, cast = LoopedForCausalLM.from_pretrained(tmp_path, dtype=dtype), model.to(dtype)
    assert_same_tensors(dict(cast.named_buffers()), dict(loaded.named_buffers()))
    assert {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
    assert torch.equal(logits(cast), logits(loaded))
    assert logits(cast).isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_one_parameter_and_one_tensor_on_disk(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    saved(model, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("head", [LoopedForCausalLM, LoopedForMaskedLM])
def test_tied_weights_are_declared_as_target_and_source(head):
    assert head._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    config = tiny_config(is_causal=head is LoopedForCausalLM, tie_word_embeddings=True)
    assert head(config).all_tied_weights_keys == head._tied_weights_keys


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_keep_the_old_tokens_and_survive_saving(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    before = logits(model)
    model.resize_token_embeddings(105, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == 105
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert logits(model).shape[-1] == 105
    torch.testing.assert_close(logits(model)[..., :97], before)
    assert torch.equal(logits(LoopedForCausalLM.from_pretrained(saved(model, tmp_path))), logits(model))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_unexpected_weights_are_reported(tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.not_ours.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    saved(tiny_model(), tmp_path)
    rewrite(tmp_path, change)
    model, info = LoopedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}
    assert info["unexpected_keys"] == {"model.layers.1.mlp.not_ours.weight"}
    assert logits(model).isfinite().all()


def test_a_weight_of_another_shape_is_refused_or_drawn_afresh(tmp_path):
    def change(tensors):
        tensors["model.injection.A_log"] = torch.ones(7)

    saved(tiny_model(), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LoopedForCausalLM.from_pretrained(tmp_path)
    model, info = LoopedForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {name for name, *_ in info["mismatched_keys"]} == {"model.injection.A_log"}
    assert model.model.injection.A_log.eq(0.0).all()  # its documented start


@pytest.mark.parametrize("num_loops", [1, 5])
@pytest.mark.parametrize("name", ["parcae", *TABLES])
def test_a_loop_count_given_at_loading_is_that_of_the_loaded_model(tmp_path, name, num_loops):
    model = tiny_model(**VARIANTS[name])
    saved(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_loops=num_loops)
    assert loaded.config.num_loops == num_loops
    assert loaded.config.num_hidden_layers == 2 + 2 * num_loops
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model, num_loops=num_loops))
    tokens = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(TOKENS, max_new_tokens=4, do_sample=False, num_loops=num_loops))


HEADS = {
    LoopedForCausalLM: {"lm_head.weight"},
    LoopedForMaskedLM: {"lm_head.weight"},
    LoopedForSequenceClassification: {"score.weight"},
    LoopedForTokenClassification: {"score.weight", "score.bias"},
    LoopedForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.mark.parametrize("head", HEADS)
def test_base_checkpoints_load_into_heads_and_back(tmp_path, head):
    base = randomise(LoopedModel(tiny_config(is_causal=head is not LoopedForMaskedLM))).eval()
    with_head, info = head.from_pretrained(saved(base, tmp_path / "base"), output_loading_info=True)
    assert info["missing_keys"] == HEADS[head]
    assert not info["unexpected_keys"]
    saved(with_head, tmp_path / "head")
    back, info = LoopedModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_tensors(back.state_dict(), base.state_dict())
    with torch.no_grad():
        expected = base(TOKENS).last_hidden_state
        assert torch.equal(with_head.model.eval()(TOKENS).last_hidden_state, expected)
        assert torch.equal(back(TOKENS).last_hidden_state, expected)


COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


# pickle restores what deepcopy copies; a few variants prove that one for itself
@pytest.mark.parametrize(
    ("name", "how"), [*((name, "pickle") for name in VARIANTS), ("parcae", "copy"), ("parcae_code", "copy")]
)
def test_copies_compute_the_same_and_are_independent(name, how):
    model, how = tiny_model(**VARIANTS[name]), COPIES[how]
    expected = logits(model, num_loops=4)  # builds dispatchers of slots beyond the registered ones
    twin = how(model)
    assert twin.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(twin, num_loops=4), expected)
    assert {id(module) for module in twin.modules()}.isdisjoint({id(module) for module in model.modules()})
    for layer in twin.model.layers:
        attention = layer.self_attn
        assert [attention.slot(slot.layer_idx) is slot for slot in attention.slots] == [True] * len(attention.slots)
    twin.config.num_loops = 2
    randomise(twin, seed=9)
    assert torch.equal(logits(model, num_loops=4), expected)
    assert model.config.num_loops == 3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantising_at_loading_quantises_each_stored_projection_once(tmp_path, weights):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is in constraints.txt, not required")
    model = tiny_model(hidden_size=64, intermediate_size=128)
    saved(model, tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights=weights))
    quantised = [name for name, module in loaded.named_modules() if isinstance(module, quanto.QLinear)]
    assert len(quantised) == 7 * model.config.num_stored_layers
    error = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0.0 < error < {"int8": 0.05, "int4": 0.5}[weights]
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_an_attribute_set_on_a_config_never_makes_the_checkpoint_unreadable(tmp_path):
    """Transformers stores whatever is set; its own tests set `norm_eps`, which is close to a field's name."""
    model = tiny_model()
    model.config.norm_eps = 1.0
    model.config.note = "kept"
    loaded = LoopedForCausalLM.from_pretrained(saved(model, tmp_path))
    assert (loaded.config.norm_eps, loaded.config.note) == (1.0, "kept")
    assert torch.equal(logits(loaded), logits(model))
