"""Every part of Parcae's recipe (arXiv 2604.12946, and its code) against the equation that it is written as."""

import math

import pytest
import torch
from helpers import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerControl, TrainerState

from modeling_looped import LoopedForCausalLM
from modeling_looped.training.optimizer import Fp32Products, MuonAdamW, MuonSchedule
from modeling_looped.training.parameters import classify, parameter_groups
from modeling_looped.training.pretraining import PretrainingConfig

STD = 0.05
INITS = ["normal", "truncated_normal", "orthogonal"]


def fresh(**settings) -> LoopedForCausalLM:
    torch.manual_seed(0)
    return LoopedForCausalLM(tiny_config(initializer_range=STD, **settings))


def matrices(model: torch.nn.Module, *, output: bool) -> dict[str, torch.Tensor]:
    """The weights of linear maps in layers: those that write to the residual stream, or all others."""
    found = {p.name: p.value for p in classify(model) if p.role == "matrix"}
    ends = ("o_proj.weight", "down_proj.weight")
    return {name: value for name, value in found.items() if name.endswith(ends) == output}


def root_mean_square(weight: torch.Tensor) -> float:
    return weight.detach().float().square().mean().sqrt().item()


@pytest.mark.parametrize("kind", INITS)
def test_weights_start_with_the_root_mean_square_of_the_config(kind):
    model = fresh(weight_init=kind)
    embedding = model.get_input_embeddings().weight[1:]
    everything = [*matrices(model, output=False).values(), *matrices(model, output=True).values(), embedding]
    for weight in everything:
        assert root_mean_square(weight) == pytest.approx(STD, rel=0.08)
        if kind == "truncated_normal":
            assert weight.abs().max() <= 3 * STD
        if kind == "orthogonal" and weight is not embedding:
            small, large = sorted(weight.shape)
            wide = weight if weight.shape[0] == small else weight.T
            expected = STD**2 * large * torch.eye(small)
            torch.testing.assert_close(wide @ wide.T, expected, atol=1e-5, rtol=1e-4)
    assert not model.get_input_embeddings().weight[model.config.pad_token_id].any()


@pytest.mark.parametrize("kind", INITS)
@pytest.mark.parametrize("loops", [1, 9])
def test_output_projections_shrink_with_the_layers_that_run(kind, loops):
    """Their deviation is s / sqrt(2 N), N = P + R T + C, a looped layer counted in every loop."""
    model = fresh(weight_init=kind, output_projection_init="depth_scaled", num_loops=loops)
    depth = 1 + 2 * loops + 1
    for weight in matrices(model, output=True).values():
        assert root_mean_square(weight) == pytest.approx(STD / math.sqrt(2 * depth), rel=0.08)
    for weight in matrices(model, output=False).values():
        assert root_mean_square(weight) == pytest.approx(STD, rel=0.08)


def test_with_zeros_every_layer_starts_as_the_identity():
    model = fresh(output_projection_init="zeros", injection="none", state_init="input", prelude_norm=False).eval()
    assert all(not weight.any() for weight in matrices(model, output=True).values())
    tokens = torch.tensor([[5, 6, 7]])
    expected = model.model.norm(model.get_input_embeddings()(tokens))
    torch.testing.assert_close(model.model(tokens, num_loops=4).last_hidden_state, expected)


def test_loaded_weights_are_not_drawn_again(tmp_path):
    model = tiny_model(weight_init="orthogonal", output_projection_init="zeros")
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_half_precision_models_can_start_orthogonal():
    model = LoopedForCausalLM._from_config(tiny_config(weight_init="orthogonal"), dtype=torch.bfloat16)
    assert all(root_mean_square(w) == pytest.approx(0.02, rel=0.08) for w in matrices(model, output=False).values())


def test_the_loop_system_starts_as_written():
    r"""\bar A = \sqrt{1/5}, B = C = I, e = norm(prelude) with weights 1."""
    model = fresh(readout="linear", weight_init="orthogonal", output_projection_init="depth_scaled").model
    size = model.config.hidden_size
    decay = torch.exp(-torch.nn.functional.softplus(model.injection.dt_bias) * torch.exp(model.injection.A_log))
    torch.testing.assert_close(decay, torch.full((size,), math.sqrt(1 / 5)))
    assert torch.equal(model.injection.B.detach(), torch.eye(size))
    assert torch.equal(model.readout.weight.detach(), torch.eye(size))
    assert torch.equal(model.prelude_norm.weight.detach(), torch.ones(size))


def test_nothing_of_the_loop_system_decays_or_goes_to_muon():
    model = fresh(readout="linear", value_embedding={"type": "gated", "layers": [1], "gate_channels": 8})
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, muon=True, muon_weight_decay=0.2)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_parameter[id(parameter)]
        # the code's rule: matrices but embeddings, norms, injection and readout; we leave out the value gates too
        muon = ".layers." in name and name.endswith("_proj.weight")
        assert group["algorithm"] == ("muon" if muon else "adamw"), name
        embedding = "embed" in name or "lm_head" in name
        assert group["weight_decay"] == (0.2 if muon else 0.1 if embedding else 0.0), name


def test_muon_steps_as_far_as_its_scale_says():
    """`original` moves a [rows, columns] matrix by rate * sqrt(max(1, rows / columns)) times an orthogonal one."""
    weight = torch.nn.Parameter(torch.zeros(64, 16))
    group = {"name": "matrix", "params": [weight], "lr": 0.01, "weight_decay": 0.0, "algorithm": "muon"}
    optimizer = MuonAdamW([group], learning_rate_scale="original")
    weight.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # Newton-Schulz leaves singular values between about 0.7 and 1.2
    singular = torch.linalg.svdvals(weight.detach()) / (0.01 * math.sqrt(64 / 16))
    assert 0.6 < singular.min() <= singular.max() < 1.3


class ProductTypes(TorchDispatchMode):
    """Notes the type of every product of matrices."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_muon_multiplies_in_float32_where_the_cpu_has_no_bf16_products(monkeypatch, shape):
    gradient, stepped = torch.randn(*shape, generator=torch.Generator().manual_seed(0)), []
    for capability, kind in (("AVX512", torch.bfloat16), ("AVX2", torch.float32)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = gradient.clone()
        group = {"name": "matrix", "params": [weight], "lr": 1.0, "weight_decay": 0.0, "algorithm": "muon"}
        optimizer = MuonAdamW([group])
        with ProductTypes() as products:
            optimizer.step()
        assert products.seen == {kind}
        stepped.append(weight.detach())
    difference = torch.linalg.norm(stepped[0] - stepped[1]) / torch.linalg.norm(stepped[0])
    assert difference < 0.01  # bfloat16 has 8 bits


def test_float32_products_change_nothing_but_bf16_on_the_cpu():
    numbers = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(24, 24, generator=numbers) for _ in range(3))
    half, other, added = (x.bfloat16() for x in (a, b, c))
    with Fp32Products():
        wide, named = a @ b, torch.mm(input=a, mat2=b)
        torch.mm(half, other, out=(written := torch.empty_like(half)))
        found = [half @ other, torch.mm(half, other), torch.addmm(added, half, other, beta=0.5, alpha=2.0)]
    assert torch.equal(wide, a @ b)
    assert torch.equal(named, a @ b)
    assert torch.equal(written, torch.mm(half, other))
    product = half.float() @ other.float()
    expected = [product, product, torch.addmm(added.float(), half.float(), other.float(), beta=0.5, alpha=2.0)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_muons_decay_and_momentum_follow_the_step(tmp_path):
    args = PretrainingConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        optim_recipe="muon",
        muon_weight_decay=0.2,
        muon_weight_decay_schedule="linear",
        muon_momentum_warmup_steps=4,
    )
    groups = [{"algorithm": name, "weight_decay": 0.1, "momentum": 0.95} for name in ("muon", "adamw")]
    optimizer = type("Optimizer", (), {"param_groups": groups})()
    for step, decay, momentum in ((0, 0.2, 0.85), (2, 0.16, 0.9), (5, 0.1, 0.95), (9, 0.02, 0.95)):
        state = TrainerState(global_step=step, max_steps=10)
        MuonSchedule(args).on_step_begin(args, state, TrainerControl(), optimizer=optimizer)
        assert groups[0]["weight_decay"] == pytest.approx(decay)
        assert groups[0]["momentum"] == pytest.approx(momentum)
        assert groups[1] == {"algorithm": "adamw", "weight_decay": 0.1, "momentum": 0.95}


def test_the_rate_is_a_trapezoid(tmp_path):
    """rate * (N - t) / cooldown in the last steps, the rate itself before them."""
    from transformers.optimization import get_scheduler

    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0}
    args = PretrainingConfig(output_dir=str(tmp_path), use_cpu=True, cooldown_steps=0.5, **schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-3)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 0, 40, args.scheduler_kwargs(40))
    for step in range(40):
        expected = 8e-3 * (40 - step) / 20 if step > 20 else 8e-3
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), step
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
    args.warmup_steps = 40
    with pytest.raises(ValueError, match=r"cooldown_steps=0\.5 are 40 and 20 steps, together more than the 40"):
        args.scheduler_kwargs(40)
    with pytest.raises(ValueError, match="needs lr_scheduler_type='warmup_stable_decay', not 'linear'"):
        PretrainingConfig(output_dir=str(tmp_path), use_cpu=True, cooldown_steps=5)
