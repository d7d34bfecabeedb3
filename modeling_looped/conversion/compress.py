"""Compression: several layers of a stacked checkpoint become one shared layer that loops.

Each loop keeps norms of its own, and what the sharing of a projection loses comes back, as far as the rank goes, as
a low-rank difference per loop (Relaxed Recursive Transformers, arXiv 2410.20672). At full rank the result is the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.families import family_of
from modeling_looped.loop_update import LOOP_UPDATES, LoopUpdate
from modeling_looped.modeling_looped import LoopedForCausalLM
from modeling_looped.state_map import filled

from .alignment import ALIGNMENTS, Aligned, align, unaligned
from .calibration import Calibration
from .fitting import fit_adapters
from .layer_plan import LayerPlan
from .merging import CALIBRATED_MERGES, MERGES, InitialError, low_rank, relative_error
from .verification import in_full_precision

#: Ways to find low-rank differences that are solved for -> whether the shared weight takes part.
FITTED = {"fitted": True, "fitted_alone": False}

ADAPTERS = ("svd", "weighted_svd", *FITTED)

#: Merging rules that keep one loop's layers as they are -> the loop, of so many.
ANCHORS = {"first": lambda loops: 0, "last": lambda loops: loops - 1, "middle": lambda loops: loops // 2}


class Compressed(NamedTuple):
    """A compressed model and its errors, of every projection in every loop."""

    model: LoopedForCausalLM
    errors: list[InitialError]


@torch.no_grad()
def compress(
    teacher: PreTrainedModel,
    plan: LayerPlan,
    *,
    rank: int = 0,
    merge: str = "average",
    adapter: str = "svd",
    alignment: str = "none",
    calibration: Calibration | None = None,
    windows: Sequence[Tensor] = (),
    loop_update: dict | str = "replace",
    progress: Callable[[str], object] = lambda line: None,
) -> Compressed:
    """A looped model that stores the layers of `plan` and starts as near to `teacher` as they allow.

    Args:
        teacher: a stacked causal language model (Llama, Mistral, Qwen 2 or 3, OLMo 2), not quantised.
        plan: which layers become which.
        rank: of the low-rank difference of every shared projection in every loop; 0: none, and then `adapter` must be
            `svd`, its default.
        merge: how a shared weight comes from those it stands for: `average`, `first`, `last`, `middle` or
            `least_squares`.
        adapter: `svd`, nearest to the lost weights; `weighted_svd`, nearest in what they do to the inputs that
            calibration saw; or `fitted`, solved for slot after slot such that the states follow the teacher's on
            `windows` (see fitting.py). With `fitted` a loop has a factor on the shared weights too, and the loop whose
            layers are the shared ones (`merge` `first` or `last`) needs no adapter and has none. `fitted_alone`: these
            factors are 0, so that the low-rank weights do everything; to find out what the shared ones give.
        alignment: what is reordered to match before merging: `none`, `neurons` or `neurons_and_heads`.
        calibration: needed by `least_squares` and `weighted_svd`, for the layers that the core stands for.
        windows: text for `fitted`, token ids [1, S], equally long.
        loop_update: spec of the update between loops.
        progress: gets a line for every slot that is fitted.

    Returns:
        the looped model, with weights of its own in the teacher's dtype and on its device, and its errors (weighed by
        the calibration, if there is one).

    Raises:
        ValueError: for a plan or option that does not fit; names it and what is allowed.
    """
    weighs = check_options(rank, merge, adapter, alignment, loop_update, calibrated=calibration is not None)
    fits = adapter in FITTED
    if fits and not windows:
        raise ValueError(f"adapter={adapter!r}: pass windows, the text on which it fits.")
    if calibration is not None:
        unseen = sorted({layer for group in plan.core for layer in group} - calibration.layers)
        if unseen and weighs:
            raise ValueError(f"calibration has not measured layers {unseen}, which the core stands for.")
        calibration = None if unseen else calibration
    anchor = ANCHORS[merge](plan.num_loops) if merge in ANCHORS else None
    adapted = [loop for loop in range(plan.num_loops) if loop != anchor]
    if fits and not adapted:
        raise ValueError(f"adapter={adapter!r} with merge={merge!r} has nothing to fit in num_loops={plan.num_loops}.")
    config = compressed_config(teacher, plan, rank, loop_update, adapted if fits else None)
    stack = teacher_layers(teacher)
    state = {name: tensor for name, tensor in stack.items() if not name.startswith("model.layers.")}
    layers = [layer_weights(stack, layer) for layer in range(teacher.config.num_hidden_layers)]
    kept = [*enumerate(plan.prelude), *enumerate(plan.coda, start=len(plan.prelude) + len(plan.core))]
    for stored, layer in kept:
        state |= {f"model.layers.{stored}.{name}": tensor for name, tensor in layers[layer].items()}

    heads = {"head_dim": config.head_dim, "groups": config.num_attention_heads // config.num_key_value_heads}
    errors = []
    for index, group in enumerate(plan.core):
        reference = layers[group[0]]
        parts = [unaligned(reference)]
        parts += [align(layers[layer], reference, what=alignment, **heads) for layer in group[1:]]
        prefix = f"model.layers.{len(plan.prelude) + index}."
        shared, found = share(parts, group, index, 0 if fits else rank, merge, adapter, calibration)
        state |= {prefix + name: tensor for name, tensor in shared.items()}
        errors += found

    with torch.device("meta"):
        skeleton = LoopedForCausalLM(config)
    state |= own_parameters(skeleton)
    if fits:
        shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items() if ".loop_adapters." in name}
        state |= {name: torch.zeros(shape) for name, shape in shapes.items()}  # what will be solved for
    model = filled(teacher, {k: v.to(teacher.dtype) for k, v in state.items()}, skeleton)
    if fits:
        exact = in_full_precision(teacher)
        errors = fit_adapters(model.float(), exact, plan, windows, shares=FITTED[adapter], progress=progress)
        nn.Module.to(model, teacher.dtype)
    return Compressed(model, errors)


def share(
    parts: Sequence[Aligned],
    group: Sequence[int],
    index: int,
    rank: int,
    merge: str,
    adapter: str,
    calibration: Calibration | None,
) -> tuple[dict[str, Tensor], list[InitialError]]:
    """The weights of one shared layer that stands for the teacher layers `group`, and their errors."""
    state: dict[str, Tensor] = {}
    errors = []
    for name in parts[0].weights:
        weights = [part.weights[name] for part in parts]
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if "norm" in projection:
            state[name] = torch.stack(weights)  # a row per loop
            continue
        moments = (
            []
            if calibration is None
            else [
                part.permuted(projection, calibration.moment(layer, projection))
                for part, layer in zip(parts, group, strict=True)
            ]
        )
        merged = MERGES[merge](weights, moments)
        state[name] = merged
        differences = [weight.float() - merged for weight in weights]
        adapters = f"{parent}.loop_adapters.{projection}"
        if kind == "bias":
            if rank:
                state[f"{adapters}.bias"] = torch.stack(differences)
            continue
        weighing: Sequence[Tensor | None] = moments or [None] * len(weights)
        factors = [
            low_rank(difference, rank, moment if adapter == "weighted_svd" else None)
            for difference, moment in zip(differences, weighing, strict=True)
            if rank
        ]
        if rank:
            state[f"{adapters}.B"] = torch.stack([B for B, _ in factors])
            state[f"{adapters}.A"] = torch.stack([A for _, A in factors])
        for loop, (weight, difference, moment) in enumerate(zip(weights, differences, weighing, strict=True)):
            left = difference - factors[loop][0] @ factors[loop][1] if rank else difference
            before, after = (relative_error(error, weight, moment) for error in (difference, left))
            errors.append(InitialError(index, loop, group[loop], projection, before, after))
    return state, errors


def compressed_config(
    teacher: PreTrainedModel,
    plan: LayerPlan,
    rank: int,
    loop_update: dict | str,
    fitted: list[int] | None = None,
) -> LoopedConfig:
    """The config of the compressed model; `fitted`: the loops whose adapters scale the shared weights too."""
    stock = teacher.config
    plan.check(stock.num_hidden_layers)
    fields = family_of(stock).looped_fields(stock)
    types = fields.get("stored_layer_types")
    if types is not None:
        for group in plan.core:
            if len({types[layer] for layer in group}) > 1:
                raise ValueError(
                    f"layers {list(group)} cannot share: their attention is {[types[layer] for layer in group]}."
                )
        stored = [*plan.prelude, *(group[0] for group in plan.core), *plan.coda]
        fields["stored_layer_types"] = [types[layer] for layer in stored]
    adapter: dict[str, Any] | str = "none"
    if rank:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        adapter = {"type": "lora", "rank": rank, "targets": names, "biases": "per_loop"}
        if fitted is not None:
            adapter |= {"loops": tuple(fitted), "shared_scale": "per_channel"}
    return LoopedConfig(
        **fields,
        num_prelude_layers=len(plan.prelude),
        num_core_layers=len(plan.core),
        num_coda_layers=len(plan.coda),
        num_loops=plan.num_loops,
        core_group_size=1 if plan.order == "sequence" else None,
        injection="none",
        state_init="input",
        prelude_norm=False,
        loop_update=loop_update,
        loop_conditioning="norms",
        loop_adapter=adapter,
    )


def teacher_layers(teacher: PreTrainedModel) -> dict[str, Tensor]:
    """The teacher's weights under our names, its layers numbered as they are there."""
    fields = family_of(teacher.config).looped_fields(teacher.config)
    layers = teacher.config.num_hidden_layers
    config = LoopedConfig(**fields, num_prelude_layers=layers, num_core_layers=0, num_coda_layers=0)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LoopedForCausalLM(config).state_dict().items()}
    state_map = family_of(teacher.config).state_map(tied=config.tie_word_embeddings)
    return state_map.apply(teacher.state_dict(), shapes)


def layer_weights(stack: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of one layer, without its prefix."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in stack.items() if name.startswith(prefix)}


def own_parameters(skeleton: LoopedForCausalLM) -> dict[str, Tensor]:
    """What the loop update brings beyond the teacher's weights, as it initialises itself."""
    update = skeleton.get_submodule("model.loop_update").to_empty(device="cpu")
    if isinstance(update, LoopUpdate):
        update.init_weights()
    return {f"model.loop_update.{name}": tensor for name, tensor in update.state_dict().items()}


def check_options(
    rank: int, merge: str, adapter: str, alignment: str, loop_update: dict | str, *, calibrated: bool
) -> bool:
    """Whether these options weigh by a calibration. Looks at no weight, so that it can run before any are loaded.

    Args:
        rank, merge, adapter, alignment, loop_update: as in `compress`.
        calibrated: whether there is a calibration, or will be.

    Raises:
        ValueError: for a value that does not exist, options that do not go together, or a calibration that lacks.
    """
    if rank < 0:
        raise ValueError(f"rank={rank} must be at least 0.")
    for name, value, allowed in (
        ("merge", merge, MERGES),
        ("adapter", adapter, ADAPTERS),
        ("alignment", alignment, ALIGNMENTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of: {', '.join(allowed)}.")
    if rank == 0 and adapter != "svd":
        raise ValueError(f"adapter={adapter!r} has no effect with rank=0: set the rank of the low-rank differences.")
    if adapter in FITTED and alignment != "none":
        raise ValueError(f"alignment={alignment!r} must be 'none' with adapter={adapter!r}, which solves per loop.")
    weighs = merge in CALIBRATED_MERGES or adapter == "weighted_svd"
    if weighs and not calibrated:
        raise ValueError(f"merge={merge!r}, adapter={adapter!r}: pass a calibration, which weighs the errors.")
    LOOP_UPDATES.normalise(loop_update)
    return weighs


__all__ = ["ADAPTERS", "FITTED", "Compressed", "InitialError", "compress"]
