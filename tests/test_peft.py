"""PEFT on a looped model: one adapter per stored projection, merges that keep the function, and no new file needed.

PEFT sees a looped layer once, however often it runs, so an adapter on it acts in every loop.
"""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers import VARIANTS, assert_close, random_tokens, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from training import weights
from transformers import AutoModelForCausalLM

from modeling_looped import LoopedForCausalLM
from modeling_looped.remote_code import copy_code

TOKENS = random_tokens()

#: Methods that change or add to the projections, and can be merged into them.
MERGED = {
    "lora": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "lora_everywhere": LoraConfig(target_modules="all-linear"),
    "lora_defaults": LoraConfig(),
    "dora": LoraConfig(target_modules="all-linear", use_dora=True),
    "ia3": peft.IA3Config(),
    "loha": peft.LoHaConfig(target_modules="all-linear"),
    "adalora": peft.AdaLoraConfig(total_step=10),
    "vera": peft.VeraConfig(r=4),
}

#: Methods that put learned tokens or keys in front of the text.
PROMPTS = {
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


def same_model(**overrides) -> LoopedForCausalLM:
    """The same tiny model at every call."""
    torch.manual_seed(0)
    return tiny_model(**overrides)


def adapted(model: torch.nn.Module, config: peft.PeftConfig) -> PeftModel:
    """`model` with an adapter that has been moved from its start, where it does nothing."""
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted_modules(model: torch.nn.Module) -> list[str]:
    """Paths, in the unwrapped model, of the modules that carry an adapter."""
    found = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [name.removeprefix("base_model.model.") for name in found]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_linear_puts_one_adapter_on_every_stored_projection_and_nowhere_else(variant):
    """Not on the injections' matrices, not on the loop adapters, not on the head, and not once per loop."""
    model = same_model(**VARIANTS[variant])
    config, names = model.config, ["q_proj", "k_proj", "v_proj", "o_proj"]
    if config.attention_gate != "none":
        names.append("gate_proj")
    expected = {
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(config.num_stored_layers)
        for part, projections in (("self_attn", names), ("mlp", config.mlp_projections))
        for name in projections
    }
    expected |= {f"model.layers.{layer}.self_attn.value_gate" for layer in config.value_embedding.get("layers", ())}
    if config.embedding_size is not None:
        expected.add("model.embedding_projection")
    tables = config.ngram_embedding.get("table_sizes", ())
    expected |= {f"model.ngram_embedding.projections.{table}" for table in range(len(tables))}
    found = adapted_modules(adapted(model, LoraConfig(target_modules="all-linear")))
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("method", MERGED)
def test_merging_keeps_the_logits_at_every_loop_count(method):
    model = same_model()
    plain = {num_loops: model(TOKENS, num_loops=num_loops).logits for num_loops in (1, 3, 5)}
    model = adapted(model, MERGED[method])
    unmerged = {num_loops: model(TOKENS, num_loops=num_loops).logits for num_loops in plain}
    merged = model.merge_and_unload()
    assert type(merged) is LoopedForCausalLM
    assert adapted_modules(merged) == []
    for num_loops, logits in unmerged.items():
        assert (logits - plain[num_loops]).abs().max() > 1e-2
        assert_close(merged(TOKENS, num_loops=num_loops).logits, logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_lora_keeps_the_logits_of_every_variant(variant):
    model = adapted(same_model(**VARIANTS[variant]), LoraConfig(target_modules="all-linear"))
    logits = model(TOKENS).logits
    assert_close(model.merge_and_unload()(TOKENS).logits, logits)


@pytest.mark.parametrize("method", MERGED)
def test_an_adapter_trains_in_every_checkpointing_mode_alike(method):
    gradients = {}
    for mode in (None, "layer", "loop"):
        model = adapted(same_model(checkpoint_granularity=mode or "layer"), MERGED[method]).train()
        if mode is not None:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients[mode] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in gradients[mode].items() if gradient is None] == []
        assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    for name, gradient in gradients[None].items():
        assert torch.equal(gradients["layer"][name], gradient), name
        assert torch.equal(gradients["loop"][name], gradient), name


@pytest.mark.parametrize("method", [*MERGED, *PROMPTS])
def test_a_saved_adapter_loads_onto_a_fresh_base_model(method, tmp_path):
    model = adapted(same_model(), {**MERGED, **PROMPTS}[method])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_model(), tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_saved_adapter_loads_through_the_auto_class(tmp_path):
    """The adapter's folder names the base model's."""
    same_model().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.slow
def test_default_targets_cost_no_import_of_peft():
    """Without PEFT in the process nothing imports it; with it, making a model enters the defaults."""
    program = """
import sys
from modeling_looped import LoopedConfig, LoopedForCausalLM
config = LoopedConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2)
LoopedForCausalLM(config)
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
get_peft_model(LoopedForCausalLM(config), LoraConfig())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=Path(__file__).parent.parent)


def test_layers_to_transform_counts_stored_layers():
    """Layer 1 is the first core layer, which runs in slots 1, 3 and 5."""
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    assert adapted_modules(adapted(same_model(), config)) == ["model.layers.1.self_attn.q_proj"]


def test_the_models_own_adapter_methods_work(tmp_path):
    """`add_adapter` and `load_adapter`, Transformers' way without a `PeftModel` around."""
    model, plain = same_model(), same_model()(TOKENS).logits
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with_adapter = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    loaded = same_model()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded(TOKENS).logits, with_adapter)
    loaded.disable_adapters()
    assert torch.equal(loaded(TOKENS).logits, plain)
    assert not torch.equal(with_adapter, plain)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
@pytest.mark.parametrize("method", PROMPTS)
def test_learned_prompts_run_train_and_generate(method):
    model = adapted(same_model(), PROMPTS[method])
    mask = torch.ones_like(TOKENS)
    generated = model.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    greedy = TOKENS
    for _ in range(4):  # without a cache of the text's own keys
        logits = model(greedy, attention_mask=torch.ones_like(greedy)).logits
        greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, greedy)
    model.train()(TOKENS, attention_mask=mask, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_prefix_has_keys_for_every_slot_and_belongs_to_one_loop_count():
    model = adapted(same_model(), PROMPTS["prefix"])
    assert model.active_peft_config.num_layers == model.config.num_hidden_layers == 8
    with pytest.raises(ValueError, match="a cache belongs to one loop count"):
        model(TOKENS, num_loops=2)


def test_peft_leaves_loop_adapters_alone():
    """They are weights of the model: PEFT adapts and merges the shared projections beside them."""
    model = same_model(loop_adapter={"type": "lora", "rank": 3})
    own = {name: tensor for name, tensor in weights(model).items() if "loop_adapters" in name}
    assert own
    model = adapted(model, LoraConfig(target_modules="all-linear"))
    assert not any("loop_adapters" in name for name in adapted_modules(model))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "loop_adapters" in name)
    merged = weights(model.merge_and_unload())
    assert all(torch.equal(merged[name], tensor) for name, tensor in own.items())


def test_loop_adapters_and_a_peft_adapter_merge_exactly_into_an_unrolled_model():
    """The one way to merge weights that differ per loop into projections: one projection per slot."""
    settings = {"injection": "none", "state_init": "input", "prelude_norm": False}
    model = same_model(loop_adapter={"type": "lora", "rank": 3}, **settings)
    model = adapted(model, LoraConfig(target_modules="all-linear"))
    logits = model(TOKENS).logits
    unrolled = model.merge_and_unload().unroll()
    assert not isinstance(unrolled, LoopedForCausalLM)
    assert not any("loop_adapters" in name for name in weights(unrolled))
    assert_close(unrolled(TOKENS).logits, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_saved_with_its_code_and_every_weight_once(tied, tmp_path):
    merged = adapted(same_model(tie_word_embeddings=tied), LoraConfig(target_modules="all-linear")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    code = {file.name for file in copy_code(tmp_path / "code")}
    assert code <= {file.name for file in (tmp_path / "merged").iterdir()}
    assert "auto_map" in json.loads((tmp_path / "merged" / "config.json").read_text())
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in set(file.keys())) == merged.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(TOKENS).logits, merged(TOKENS).logits)


#: What an adapter may do to embeddings and head.
HEAD_CASES = {
    "save_head": {"modules_to_save": ["lm_head"]},
    "save_embeddings": {"modules_to_save": ["embed_tokens"]},
    "save_both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapt_head": {"target_modules": ["q_proj", "lm_head"]},
    "adapt_embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapt_both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some_tokens": {"trainable_token_indices": [4, 5]},
}


def assert_merged_and_reloaded_logits_are_equal(model: PeftModel, folder) -> None:
    logits = model(TOKENS).logits
    merged = model.merge_and_unload()
    assert_close(merged(TOKENS).logits, logits)
    merged.save_pretrained(folder)
    assert_close(AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits, logits)


# PEFT remarks on most of these already when the adapter is made.
@pytest.mark.filterwarnings(r"ignore::UserWarning:peft\.")
@pytest.mark.parametrize("ensure_weight_tying", [False, True])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", HEAD_CASES)
def test_trained_embeddings_and_heads_survive_merging_or_peft_says_so(
    case, tied, resized, ensure_weight_tying, tmp_path
):
    """PEFT merges an adapter of one tied matrix into both; it warns, and names untying as the way out."""
    model = same_model(tie_word_embeddings=tied)
    if resized:
        model.resize_token_embeddings(103, mean_resizing=False)
    settings = {"target_modules": ["q_proj"], "ensure_weight_tying": ensure_weight_tying, **HEAD_CASES[case]}
    model = adapted(model, LoraConfig(**settings))
    if tied and case.startswith("adapt_"):
        with pytest.warns(UserWarning, match=r"tied_target_modules(.|\n)*tie_word_embeddings=False"):
            model.merge_and_unload()
    else:
        assert_merged_and_reloaded_logits_are_equal(model, tmp_path)


@pytest.mark.parametrize("case", [case for case in HEAD_CASES if case.startswith("adapt_")])
def test_the_way_out_that_peft_names_is_exact(case, tmp_path):
    same_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
    assert torch.equal(untied(TOKENS).logits, same_model(tie_word_embeddings=True)(TOKENS).logits)
    model = adapted(untied, LoraConfig(**HEAD_CASES[case]))
    assert_merged_and_reloaded_logits_are_equal(model, tmp_path / "merged")
