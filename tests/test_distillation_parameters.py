"""Which parameters train, and which optimiser, rate and decay each one gets."""

import copy

import pytest
import torch
from helpers import VARIANTS, tiny_model
from peft import LoraConfig, get_peft_model
from teachers import tiny_teacher
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_looped.training.optimizer import MuonAdamW
from modeling_looped.training.parameters import classify, decays, parameter_groups, select_trainable

RATES = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "muon_learning_rate": 2e-3,
    "adapter_learning_rate": 3e-3,
    "embedding_learning_rate": 4e-3,
}
RICH = {
    "loop_adapter": {"type": "lora", "rank": 3},
    "loop_update": {"type": "gated", "initial_gate": 0.3, "free_loops": 1},
    "loop_conditioning": "norms",
}


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_groups_hold_every_parameter_exactly_once_in_every_variant(variant, muon):
    settings = VARIANTS[variant]
    if settings.get("is_causal") is False:
        settings = {**settings, "is_causal": True}
    model = tiny_model(**settings)
    groups = parameter_groups(model, muon=muon, **RATES)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    owned = {id(p) for group in groups if group["algorithm"] == "muon" for p in group["params"]}
    for name, parameter in model.named_parameters():
        projection = name.endswith("_proj.weight") and ".layers." in name
        assert (id(parameter) in owned) == (muon and projection), name


def test_what_neither_decays_nor_goes_to_muon():
    """The documented rule, name by name, over all that the variants have."""
    for settings in [RICH, *VARIANTS.values()]:
        if settings.get("is_causal") is False:
            continue
        for parameter in classify(tiny_model(**settings)):
            name = parameter.name
            if any(part in name for part in ("A_log", "dt_bias", "gate", "norm", "scale", "bias", "halting")):
                assert decays(parameter) == name.endswith("gate_proj.weight") or "loop_adapters.gate_proj" in name
            if "injection" in name or "loop_update" in name or "state_init" in name:
                assert parameter.role == "loop"


def test_each_group_has_its_rate_and_decay():
    model = tiny_model(**RICH)
    groups = {group["name"]: group for group in parameter_groups(model, muon=True, **RATES)}
    rates = {name: (group["lr"], group["weight_decay"], group["algorithm"]) for name, group in groups.items()}
    assert rates == {
        "embedding": (4e-3, 0.1, "adamw"),
        "matrix": (2e-3, 0.1, "muon"),
        "low_rank": (3e-3, 0.1, "adamw"),
        "loop": (3e-3, 0.0, "adamw"),
        "norm": (1e-3, 0.0, "adamw"),
    }
    fallen_back = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0, muon=True)
    assert {group["lr"] for group in fallen_back} == {1e-3}


def test_a_stock_model_and_a_peft_one_are_grouped_too():
    stock = tiny_teacher("llama-biases")
    groups = {group["name"]: group for group in parameter_groups(stock, muon=True, **RATES)}
    assert set(groups) == {"embedding", "matrix", "norm", "other"}
    assert groups["other"]["weight_decay"] == 0.0
    peft = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {group["name"] for group in parameter_groups(peft, muon=True, **RATES)} == {"low_rank"}


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {}),
        ("gpt_neox", {"intermediate_size": 48}),
        ("bloom", {}),
        ("falcon", {"new_decoder_architecture": False}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("mixtral", {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}),
    ],
)
def test_hidden_matrices_of_stacked_models_are_found_whatever_their_lists_of_layers_are_called(family, fields):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **fields))
    groups = {group["name"]: group for group in parameter_groups(model, muon=True, **RATES)}
    found = {id(p): group for group in groups.values() for p in group["params"]}
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        if parameter.ndim == 3:
            assert (group["name"], group["algorithm"], group["weight_decay"]) == ("experts", "adamw", 0.1), name
        elif id(parameter) in outer:
            assert group["name"] == "embedding", name
        elif parameter.ndim == 2 and "embed" not in name and "wpe" not in name and not name.endswith("gate.weight"):
            assert (group["algorithm"], group["weight_decay"]) == ("muon", 0.1), name
        else:
            assert group["algorithm"] == "adamw", name
    assert ("experts" in groups) == (family == "mixtral")


def test_muon_without_a_hidden_matrix_is_refused():
    with pytest.raises(ValueError, match=r"muon=True .*: Embedding has no hidden matrix .*'adamw'"):
        parameter_groups(torch.nn.Embedding(3, 2), muon=True, **RATES)


def trained(choice):
    model = tiny_model(**RICH)
    names = select_trainable(model, choice)
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    return set(names)


def test_what_each_choice_trains():
    everything, adapters, shared = trained("all"), trained("adapters"), trained("shared")
    assert everything == {name for name, _ in tiny_model(**RICH).named_parameters()}
    assert all("norm" in n or "loop_adapters" in n or "injection" in n or "loop_update" in n for n in adapters)
    assert any("injection" in n for n in adapters)
    assert any("loop_update" in n for n in adapters)
    core = {n for n in everything if n.startswith(("model.layers.1.", "model.layers.2."))}
    assert shared == {n for n in core if "loop_adapters" not in n}
    assert trained(r"layers\.0\..*q_proj") == {"model.layers.0.self_attn.q_proj.weight"}


def test_nothing_to_train_is_an_error_that_shows_what_there_is():
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        trained("decoder_blocks")
    with pytest.raises(ValueError, match="leaves no parameter"):
        select_trainable(tiny_teacher("llama"), "shared")  # nothing is shared in a stack


def loss_of(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 6), generator=generator)
    return model(ids, labels=ids).loss


def test_it_steps_as_torch_s_two_optimisers_do(monkeypatch):
    # on other CPUs Muon's products are not torch's, see test_parcae_recipe.py
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    ours = tiny_model(**RICH)
    theirs = copy.deepcopy(ours)
    optimizer = MuonAdamW(parameter_groups(ours, muon=True, **RATES))
    groups = parameter_groups(theirs, muon=True, **RATES)
    pair = (
        torch.optim.Muon([g for g in groups if g["algorithm"] == "muon"], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in groups if g["algorithm"] == "adamw"], fused=True),
    )
    for _ in range(3):
        loss_of(ours).backward()
        loss_of(theirs).backward()
        for each in (optimizer, *pair):
            each.step()
            each.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_its_state_dict_goes_round_and_both_rates_follow_a_schedule():
    models = [tiny_model(**RICH) for _ in range(2)]
    first, second = (MuonAdamW(parameter_groups(model, muon=True, **RATES)) for model in models)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5**step)
    for _ in range(2):
        loss_of(models[0]).backward()
        first.step()
        first.zero_grad()
        schedule.step()
    assert {group["name"]: group["lr"] for group in first.param_groups} == {
        "embedding": 1e-3,
        "matrix": 5e-4,
        "low_rank": 7.5e-4,
        "loop": 7.5e-4,
        "norm": 2.5e-4,
    }
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the moments
    for model, optimizer in zip(models, (first, second), strict=True):
        loss_of(model).backward()
        optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm=sgd must be one of: muon, adamw"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(2))], "algorithm": "sgd", "name": "a", "lr": 1.0}])
