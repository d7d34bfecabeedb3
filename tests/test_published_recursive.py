"""Recursive and relaxed recursive models: every sharing, recursion count and relaxation, against a stock Llama that
holds one layer per layer that runs.
"""

import json

import pytest
import torch
from helpers import assert_close, random_tokens
from safetensors.torch import load_file, save_file
from test_published_variants import LLAMA, share, stock_llama

from modeling_looped import LoopedForCausalLM
from modeling_looped.conversion import export_checkpoint, import_checkpoint
from modeling_looped.conversion.published.recursive import SHARINGS, Sharing

#: Recursion count -> layers that run, without the first and the last of the middle sharings.
COUNTS = {1: 2, 2: 4, 3: 6, 4: 4}
RANKS = {"q_proj": 2, "down_proj": 3}


def recursive_llama(kind: str, loops: int):
    """A stock Llama with the weights shared so, and for each layer that runs the one that owns its weights."""
    layers = COUNTS[loops] + 2 * int(kind.startswith("middle"))
    stock = stock_llama(layers)
    owners = Sharing(kind, loops).owners(layers)
    share(stock, owners)
    return stock, owners


def shared_layers(kind: str, layers: int) -> range:
    """Those of the layers that run that recursion shares."""
    return range(1, layers - 1) if kind.startswith("middle") else range(layers)


def check(stock, config, state, settings, folder):
    """Import, compare with `stock`, export, compare bits."""
    (folder / "published").mkdir()
    (folder / "published" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "published" / "model.safetensors")
    import_checkpoint(str(folder / "published"), folder / "looped", settings=settings)
    looped = LoopedForCausalLM.from_pretrained(folder / "looped").eval()
    tokens = random_tokens()
    with torch.no_grad():
        assert_close(looped(tokens).logits, stock(tokens).logits)
    export_checkpoint(folder / "looped", folder / "back")
    back = load_file(folder / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    return looped


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("loops", COUNTS)
def test_every_recursion_count_of_every_sharing_with_norms_of_their_own(kind, loops, tmp_path):
    stock, owners = recursive_llama(kind, loops)
    for layer in stock.model.layers:  # ln_share: false
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight + 0.3 * torch.randn_like(norm.weight)
    settings = {"sharing": kind, "num_recursion": loops, "ln_share": False}
    looped = check(stock, {**LLAMA, "num_hidden_layers": len(owners)}, stock.state_dict(), settings, tmp_path)
    assert (looped.config.num_loops, looped.config.loop_conditioning["type"]) == (loops, "norms")


def test_norms_of_their_own_show_where_shared_tensors_are_stored_once(tmp_path):
    stock, owners = recursive_llama("middle_cycle", 3)
    for layer in stock.model.layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight + 0.3
    repeated = [f"model.layers.{layer}." for layer, owner in enumerate(owners) if layer != owner]
    state = {
        name: tensor
        for name, tensor in stock.state_dict().items()
        if "layernorm" in name or not name.startswith(tuple(repeated))
    }
    check(stock, {**LLAMA, "num_hidden_layers": len(owners)}, state, {}, tmp_path)


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("loops", COUNTS)
def test_low_rank_weights_of_every_sharing_equal_the_stack_they_are_merged_into(kind, loops, tmp_path):
    stock, owners = recursive_llama(kind, loops)
    scale, prefix = 2.0, "base_model.model."
    state = {}
    shared = shared_layers(kind, len(owners))
    for name, tensor in stock.state_dict().items():
        parts = name.split(".")
        adapts = name.startswith("model.layers.") and int(parts[2]) in shared and parts[4] in RANKS
        state[prefix + (name.replace(".weight", ".base_layer.weight") if adapts else name)] = tensor.clone()
    generator = torch.Generator().manual_seed(3)
    for layer in shared:
        for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            projection = stock.get_submodule(f"model.layers.{layer}.{part}.{name}")
            rows, columns = projection.weight.shape
            a = torch.randn(RANKS[name], columns, generator=generator) * 0.1
            b = torch.randn(rows, RANKS[name], generator=generator) * 0.1
            projection.weight.data = projection.weight + scale * b @ a
            place = f"{prefix}model.layers.{layer}.{part}.{name}"
            state |= {f"{place}.lora_A.default.weight": a, f"{place}.lora_B.default.weight": b}
    settings = {"sharing": kind, "num_recursion": loops, "lora_alpha_pattern": scale}
    looped = check(stock, {**LLAMA, "num_hidden_layers": len(owners)}, state, settings, tmp_path)
    assert looped.config.loop_adapter["ranks"] == [3, 2]  # of down_proj, q_proj


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("loops", COUNTS)
def test_recursion_encodings_of_every_sharing_equal_the_stack_whose_outputs_are_multiplied(kind, loops, tmp_path):
    stock, owners = recursive_llama(kind, loops)
    shared = shared_layers(kind, len(owners))
    size = len(shared) // loops
    ends = [i for n, i in enumerate(shared) if kind.endswith("sequence") or (n + 1) % size == 0]
    state = {}
    for name, tensor in stock.state_dict().items():
        parts = name.split(".")
        if name.startswith("model.layers.") and int(parts[2]) in ends:
            parts.insert(3, "block")
        state[".".join(parts)] = tensor
    for layer in ends:
        encoding = 1 + 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(layer))
        state[f"model.layers.{layer}.recursion_encoding"] = encoding
        stock.model.layers[layer].register_forward_hook(lambda module, args, output, c=encoding: output * c)
    settings = {"sharing": kind, "num_recursion": loops}
    looped = check(stock, {**LLAMA, "num_hidden_layers": len(owners)}, state, settings, tmp_path)
    assert looped.config.loop_update["type"] == "recursion_encoding"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_magnitude_vector.default.weight", r"low-rank weights are DoRA's, with magnitudes \(supported: LoRA\)"),
        ("adaption_prompt", "it has adaption prompts in its attention"),
    ],
)
def test_other_relaxations_are_refused_by_name(name, message, tmp_path):
    stock, owners = recursive_llama("cycle", 2)
    state = {**stock.state_dict(), f"model.layers.0.self_attn.q_proj.{name}": torch.zeros(3)}
    (tmp_path / "published").mkdir()
    config = {**LLAMA, "num_hidden_layers": len(owners)}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: t.clone() for name, t in state.items()}, tmp_path / "published" / "model.safetensors")
    settings = {"sharing": "cycle", "num_recursion": 2}
    with pytest.raises(ValueError, match=message):
        import_checkpoint(str(tmp_path / "published"), tmp_path / "looped", settings=settings)
