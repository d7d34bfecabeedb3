r"""Fitting: low-rank differences per loop that are solved for, not trained, slot after slot on calibration text.

A shared layer that stands for teacher layer l in some loop gets, projection by projection in the order of execution,
the weights c W + B A that bring the student's state, as it really is there, nearest to the teacher's: what earlier
slots got wrong is part of the problem that later ones solve. Each is a regression with a closed solution, so a few
thousand tokens give what training would need hundreds of thousands for.

n tokens; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.loop_adapter import LoopLoRA
from modeling_looped.modeling_looped import LoopedForCausalLM

from .layer_plan import LayerPlan
from .merging import InitialError, low_rank

#: Projections that end a branch: what they give is added to the residual stream.
ENDS = {"o_proj": "input_layernorm", "down_proj": "pre_feedforward_layernorm"}

#: Strength of the pull to the teacher's own weight, against the mean square of an input channel.
RIDGE = 1e-2

#: No token counts more than so many times the mean.
LARGEST_WEIGHT = 4.0


class Fit(NamedTuple):
    """c [out], B [out, r] and A [r, in] of a fitted weight c W + B A."""

    scale: Tensor
    B: Tensor
    A: Tensor


def fit_weight(
    inputs: Tensor,
    token_weights: Tensor,
    shared: Tensor,
    own: Tensor,
    rank: int,
    targets: Tensor | None = None,
    *,
    shares: bool = True,
) -> Fit:
    r"""The weight M = diag(c) W + B A that comes nearest to what a projection should do to its inputs.

    Inside a branch that is what the teacher's weight W_l does to them. At its end there are targets y, and M is to
    minimise \sum_i w_i |y_i - M x_i|^2 + a |M - W_l|^2; without the bound on its rank the minimum is the ridge
    regression M* = (Y X^T + a W_l) (X X^T + a)^{-1}. Of W_l or M*, c takes what the shared weight explains, channel by
    channel, and B A the rest, truncated where that costs least on these inputs (reduced-rank regression).

    Args:
        inputs: x, what the student's projection reads, [n, in].
        token_weights: w, with mean 1, [n].
        shared: W, the shared weight, [out, in].
        own: W_l, the teacher's weight, [out, in].
        rank: r.
        targets: y, what it should give, [n, out]; `None`: W_l x.
        shares: whether the shared weight takes part; if not, c is 0.
    """
    weighted = inputs * token_weights[:, None]
    moment = (weighted.T @ inputs).double() / len(inputs)
    pull = RIDGE * moment.diagonal().mean().clamp_min(1e-12)
    moment.diagonal().add_(pull)
    best = own.double()
    if targets is not None:
        cross = (targets.T @ weighted).double() / len(inputs) + pull * best
        best = torch.linalg.solve(moment, cross, left=False)
    base = shared.double()
    reach = base @ moment
    scale = (best * reach).sum(-1) / (base * reach).sum(-1).clamp_min(1e-12) * shares
    B, A = low_rank((best - scale[:, None] * base).float(), rank, moment.float())
    return Fit(scale.float(), B, A)


@torch.no_grad()
def fit_adapters(
    student: LoopedForCausalLM,
    teacher: PreTrainedModel,
    plan: LayerPlan,
    windows: Sequence[Tensor],
    *,
    shares: bool = True,
    progress: Callable[[str], object] = lambda line: None,
) -> list[InitialError]:
    """Solve for the loop adapters of `student`, in place, such that its states follow the teacher's on `windows`.

    Tokens count by 1 / |state|^2, since what reads a state normalises it: the few tokens whose states are a hundred
    times as large as the others' would be all that a plain regression sees.

    Args:
        student: made by `compress` after `plan`, with adapters that have a factor on the shared weight; in float32.
        teacher: what it was made of, in float32.
        plan: which layer each slot stands for.
        windows: calibration text, token ids [1, S], equally long (others are left out). All of it is in memory at
            once, with five states of the teacher for every layer that an adapter stands for: 20 * D bytes per token
            and layer.
        shares: as in `fit_weight`.
        progress: gets a line per slot.

    Raises:
        ValueError: if there is no text, or the student has no such adapters.
    """
    length = len(windows[0][0]) if windows else 0
    text = [window for window in windows if window.shape[1] == length]
    if not text:
        raise ValueError("windows is empty: fitting needs calibration text.")
    ids = torch.cat(text).to(teacher.device)
    spec = student.config.loop_adapter
    if spec["type"] != "lora" or spec["shared_scale"] != "per_channel":
        raise ValueError(f"loop_adapter={spec} must be a 'lora' with shared_scale='per_channel' to be fitted.")
    loops = range(plan.num_loops) if spec["loops"] is None else spec["loops"]
    layers = {group[loop] for group in plan.core for loop in loops}
    fitter = Fitter(student, plan, record(teacher, layers, ids), shares, progress)
    was_training = student.training
    try:
        student.eval().model(ids, use_cache=False)
    finally:
        fitter.close()
        student.train(was_training)
    return fitter.fitted


#: (teacher layer, what) -> what the teacher has there, [n, D], and its weights
Record = dict[tuple[int, str], Tensor]


def record(teacher: PreTrainedModel, layers: set[int], ids: Tensor) -> Record:
    """What the teacher's `layers` hold and give: of each projection `<name>.weight` and `<name>.bias`; of those that
    end a branch, `<name>.output`; and the states around the two branches, `before`, `between` and `after`.
    """
    found: Record = {}
    handles = []

    def keep(layer: int, name: str, module: nn.Module, args: tuple, result: Any = None) -> None:
        tensor = args[0] if result is None else result[0] if isinstance(result, tuple) else result
        found[layer, name] = tensor.flatten(0, 1)

    stack: Any = teacher.get_submodule("model.layers")
    for layer in layers:
        handles.append(stack[layer].register_forward_pre_hook(partial(keep, layer, "before")))
        handles.append(stack[layer].register_forward_hook(partial(keep, layer, "after")))
        for name, module in stack[layer].named_modules():
            projection = name.rpartition(".")[2]
            if not isinstance(module, nn.Linear):
                continue
            found[layer, f"{projection}.weight"] = module.weight
            if module.bias is not None:
                found[layer, f"{projection}.bias"] = module.bias
            if projection in ENDS:
                handles.append(module.register_forward_hook(partial(keep, layer, f"{projection}.output")))
    try:
        teacher.eval().get_submodule("model")(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        # what stands between the branches, or would without the norms of other placements than `pre`
        found[layer, "between"] = found[layer, "before"] + found[layer, "o_proj.output"]
    return found


class Fitter:
    """Hooks on a student's loop adapters, each of which solves for its weights when its inputs arrive.

    Args:
        student, plan, shares, progress: as in `fit_adapters`.
        teacher: what the teacher has.
    """

    def __init__(self, student: LoopedForCausalLM, plan: LayerPlan, teacher: Record, shares: bool, progress: Callable):
        self.teacher, self.plan, self.shares, self.progress = teacher, plan, shares, progress
        self.fitted: list[InitialError] = []
        self.handles: list[Any] = []
        self._residual: dict[str, Tensor] = {}
        #: Where another norm follows a branch, its end cannot repair the state: it only has to give what the teacher's
        #: gives.
        self.repairs = student.config.norm_placement == "pre"
        layers: Any = student.get_submodule("model.layers")
        for index in range(len(plan.core)):
            layer = layers[len(plan.prelude) + index]
            adapters = [(name, part) for name, part in layer.named_modules() if isinstance(part, LoopLoRA)]
            for name, part in adapters:
                projection = layer.get_submodule(name.replace("loop_adapters.", ""))
                hook = partial(self._fit, index, name.rpartition(".")[2], projection)
                self.handles.append(part.register_forward_pre_hook(hook))
            for projection, norm in ENDS.items():
                if self.repairs:
                    hook = partial(self._keep_residual, projection)
                    self.handles.append(layer.get_submodule(norm).register_forward_pre_hook(hook))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _keep_residual(self, projection: str, module: nn.Module, args: tuple[Tensor, int]) -> None:
        self._residual[projection] = args[0].flatten(0, 1)

    def _fit(self, index: int, name: str, projection: nn.Linear, adapter: LoopLoRA, args: tuple) -> None:
        inputs, loop = args[0].flatten(0, 1).float(), args[1]
        row = adapter.row(loop)
        if row is None:
            return
        layer = self.plan.core[index][loop]
        weight, bias = self.teacher[layer, f"{name}.weight"].float(), self.teacher.get((layer, f"{name}.bias"))
        targets = self._targets(layer, name)
        if targets is not None and bias is not None:
            targets = targets - bias
        where = {"down_proj": "after"}.get(name, "before" if name in ("q_proj", "k_proj", "v_proj") else "between")
        importance = self.teacher[layer, where].float().square().sum(-1).clamp_min(1e-12).reciprocal()
        importance = (importance / importance.mean()).clamp_max(LARGEST_WEIGHT)
        rank, shared_weight = adapter.A.shape[1], projection.weight.float()
        fit = fit_weight(inputs, importance, shared_weight, weight, rank, targets, shares=self.shares)
        adapter.A[row], adapter.B[row] = fit.A / adapter.scale, fit.B
        if adapter.shared_scale is not None:
            adapter.shared_scale[row] = fit.scale
        if adapter.bias is not None and bias is not None:
            adapter.bias[row] = bias - fit.scale * projection.bias
        targets = inputs @ weight.T if targets is None else targets
        shared, adapted = (
            relative(inputs, targets, importance, found)
            for found in (shared_weight, adapter.merged(shared_weight, loop))
        )
        self.fitted.append(InitialError(index, loop, layer, name, shared, adapted))
        if name == "down_proj":
            self.progress(f"fitted core layer {index} in loop {loop} to layer {layer}: error {adapted:.3f}")

    def _targets(self, layer: int, name: str) -> Tensor | None:
        """What the projection should give, [n, out]; `None`: what the teacher's weight makes of its input."""
        if name not in ENDS:
            return None
        if not self.repairs:
            return self.teacher[layer, f"{name}.output"].float()
        after = self.teacher[layer, "between" if name == "o_proj" else "after"]
        return after.float() - self._residual[name].float()


def relative(inputs: Tensor, targets: Tensor, token_weights: Tensor, weight: Tensor) -> float:
    """Root of the weighted mean square of what `weight` misses, against that of the targets."""
    missed = (targets - inputs @ weight.T).square().sum(-1) @ token_weights
    whole = targets.square().sum(-1) @ token_weights
    return (missed / whole.clamp_min(1e-30)).sqrt().item()


__all__ = ["Fit", "fit_adapters", "fit_weight"]
