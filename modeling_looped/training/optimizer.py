"""Muon for hidden matrices and AdamW for the rest, as one optimiser, and the trainer's part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import RecipeArguments
from .parameters import parameter_groups

#: Where Muon's momentum starts when it warms up.
FIRST_MOMENTUM = 0.85


#: Of `torch.backends.cpu.get_cpu_capability()`: CPUs on which PyTorch has no fast products of bfloat16.
WITHOUT_BF16_PRODUCTS = ("DEFAULT", "NO AVX", "AVX2")


class Fp32Products(TorchFunctionMode):
    """While it is entered, products of bfloat16 matrices on the CPU are computed in float32, and the result rounded.

    Muon's Newton-Schulz iteration is in bfloat16, with no option for another type, and a CPU without such products is
    slower at it than in float32. Elsewhere products add up in float32 too, so that only the order of the sums differs.
    Nothing is changed for other devices and types, nor where tensors are given by name (`out` is written in place).
    """

    PRODUCTS = frozenset({torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.mm, torch.addmm})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.PRODUCTS:
            return func(*args, **kwargs)
        named = any(isinstance(value, torch.Tensor) for value in kwargs.values())
        ours = all(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in args)
        if named or not ours:
            return func(*args, **kwargs)
        return func(*(t.float() for t in args), **kwargs).to(torch.bfloat16)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` over the groups of one `Optimizer`.

    Schedulers, accelerate and checkpoints see one optimiser with one list of groups and one state dict; a group's
    `algorithm` says who steps it. The two optimisers hold nothing of their own, so that loading a state dict, which
    replaces groups and state, needs nothing besides. On a CPU without bfloat16 products Muon's are `Fp32Products`.

    Args:
        groups: as `parameter_groups` makes them; `algorithm` is `muon` or `adamw`.
        betas, eps: of AdamW.
        momentum: of Muon.
        learning_rate_scale: of Muon. `match_rms_adamw` scales its step to the root mean square of AdamW's (arXiv
            2502.16982), so that both can use one learning rate; `original`: see `RecipeArguments`.

    Raises:
        ValueError: for an unknown `algorithm`, or a Muon group with a parameter that is not a matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        learning_rate_scale: str = "match_rms_adamw",
    ):
        unknown = sorted({str(group.get("algorithm")) for group in groups} - {"muon", "adamw"})
        if unknown:
            raise ValueError(f"algorithm={', '.join(unknown)} must be one of: muon, adamw.")
        by_algorithm = {name: [g for g in groups if g["algorithm"] == name] for name in ("muon", "adamw")}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if by_algorithm["muon"]:
            self._optimizers["muon"] = torch.optim.Muon(
                by_algorithm["muon"], momentum=momentum, nesterov=True, adjust_lr_fn=learning_rate_scale
            )
        if by_algorithm["adamw"]:
            self._optimizers["adamw"] = torch.optim.AdamW(by_algorithm["adamw"], betas=betas, eps=eps, fused=True)
        slow = torch.backends.cpu.get_cpu_capability() in WITHOUT_BF16_PRODUCTS
        self._products = Fp32Products() if slow else contextlib.nullcontext()
        # made by the two, the groups carry all of their options
        filled = {group["name"]: group for inner in self._optimizers.values() for group in inner.param_groups}
        super().__init__([filled[group["name"]] for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, inner in self._optimizers.items():
            inner.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            inner.state = self.state
            with self._products:
                inner.step()
        return loss


class MuonSchedule(TrainerCallback):
    r"""What changes of Muon's groups from step to step beside the rate, as a function of the step alone.

    At step t of N (from 0) the weight decay is \lambda (1 - t / N) with `muon_weight_decay_schedule="linear"`, and the
    momentum 0.85 + (\mu - 0.85) min(1, t / n) with n = `muon_momentum_warmup_steps` (the code of Parcae, arXiv
    2604.12946).
    """

    def __init__(self, args: RecipeArguments):
        self.args = args

    @property
    def weight_decay(self) -> float:
        r"""\lambda, before it falls."""
        args = self.args
        return args.weight_decay if args.muon_weight_decay is None else args.muon_weight_decay

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        changes: dict[str, float] = {}
        if self.args.muon_weight_decay_schedule == "linear":
            changes["weight_decay"] = self.weight_decay * max(0.0, 1.0 - state.global_step / max(1, state.max_steps))
        if self.args.muon_momentum_warmup_steps:
            risen = min(1.0, state.global_step / self.args.muon_momentum_warmup_steps)
            changes["momentum"] = FIRST_MOMENTUM + (self.args.muon_momentum - FIRST_MOMENTUM) * risen
        for group in optimizer.param_groups:
            if group.get("algorithm") == "muon":
                group.update(changes)


class RecipeOptimizerMixin(Trainer):
    """Makes the optimiser and the schedule that a `RecipeArguments` describes."""

    args: Any  # a `RecipeArguments`; those of what derives from this are of narrower types

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.optim_recipe != "muon":
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "optim_recipe='muon' needs whole matrices, and DeepSpeed and FSDP give the optimiser pieces of them: "
                "use optim_recipe='adamw'."
            )
        self.add_callback(MuonSchedule(self.args))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of `args.optim_recipe`."""
        args = self.args
        if self.optimizer is None and args.optim_recipe != "trainer":
            groups = parameter_groups(
                model or self.model,  # pyright: ignore[reportArgumentType] (the base class allows for no model at all)
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                muon=args.optim_recipe == "muon",
                muon_learning_rate=args.muon_learning_rate,
                muon_weight_decay=args.muon_weight_decay,
                adapter_learning_rate=args.adapter_learning_rate,
                embedding_learning_rate=args.embedding_learning_rate,
            )
            betas = (args.adam_beta1, args.adam_beta2)
            if args.optim_recipe == "muon":
                self.optimizer = MuonAdamW(
                    groups,
                    betas=betas,
                    eps=args.adam_epsilon,
                    momentum=args.muon_momentum,
                    learning_rate_scale=args.muon_learning_rate_scale,
                )
            else:
                self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, fused=True)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`; only here is it known of how many steps `args.cooldown_steps` may be a share."""
        self.args.lr_scheduler_kwargs = self.args.scheduler_kwargs(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)


__all__ = ["MuonAdamW", "MuonSchedule", "RecipeOptimizerMixin"]
