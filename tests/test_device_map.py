"""A looped model spread over devices, or offloaded to memory or disk, computes what it computes in one place.

There is one real device here. `SeveralDevices` makes torch believe in more: it remembers for every tensor where it was
put and refuses, as a GPU would, an operation on tensors of two devices. The values are computed on the CPU.
"""

import collections
import random

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from accelerate import hooks as accelerate_hooks
from accelerate.hooks import attach_align_device_hook_on_blocks
from helpers import VARIANTS, random_tokens, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from modeling_looped import LoopedForCausalLM

TOKENS = random_tokens(2, 7)


class SeveralDevices(TorchFunctionMode):
    """Devices `cuda:0`, `cuda:1`, ... that exist by name; a tensor is on the CPU until it is put on one of them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return place_of(args[0])
        place = kwargs.pop("device", None)
        if func is torch.Tensor.to:
            result, place = self.move(place, *args, **kwargs)
        else:
            # As in torch, a number (a tensor without dimensions) may come from anywhere.
            places = {place_of(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and leaf.ndim}
            if len(places) > 1:
                raise RuntimeError(f"{func} got tensors on {places}")
            place = place or (places.pop() if places else "cpu")
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                leaf.place = torch.device(place)
        return result

    def move(self, place, tensor, *args, **kwargs):
        casts = []
        for arg in args:
            if torch.is_tensor(arg):
                place, arg = place_of(arg), arg.dtype
            if isinstance(arg, torch.device | str) or type(arg) is int:
                place = arg
            else:
                casts.append(arg)
        place = torch.device(place_of(tensor) if place is None else place)
        moved = tensor.to(*casts, **kwargs) if casts or kwargs else tensor
        if moved is tensor and place_of(tensor) != place:
            moved = tensor.clone() if type(tensor) is torch.Tensor else torch.nn.Parameter(tensor.detach())
        return moved, place


def place_of(tensor):
    return getattr(tensor, "place", torch.device("cpu"))


def blocks(model):
    """The modules that a device map places: the children of the model, with the list of layers taken apart."""
    names = [name for name, _ in model.named_children() if name != "model"]
    names += [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    return names + [f"model.layers.{layer}" for layer in range(len(model.model.layers))]


def spread(model, device_map):
    """What `dispatch_model` does for devices without offloading."""
    devices = {name: torch.device("cuda", index) for name, index in device_map.items()}
    attach_align_device_hook_on_blocks(
        model,
        execution_device=devices | {"": torch.device("cuda", 0)},
        offload=dict.fromkeys(devices, False),
        skip_keys=model._skip_keys_device_placement,
    )


@torch.no_grad()
def run(model, tokens=TOKENS):
    """Logits, and the tokens of a cached generation."""
    mask = torch.ones_like(tokens)
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    return model(tokens, attention_mask=mask).logits, generated


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", VARIANTS)
def test_every_placement_over_two_devices_computes_the_same(name, seed):
    model = tiny_model(**VARIANTS[name])
    expected = run(model)
    draw = random.Random(seed)
    # A map that a person writes may leave out what has no parameters; one that accelerate infers does not.
    placed = [block for block in blocks(model) if seed % 2 or model.get_submodule(block).state_dict()]
    device_map = {block: draw.randint(0, 1) for block in placed}
    if model.config.tie_word_embeddings:
        device_map["lm_head"] = device_map["model.embed_tokens"]
    with SeveralDevices():
        spread(model, device_map)
        places = {place_of(parameter).index for parameter in model.parameters()}
        seen = [result.to("cpu") for result in run(model, TOKENS.to("cuda:0"))]
    assert places == {0, 1}
    assert_same(seen, expected)


def test_the_simulation_sees_a_tensor_on_the_wrong_device():
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight.place = torch.device("cuda:1")
    with SeveralDevices(), torch.no_grad(), pytest.raises(RuntimeError, match=r"linear.* got tensors on"):
        model(TOKENS)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_inferred_map_never_splits_a_layer_and_runs(name):
    model = tiny_model(**VARIANTS[name])
    expected = run(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limits = {0: int(0.6 * size), 1: int(0.5 * size), 2: size}
    device_map = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    assert len(set(device_map.values())) > 1
    assert all(len(block.split(".")) <= 3 for block in device_map), device_map
    assert {block for block in device_map if block.startswith("model.layers")} <= set(blocks(model)) | {"model.layers"}
    with SeveralDevices():
        spread(model, device_map)
        seen = [result.to("cpu") for result in run(model, TOKENS.to("cuda:0"))]
    assert_same(seen, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_cpu_offload_computes_the_same(name):
    model = tiny_model(**VARIANTS[name])
    expected = run(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(run(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


# the same hooks as for the CPU; what is on disk and what is not, the next test mixes for every variant
@pytest.mark.parametrize("name", ["parcae", "capped", "shared"])
def test_disk_offload_computes_the_same(tmp_path, name):
    model = tiny_model(**VARIANTS[name])
    expected = run(model)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(run(model), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_loading_with_half_of_the_model_on_disk_computes_the_same(tmp_path, name):
    model = tiny_model(**VARIANTS[name])
    model.save_pretrained(tmp_path / "model")
    device_map = {block: ("cpu", "disk")[place % 2] for place, block in enumerate(blocks(model))}
    if model.config.tie_word_embeddings:
        device_map["lm_head"] = device_map["model.embed_tokens"]
    loaded = LoopedForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    on_disk = {key.rsplit(".", 1)[0] for key, parameter in loaded.named_parameters() if parameter.is_meta}
    assert on_disk
    # a loaded tensor may lie unaligned in memory, where kernels sum in another order than on the model that was saved
    assert_same(run(loaded), run(LoopedForCausalLM.from_pretrained(tmp_path / "model")))


@pytest.mark.parametrize("num_loops", [1, 3, 5])
def test_offloading_moves_a_shared_layer_once_per_loop(monkeypatch, num_loops):
    """The price of offloading a looped model: its core crosses over T times in one forward."""
    model = tiny_model()
    cpu_offload(model, execution_device=torch.device("cpu"))
    moved = collections.Counter()
    load = accelerate_hooks.set_module_tensor_to_device

    def count_loads(module, tensor_name, device, value=None, **kwargs):
        if value is not None:
            moved[module, tensor_name] += 1
        load(module, tensor_name, device, value=value, **kwargs)

    monkeypatch.setattr(accelerate_hooks, "set_module_tensor_to_device", count_loads)
    with torch.no_grad():
        model(TOKENS, num_loops=num_loops)
    for index, layer in enumerate(model.model.layers):
        times = num_loops if model.config.is_core_layer(index) else 1
        assert {moved[module, "weight"] for module in layer.modules() if hasattr(module, "weight")} == {times}
    assert moved[model.model.injection, "B"] == 1
