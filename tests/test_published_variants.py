"""What the families' configs offer beyond the recorded checkpoints, each against an independent model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.published import described
from helpers import assert_close, random_tokens, randomise
from safetensors.torch import load_file, save_file
from teachers import TEACHERS, tiny_teacher
from transformers import AlbertConfig, AlbertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForMaskedLM
from modeling_looped.conversion import export_checkpoint, import_checkpoint
from modeling_looped.conversion.importing import ASIDE, our_shapes
from modeling_looped.conversion.published import PUBLISHED, SourceConfig
from modeling_looped.conversion.published.family import looped_config
from modeling_looped.conversion.published.parcae import SCHEMES, gated_layers, value_embedding_layers

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def stock_llama(layers: int, **overrides: Any) -> LlamaForCausalLM:
    """A randomised Llama of so many layers."""
    fields = {
        name: value for name, value in {**LLAMA, **overrides}.items() if name not in ("model_type", "rope_theta")
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, rope_parameters=rope, **fields))
    return randomise(model, std=1.0).eval()


def share(model: PreTrainedModel, owners: list[int]) -> None:
    """Give each layer of a Llama the weights of the layer that owns them."""
    layers = model.model.layers
    for layer, owner in enumerate(owners):
        layers[layer].load_state_dict(layers[owner].state_dict())


def write(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
    """A checkpoint folder of these."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return str(folder)


def convert(config: dict[str, Any], state: dict[str, torch.Tensor], folder: Path, **options: Any) -> PreTrainedModel:
    """The looped model of a published checkpoint, after it has been exported again bit by bit."""
    source = write(folder / "published", config, state)
    import_checkpoint(source, folder / "looped", **options)
    export_checkpoint(folder / "looped", folder / "back")
    back = load_file(folder / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    return LoopedForCausalLM.from_pretrained(folder / "looped").eval()


def deduplicated(model: PreTrainedModel, owners: list[int]) -> dict[str, torch.Tensor]:
    """The state dict without the tensors of layers that another one owns."""
    repeated = {f"model.layers.{layer}." for layer, owner in enumerate(owners) if layer != owner}
    return {
        name: tensor for name, tensor in model.state_dict().items() if not any(name.startswith(r) for r in repeated)
    }


SHARINGS = {
    "cycle": ([0, 1, 2, 0, 1, 2], 2),
    "sequence": ([0, 0, 2, 2, 4, 4], 2),
    "middle_cycle": ([0, 1, 2, 1, 2, 1, 2, 7], 3),
    "middle_sequence": ([0, 1, 1, 1, 4, 4, 4, 7], 3),
}


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("stores", ["once", "every name"])
def test_every_sharing_of_recursive_models_equals_the_stack_with_repeated_weights(kind, stores, tmp_path):
    owners, loops = SHARINGS[kind]
    stock = stock_llama(len(owners))
    share(stock, owners)
    once = stores == "once"
    state = deduplicated(stock, owners) if once else stock.state_dict()
    settings = {} if once else {"sharing": kind, "num_recursion": loops}
    looped = convert({**LLAMA, "num_hidden_layers": len(owners)}, state, tmp_path, settings=settings)
    tokens = random_tokens()
    assert looped.config.num_loops == loops
    assert looped.num_parameters() == sum(tensor.numel() for tensor in deduplicated(stock, owners).values())
    assert_close(looped(tokens).logits, stock(tokens).logits)


def test_repeated_weights_that_differ_are_refused_by_name(tmp_path):
    owners, loops = SHARINGS["middle_cycle"]
    stock = stock_llama(len(owners))
    share(stock, owners)
    state = stock.state_dict()
    state["model.layers.5.mlp.up_proj.weight"] += 1e-6
    source = write(tmp_path / "published", {**LLAMA, "num_hidden_layers": len(owners)}, state)
    settings = {"sharing": "middle_cycle", "num_recursion": loops}
    named = r"model\.layers\.1\.mlp\.up_proj\.weight and model\.layers\.5\.mlp\.up_proj\.weight are one shared tensor"
    with pytest.raises(ValueError, match=named):
        import_checkpoint(source, tmp_path / "looped", settings=settings)
    assert not (tmp_path / "looped").exists()


def test_a_sharing_that_the_tensors_do_not_show_is_asked_for(tmp_path):
    stock = stock_llama(4)
    source = write(tmp_path / "published", {**LLAMA, "num_hidden_layers": 4}, stock.state_dict())
    with pytest.raises(ValueError, match=r"cannot be told from the tensors: say it with --set sharing=KIND"):
        import_checkpoint(source, tmp_path / "looped", family="recursive")
    with pytest.raises(ValueError, match=r"num_recursion=3 \(must divide the 4 layers that cycle shares\)"):
        import_checkpoint(source, tmp_path / "looped", settings={"sharing": "cycle", "num_recursion": 3})


def test_shared_keys_and_values_of_recursive_models_are_read(tmp_path):
    owners, loops = SHARINGS["cycle"]
    stock = stock_llama(len(owners))
    share(stock, owners)
    config = {**LLAMA, "num_hidden_layers": len(owners)}
    looped = convert(config, deduplicated(stock, owners), tmp_path, settings={"kv_sharing": "first_loop"})
    assert looped.config.kv_sharing == "first_loop"
    assert looped.config.num_hidden_layers == len(owners) // loops


@pytest.mark.parametrize("name", TEACHERS)
def test_stacked_checkpoints_of_every_stock_family_load_directly(name, tmp_path):
    stock = tiny_teacher(name)
    stock.save_pretrained(tmp_path / "stock")
    state = load_file(tmp_path / "stock" / "model.safetensors")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    looped = convert(config, state, tmp_path)
    tokens = random_tokens()
    assert looped.config.num_core_layers == 0
    assert_close(looped(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("edge", [0, 1])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("depth", [1, 3])
def test_token_choice_whose_bias_sends_all_tokens_to_one_depth_equals_the_layers_run_by_hand(
    edge, score, depth, tmp_path
):
    loops, core = 3, 2
    stock = stock_llama(core + 2 * edge)
    layers = stock.model.layers
    wrapper = f"model.layers.{edge}" if edge else "model.layers"
    router, bias = torch.randn(loops, 32), 9.0 * torch.nn.functional.one_hot(torch.tensor(depth - 1), loops)
    state = {f"{wrapper}.mor_router.router.weight": router, f"{wrapper}.router_bias": bias}
    state |= {name: tensor for name, tensor in stock.state_dict().items() if ".layers." not in name}
    for place, layer in ((0, layers[0]), (2, layers[-1])) if edge else ():
        state |= {f"model.layers.{place}.{part}": tensor for part, tensor in layer.state_dict().items()}
    for inner in range(core):
        for part, tensor in layers[edge + inner].state_dict().items():
            state[f"{wrapper}.block_list.0.{inner}.{part}"] = tensor
    config = {**LLAMA, "num_hidden_layers": core * loops + 2 * edge}
    settings = {"mor_alpha": 0.5, "mor_router_func": score}
    looped = convert(config, state, tmp_path, settings=settings)

    tokens = random_tokens()
    with torch.no_grad():
        hidden = stock.model.embed_tokens(tokens)
        rotary = stock.model.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])

        def run(hidden, layer):
            return layer(hidden, position_embeddings=rotary, attention_mask=None)

        if edge:
            hidden = run(hidden, layers[0])
        scores = hidden @ router.T
        weight = 0.5 * (scores.softmax(-1) if score == "softmax" else scores.sigmoid())[..., depth - 1 : depth]
        routed = hidden
        for _ in range(depth):
            for layer in layers[edge : edge + core]:
                routed = run(routed, layer)
        hidden = hidden + weight * routed
        if edge:
            hidden = run(hidden, layers[-1])
        assert_close(looped(tokens).logits, stock.lm_head(stock.model.norm(hidden)))


def test_expert_choice_asks_for_its_capacity(tmp_path):
    config = described("mor_expert")["peer_config"]
    names = {f"model.layers.{1 + loop}.mor_router.router.weight": torch.Size([1, 64]) for loop in range(4)}
    with pytest.raises(
        ValueError, match=r"say them with --set mor_capacity=\[\.\.\.\], one share for each of 4 loops"
    ):
        fields_of("mor", config, names)


NANBEIGE = described("nanbeige")["peer_config"]


@pytest.mark.parametrize(
    ("options", "owners"),
    [
        ({"num_loops": 2, "skip_loop_final_norm": True}, [0, 1, 2, 3] * 2),
        ({"loop_loss_weights": [0.1, 0.2], "skip_loop_final_norm": True}, [0, 1, 2, 3] * 3),
        ({"enable_double_loop_split": True}, [0, 1, 2, 1, 2, 1, 2, 3]),
        ({"enable_double_loop_split": True, "loop_middle_layers": 1}, [0, 1, 1, 1, 1, 1, 2, 3]),
    ],
    ids=["one norm", "loops counted by losses", "split", "split of one"],
)
def test_nanbeige_schedules_equal_the_stack_that_their_code_runs(options, owners, tmp_path):
    unrolled = stock_llama(len(owners))
    first = {owner: owners.index(owner) for owner in owners}
    share(unrolled, [first[owner] for owner in owners])
    state = {name: tensor for name, tensor in unrolled.state_dict().items() if not name.startswith("model.layers.")}
    for owner, layer in first.items():
        for name, tensor in unrolled.model.layers[layer].state_dict().items():
            state[f"model.layers.{owner}.{name}"] = tensor
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"}
    config = {**NANBEIGE, **sizes, "head_dim": 8, "num_hidden_layers": 4, "rope_parameters": None, **options}
    looped = convert(config, state, tmp_path)
    tokens = random_tokens()
    assert_close(looped(tokens).logits, unrolled(tokens).logits)


def random_published(family: str, config: dict[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    """Random tensors of a published checkpoint: those that the family's map makes of a random model of ours."""
    chosen = PUBLISHED[family]
    looped = fields_of(family, config, names)
    tensor_map = chosen.tensor_map(config, looped, our_shapes(chosen.model_class, looped), names)
    state = randomise(chosen.model_class(looped), std=1.0).state_dict()
    return {
        link_names[0]: tensor_map.to_published(link_names[0], state.__getitem__)
        for link in tensor_map.links
        for link_names in link.sources
    }


def fields_of(family: str, config: dict[str, Any], names: list[str] = ()) -> LoopedConfig:
    """Our config of a published one."""
    source = SourceConfig(family, config)
    fields = PUBLISHED[family].fields(source, names if isinstance(names, dict) else dict.fromkeys(names, torch.Size()))
    source.finish()
    return looped_config(PUBLISHED[family], fields)


HUGINN = described("huginn")["peer_config"]
RETROFIT = described("retro_raven_llama")["peer_config"]
PARCAE = described("parcae")["peer_config"]
OURO = described("ouro")["peer_config"]


def test_retrofitted_olmo_blocks_are_told_by_their_query_norms(tmp_path):
    config = {**RETROFIT, "n_embd": 32, "n_heads": 4, "head_dim": 8, "intermediate_size": 48}
    names = ["transformer.prelude.0.attn.q_norm.weight"]
    state = random_published("huginn", config, names)
    assert state["transformer.prelude.0.attn.q_norm.weight"].shape == (32,)
    assert state["transformer.prelude.0.attn.k_norm.weight"].shape == (16,)
    looped = convert(config, state, tmp_path)
    assert (looped.config.norm_placement, looped.config.qk_norm) == ("post_branch", "flat")
    prefix = "model.layers.0"
    kept = looped.state_dict()
    assert torch.equal(kept[f"{prefix}.post_attention_layernorm.weight"], state["transformer.prelude.0.norm_1.weight"])
    assert torch.equal(
        kept[f"{prefix}.self_attn.k_proj.weight"], state["transformer.prelude.0.attn.Wqkv.weight"][32:48]
    )


@pytest.mark.parametrize(
    ("mode", "injection", "state_init"),
    [("random", "inject", "normal"), ("embed-init", "inject", "input"), ("skip-adapter", "skip", "input")],
)
def test_retrofits_start_as_their_config_says(mode, injection, state_init):
    config = fields_of("huginn", {**RETROFIT, "initial_state_mode": mode})
    assert config.injection["first_loop"] == injection
    assert config.state_init["type"] == state_init


def test_a_drawn_state_has_the_originals_deviation():
    state_init = fields_of("huginn", HUGINN, ["transformer.prelude.0.norm_3.weight"]).state_init
    assert state_init == {
        "type": "normal",
        "std": pytest.approx((2 / (5 * 64)) ** 0.5 * 64**0.5),
        "seed": 0,
        "truncation": 3.0,
    }


def test_ouro_windows_and_tied_heads_come_along(tmp_path):
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
    config = {**OURO, **windows, "tie_word_embeddings": True, "num_key_value_heads": 2}
    state = random_published("ouro", config, [])
    assert "lm_head.weight" not in state
    looped = convert(config, state, tmp_path)
    assert looped.config.stored_layer_types == ["full_attention", "sliding_attention"]
    assert looped.config.sliding_window == 4
    assert looped.lm_head.weight is looped.model.embed_tokens.weight


def test_a_tied_head_may_be_stored_under_both_names(tmp_path):
    config = {**OURO, "tie_word_embeddings": True}
    state = random_published("ouro", config, [])
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    convert(config, copy.deepcopy(state), tmp_path)
    state["lm_head.weight"][0, 0] += 1
    source = write(tmp_path / "other", config, state)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one shared tensor"):
        import_checkpoint(source, tmp_path / "refused")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"injection_type": "add"}, {"injection": {"type": "add"}}),
        ({"state_init": "unit"}, {"state_init": {"type": "unit_normal", "seed": 0}}),
        ({"state_init": "normal"}, {"state_init": {"type": "normal", "std": 1.0, "seed": 0, "truncation": None}}),
        ({"state_init": "embed"}, {"state_init": {"type": "normal", "std": 0.125, "seed": 0, "truncation": None}}),
        ({"prelude_norm": False}, {"prelude_norm": False}),
        ({"simple_ops": True, "norm_class_name": "LayerNorm"}, {"norm_type": "rms"}),
        ({"nonlin_name": "Tanh"}, {"hidden_act": "tanh"}),
        ({"use_fused_head": "full-triton", "tie_embeddings": False}, {"tie_word_embeddings": False}),
        ({"use_fused_head": "full-triton", "tie_embeddings": True}, {"tie_word_embeddings": True}),
        ({"clip_qkv": 8.0}, {"qkv_clip": 8.0}),
        ({"logit_softcap": 15.0, "logit_scale": 0.5}, {"final_logit_softcapping": 15.0, "logit_scale": 0.5}),
        ({"mlp_class_name": "GatedMLP", "nonlin_name": "GELU"}, {"mlp_type": "gated", "hidden_act": "gelu"}),
        ({"norm_class_name": "LayerNorm"}, {"norm_type": "layer"}),
        ({"tie_embeddings": False}, {"tie_word_embeddings": False}),
        (
            {"rope_settings": {"rope_base": 9, "rope_condense_ratio": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}},
        ),
        ({"rope_settings": {"use_rope": False}}, {"position_embedding": "none"}),
    ],
    ids=str,
)
def test_parcae_options_are_kept_and_their_tensors_come_back(changes, expected, tmp_path):
    config = {**PARCAE, **changes}
    looped = convert(config, random_published("parcae", config, []), tmp_path)
    assert {name: getattr(looped.config, name) for name in expected} == expected


def test_a_wider_parcae_core_keeps_its_sizes_and_its_dead_tensors(tmp_path):
    """One layer of each part: `value_embeds.0` and the core's gate are read by nothing (peers.md, defect 12)."""
    sizes = {"recurrent_embedding_dimension": 96, "recurrent_intermediation_embedding_dimension": 160}
    layers = {f"n_layers_in_{part}": 1 for part in ("prelude", "recurrent_block", "coda")}
    config = {**PARCAE, **sizes, **layers, "recurrent_num_attention_heads": 6}
    assert value_embedding_layers(config) == ([0, 2], [1, 2])
    state = random_published("parcae", config, [])
    dead = {
        "value_embeds.0.weight": torch.randn(128, 64),
        "transformer.core_block.0.attn.ve_gate.weight": torch.randn(6, 32),
    }
    looped = convert(config, {**state, **dead}, tmp_path)
    assert looped.config.layer_shape(1) == (96, 160, 6, 6, 16)
    assert looped.config.value_embedding["layers"] == [2]
    assert load_file(tmp_path / "looped" / ASIDE).keys() == dead.keys()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parcae_scales_follow_from_its_initialisation_where_its_config_does_not_say_them(scheme):
    config = {**PARCAE, "init_strategy": scheme, "state_init": "like-init"}
    del config["emb_scale"], config["logit_scale"]
    ours, takase = fields_of("parcae", config), scheme.startswith("takase")
    assert ours.embedding_scale == (8.0 if takase else 1.0)
    assert ours.logit_scale == (pytest.approx((2 / 5) ** 0.5 / 8) if scheme == "takase-scaled" else 1.0)
    assert ours.state_init["std"] == pytest.approx(ours.embedding_scale * ours.initializer_range)


def test_released_parcae_sizes_all_have_value_embeddings_in_the_layers_of_odd_number():
    for layers in (2, 4, 6, 8):
        parts = {f"n_layers_in_{part}": layers for part in ("prelude", "recurrent_block", "coda")}
        config = {**PARCAE, **parts, "mean_recurrence": 8, "mean_backprop_depth": 4}
        assert gated_layers(config) == list(range(1, 3 * layers, 2))


@pytest.mark.parametrize(
    ("family", "base", "changes", "named"),
    [
        (
            "parcae",
            PARCAE,
            {"bias": True, "qk_bias": True},
            r"qk_bias=True \(with bias=True, queries and keys have two",
        ),
        ("parcae", PARCAE, {"mup_model_scaling_factor": 2}, r"mup_model_scaling_factor=2 \(supported: 1; their code"),
        (
            "parcae",
            PARCAE,
            {"injection_type": "gated"},
            r"injection_type='gated' \(supported: 'diagonal', 'linear', 'add'",
        ),
        ("parcae", PARCAE, {"num_key_value_heads": 2}, r"num_key_value_heads=2 \(their code fails with it"),
        ("parcae", PARCAE, {"use_fused_head": "hhe"}, r"use_fused_head='hhe'"),
        ("parcae", PARCAE, {"recurrent_embedding_dimension": 100}, r"recurrent_embedding_dimension=100 \(must be"),
        ("parcae", PARCAE, {"clip_qkv": 1.0, "qk_bias": True}, r"clip_qkv=1\.0 \(with qk_bias=True, which"),
        ("parcae", PARCAE, {"n_embd": None}, r"n_embd is missing"),
        ("huginn", RETROFIT, {"injection_type": "add"}, r"injection_type='add' \(supported: 'linear'\)"),
        ("huginn", RETROFIT, {"initial_state_mode": "warm"}, r"initial_state_mode='warm'"),
        ("huginn", RETROFIT, {"qk_bias": True}, r"qk_bias=True \(with num_key_value_heads=2"),
        ("huginn", RETROFIT, {"test_time_noise": 0.1}, r"test_time_noise=0\.1 \(supported: 0\)"),
        ("ouro", OURO, {"early_exit_step": 2}, r"early_exit_step=2 \(supported: None\)"),
        ("ouro", OURO, {"early_exit_threshold": 1.5}, r"halting: type 'gate': threshold=1\.5"),
        ("ouro", OURO, {"mixture": 3}, r"mixture=3 \(not a field that is known; --set mixture=null if"),
        ("ouro", OURO, {"quantization_config": {"bits": 4}}, r"quantization_config \(only plain weights"),
        ("nanbeige", NANBEIGE, {"enable_mhc": True}, r"enable_mhc=True \(their code wants enable_hyper_connection"),
        (
            "nanbeige",
            {**NANBEIGE, "enable_hyper_connection": True},
            {"enable_h_res_identity": True},
            r"enable_h_res_identity=True \(its projections have rows that nothing reads",
        ),
        (
            "nanbeige",
            {**NANBEIGE, "enable_hyper_connection": True, "enable_mhc": True},
            {"mhc_diff_for_loop": True},
            r"mhc_diff_for_loop=True \(their code wants enable_double_loop_split",
        ),
        (
            "nanbeige",
            NANBEIGE,
            {"enable_depth_attention": True, "depth_attention_recent_window": 2},
            r"depth_attention_recent_window=2 \(supported: 0",
        ),
        ("nanbeige", NANBEIGE, {"emb_neighbor_num": 3}, r"emb_split_num=None \(n-gram embeddings need"),
        (
            "nanbeige",
            NANBEIGE,
            {"insert_ngram_layer_idx": [1]},
            r"insert_ngram_layer_idx=\[1\] \(n-gram embeddings insi",
        ),
        ("nanbeige", NANBEIGE, {"ngram_compressed_tokenizer": True}, r"ngram_compressed_tokenizer=True \(n-grams of"),
        ("nanbeige", NANBEIGE, {"loop_share_kv": True}, r"loop_share_kv=True \(their code wants"),
        ("hrm_text", described("hrm_text")["peer_config"], {"attention_bias": True}, r"attention_bias=True"),
        ("albert", described("albert")["peer_config"], {"num_hidden_groups": 3}, r"num_hidden_groups=3 \(must divide"),
        ("stacked", LLAMA, {"model_type": "gpt_oss"}, r"model_type='gpt_oss' \(supported: llama, "),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused_by_its_name_and_value(family, base, changes, named):
    with pytest.raises(ValueError, match=named):
        fields_of(family, {**base, **changes})


def test_a_field_that_is_said_not_to_matter_is_left_out():
    assert fields_of("ouro", {**OURO, "mixture": None}).to_dict() == fields_of("ouro", OURO).to_dict()


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"mup_model_scaling_factor=2 .*injection_type='x' .*surprise=1 "):
        fields_of("parcae", {**PARCAE, "mup_model_scaling_factor": 2, "injection_type": "x", "surprise": 1})


def test_nanbeige_split_with_shared_keys_and_values_and_query_norms(tmp_path):
    options = {"enable_double_loop_split": True, "loop_share_kv": True, "qk_layernorm": True, "num_hidden_layers": 4}
    config = {**NANBEIGE, **options}
    state = random_published("nanbeige", config, [])
    assert state["model.layers.0.self_attn.q_layernorm.weight"].shape == (32,)
    looped = convert(config, state, tmp_path)
    assert (looped.config.kv_sharing, looped.config.qk_norm, looped.config.num_loops) == ("first_loop", "per_head", 3)


@pytest.mark.parametrize(("groups", "inner"), [(1, 2), (2, 1), (2, 2)])
def test_albert_groups_loop_one_after_the_other_as_in_transformers(groups, inner, tmp_path):
    shape = {"num_hidden_groups": groups, "inner_group_num": inner}
    original = described("albert")["peer_config"]
    kept = {name: original[name] for name in original if name in AlbertConfig.__dataclass_fields__}
    stock = randomise(AlbertForMaskedLM(AlbertConfig(**{**kept, **shape}))).eval()
    stock.save_pretrained(tmp_path / "stock")
    import_checkpoint(str(tmp_path / "stock"), tmp_path / "looped")
    looped = LoopedForMaskedLM.from_pretrained(tmp_path / "looped").eval()
    tokens = random_tokens()
    types = torch.ones_like(tokens)
    assert_close(looped(tokens, token_type_ids=types).logits, stock(tokens, token_type_ids=types).logits)
