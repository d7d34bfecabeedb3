"""State maps are total: every key goes somewhere for a reason, or nothing moves and the keys are named."""

import pytest
import torch

from modeling_looped.state_map import Drop, New, Rename, StateMap


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    return {f"h.{i}.{name}.weight": torch.randn(2, 3) for i in range(12) for name in ("up", "down")}


RENAMES = (
    Rename("h.{i}.up.weight", "layers.{i}.mlp.up.weight"),
    Rename("h.{i}.down.weight", "layers.{i}.down.weight"),
)
TARGET = {f"layers.{i}.{name}.weight": torch.Size([2, 3]) for i in range(12) for name in ("mlp.up", "down")}


def test_renames_move_every_tensor_to_its_own_layer(source):
    moved = StateMap(*RENAMES).apply(source, TARGET)
    assert moved.keys() == TARGET.keys()
    for i in range(12):
        assert torch.equal(moved[f"layers.{i}.mlp.up.weight"], source[f"h.{i}.up.weight"])
        assert torch.equal(moved[f"layers.{i}.down.weight"], source[f"h.{i}.down.weight"])


def test_moved_tensors_have_memory_of_their_own(source):
    moved = StateMap(*RENAMES).apply(source, TARGET)
    moved["layers.3.down.weight"].zero_()
    assert source["h.3.down.weight"].abs().sum() > 0


def test_the_inverse_brings_back_every_bit(source):
    state_map = StateMap(*RENAMES)
    back = state_map.inverse().apply(state_map.apply(source, TARGET), shapes(source))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


def test_what_is_dropped_one_way_is_new_the_other_way_with_the_same_reason():
    state_map = StateMap(Drop("inv_freq", "recomputed at load"), New("gate", "starts closed", torch.zeros))
    assert state_map.inverse().rules == (New("inv_freq", "recomputed at load"), Drop("gate", "starts closed"))


def test_new_targets_are_filled_or_left_to_the_model():
    state_map = StateMap(New("gate", "starts closed", torch.zeros), New("head", "tied"), Drop("old", "unused"))
    moved = state_map.apply({"old": torch.ones(1)}, {"gate": torch.Size([4]), "head": torch.Size([2])})
    assert moved.keys() == {"gate"}
    assert torch.equal(moved["gate"], torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state | {"h.0.bias": torch.ones(3)}, r"no rule says where these go: h\.0\.bias"),
        (lambda state: state | {"h.12.up.weight": torch.ones(2, 3)}, r"no place for: h\.12\.up\.weight"),
        (lambda state: {k: v for k, v in state.items() if k != "h.7.up.weight"}, r"fills: layers\.7\.mlp\.up\.weight"),
        (lambda state: state | {"h.1.up.weight": torch.ones(3, 2)}, r"shapes differ: h\.1\.up\.weight \(3, 2\) for"),
        (lambda state: state | {"h.1.up.weight": torch.ones(2, 3).byte()}, r"not floating-point .*: h\.1\.up\.weight"),
    ],
    ids=["no rule", "no place", "nothing fills", "shapes differ", "packed"],
)
def test_what_does_not_fit_is_refused_by_name(source, change, named):
    with pytest.raises(ValueError, match=named):
        StateMap(*RENAMES).apply(change(source), TARGET)


def test_two_sources_of_one_target_are_refused():
    state_map = StateMap(Rename("a", "c"), Rename("b", "c"))
    with pytest.raises(ValueError, match="two sources for one target: a and b for c"):
        state_map.apply({"a": torch.ones(1), "b": torch.ones(1)}, {"c": torch.Size([1])})


def test_all_problems_are_listed_at_once(source):
    del source["h.7.up.weight"]
    source |= {"h.0.bias": torch.ones(3), "h.1.up.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"(?s)h\.0\.bias.*h\.1\.up\.weight.*layers\.7\.mlp\.up\.weight"):
        StateMap(*RENAMES).apply(source, TARGET)


def test_a_name_in_braces_fits_one_part_of_a_key_only():
    state_map = StateMap(Rename("layers.{i}.weight", "layers.{i}.w"))
    with pytest.raises(ValueError, match=r"no rule says where these go: layers\.0\.mlp\.weight"):
        state_map.apply({"layers.0.mlp.weight": torch.ones(1)}, {})
