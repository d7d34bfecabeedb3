"""Tensor maps: steps that can be undone, and totality."""

import pytest
import torch
from fixtures.published import FIXTURES, SETTINGS, described, imported_folder, load, published_folder, recording

from modeling_looped import LoopedConfig
from modeling_looped.conversion.importing import our_shapes, plan_import
from modeling_looped.conversion.parity import compare_with_recording
from modeling_looped.conversion.published import PUBLISHED
from modeling_looped.conversion.published.rotary_table import interleaved_table
from modeling_looped.conversion.stored_tensors import StoredTensors
from modeling_looped.conversion.tensor_map import (
    HalfRotary,
    Link,
    Repeat,
    Reshape,
    Split,
    Stack,
    TensorMap,
    Unread,
    rename,
    same_bits,
)
from modeling_looped.rotary import LoopedRotaryEmbedding, apply_rotary

STEPS = {
    "split": (Split((2, 3, 1)), [(6, 4)]),
    "stack": (Stack(), [(2, 3), (2, 3), (2, 3)]),
    "reshape": (Reshape((2, 1, 3, 4), (24,)), [(2, 1, 3, 4)]),
    "half rotary weight": (HalfRotary(4, (0, 1)), [(8, 3), (4, 3), (4, 3)]),
    "half rotary bias": (HalfRotary(6, (0,)), [(12,)]),
    "repeat": (Repeat(3), [(2, 3)]),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_undone_exactly(name):
    step, shapes = STEPS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    back = step.backward(step.forward(list(tensors)))
    assert all(same_bits(before, after) for before, after in zip(tensors, back, strict=True))


def test_half_rotary_rows_score_as_interleaved_ones():
    """q.k of vectors turned in pairs (2j, 2j + 1) by Huginn's and Parcae's table equals q.k of permuted ones turned
    by our rotary embedding.
    """
    heads, head_dim, width, length = 2, 8, 5, 7
    query, key, x = (
        torch.randn(heads * head_dim, width),
        torch.randn(heads * head_dim, width),
        torch.randn(length, width),
    )

    table = interleaved_table(head_dim, length, theta=50000.0)[0]
    cos, sin = table[..., 0], table[..., 1]

    def interleaved(weight):
        even, odd = (x @ weight.T).view(length, heads, head_dim // 2, 2).unbind(-1)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(2)

    expected = torch.einsum("ihk,jhk->hij", interleaved(query), interleaved(key))

    config = LoopedConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    cosines, sines = LoopedRotaryEmbedding(config)(x, torch.arange(length)[None])
    permuted = HalfRotary(head_dim, (0, 1)).forward([query, key])
    rotated = [
        apply_rotary((x @ weight.T).view(1, length, heads, head_dim).transpose(1, 2), cosines, sines)[0]
        for weight in permuted
    ]
    torch.testing.assert_close(rotated[0] @ rotated[1].transpose(1, 2), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(permuted[0], query)


FUSED = TensorMap(
    [
        Link((("fused",),), ("gate", "up"), (Split((2, 2)),)),
        Link((("one", "alias"),), ("shared",)),
    ],
    [Unread("table", "it can be computed", lambda: torch.ones(3))],
)
OURS = {"gate": torch.Size([2, 3]), "up": torch.Size([2, 3]), "shared": torch.Size([3])}
FITS = {"fused": torch.Size([4, 3]), "one": torch.Size([3])}


@pytest.mark.parametrize(
    ("published", "ours", "named"),
    [
        ({**FITS, "extra": torch.Size([1])}, OURS, r"no rule says where these go: extra"),
        ({"fused": torch.Size([4, 3])}, OURS, r"these are missing: one or alias"),
        ({**FITS, "fused": torch.Size([5, 3])}, OURS, r"fused is \[5, 3\], and the config makes it \[4, 3\]"),
        (FITS, {**OURS, "new": torch.Size([1])}, r"nothing fills: new"),
        (FITS, {"shared": OURS["shared"]}, r"the model has no place for: gate, up"),
    ],
    ids=["unknown", "missing", "shape", "unfilled", "homeless"],
)
def test_a_map_that_does_not_fit_is_refused_by_name(published, ours, named):
    FUSED.check(FITS, OURS)
    FUSED.check({**FITS, "alias": torch.Size([3]), "table": torch.Size([9])}, OURS)
    with pytest.raises(ValueError, match=named):
        FUSED.check(published, ours)


def test_a_tensor_under_two_names_must_be_one():
    state = {"fused": torch.randn(4, 3), "one": torch.tensor([0.0, 1.0, 2.0]), "alias": torch.tensor([0.0, 1.0, 2.0])}
    assert dict(FUSED.to_ours(state.__getitem__, state))["shared"].tolist() == [0.0, 1.0, 2.0]
    state["alias"] = torch.tensor([-0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="one and alias are one shared tensor in this family, and differ here"):
        dict(FUSED.to_ours(state.__getitem__, state))


def test_tensors_of_different_types_are_not_made_one():
    stacked = TensorMap([Link((("a",), ("b",)), ("table",), (Stack(),))])
    state = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"table would be made of tensors of different types: a is torch\.float32"):
        dict(stacked.to_ours(state.__getitem__, state))


def test_what_was_one_tensor_and_has_come_to_differ_is_not_exported():
    tied = TensorMap([Link((("embedding",),), ("embedding", "head"), (Repeat(2),))])
    state = {"embedding": torch.ones(2), "head": torch.zeros(2)}
    with pytest.raises(ValueError, match="holds once have come to differ"):
        tied.to_published("embedding", state.__getitem__)


def test_a_table_that_the_config_contradicts_is_refused():
    FUSED.check_unread("table", torch.full((3,), 1.001))
    for wrong in (torch.full((3,), 1.1), torch.ones(4)):
        with pytest.raises(ValueError, match="table is not the table that the config describes"):
            FUSED.check_unread("table", wrong)


def test_renames_copy_and_know_their_name_back():
    plain = TensorMap([rename("theirs", "ours")])
    value = torch.randn(3)
    assert dict(plain.to_ours({"theirs": value}.__getitem__, ["theirs"]))["ours"] is value
    assert plain.to_published("theirs", {"ours": value}.__getitem__) is value


@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_of_a_checkpoint_is_needed_by_name_and_by_shape(name, tmp_path):
    """Take any tensor away, rename it or reshape it, and the map refuses and says which."""
    stored = StoredTensors(published_folder(name, tmp_path / "published"))
    config = {**described(name)["peer_config"], **SETTINGS.get(name, {})}
    family, looped, tensor_map = plan_import("auto", config, stored)
    ours = our_shapes(family.model_class, looped)
    aliases = [set(names) & set(stored.shapes) for link in tensor_map.links for names in link.sources]
    copies = set().union(*(names for names in aliases if len(names) > 1))
    # every fifth of a checkpoint of hundreds, whose tensors are of a few kinds: a check looks at all of them
    for tensor, shape in list(stored.shapes.items())[:: 5 if len(stored.shapes) > 120 else 1]:
        others = {other: size for other, size in stored.shapes.items() if other != tensor}
        with pytest.raises(ValueError, match="no rule says where these go: stranger"):
            tensor_map.check({**stored.shapes, "stranger": shape}, ours)
        if tensor in tensor_map.unread or tensor in copies:  # one of several names of a tensor is enough
            continue
        with pytest.raises(ValueError, match="these are missing") as missing:
            tensor_map.check(others, ours)
        assert tensor in str(missing.value)
        with pytest.raises(ValueError, match="shapes differ") as misshapen:
            tensor_map.check({**others, tensor: torch.Size([*shape, 2])}, ours)
        assert tensor in str(misshapen.value)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_family_is_recognised_by_its_own_checkpoints_only(name, tmp_path):
    stored = StoredTensors(published_folder(name, tmp_path / "published"))
    config = {**described(name)["peer_config"], **SETTINGS.get(name, {})}
    recognised = [family.name for family in PUBLISHED.values() if family.recognises(config, stored.shapes)]
    assert [family for family in recognised if family != "stacked"] == recognised[:1]


def test_dropping_the_permutation_turns_the_comparison_red(tmp_path):
    """The check that guards the conversion can fail: with q and k in the wrong rotary layout logits are far off."""
    model = load("parcae", imported_folder("parcae", tmp_path))
    attention = model.get_submodule("model.layers.0.self_attn")
    with torch.no_grad():
        attention.q_proj.weight.copy_(HalfRotary(16, (0,)).backward([attention.q_proj.weight])[0])
    assert compare_with_recording(model, recording("parcae")).original["logits"] > 0.1
