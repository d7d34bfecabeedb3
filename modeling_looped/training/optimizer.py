"""Muon for hidden matrices and AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: torch's own options of each, taken where the caller gives none.
MUON_OPTIONS = {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` over the groups of one `Optimizer`.

    Schedulers, accelerate and checkpoints see one optimiser with one list of groups and one state dict; a group's
    `algorithm` says who steps it. The two optimisers hold nothing of their own, so that loading a state dict, which
    replaces groups and state, needs nothing besides.

    Muon's step is scaled to the root mean square of AdamW's (`match_rms_adamw`, arXiv 2502.16982), so that both can
    use one learning rate.

    Args:
        groups: as `parameter_groups` makes them; `algorithm` is `muon` or `adamw`.
        betas, eps: of AdamW.
        momentum: of Muon.

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
    ):
        unknown = sorted({str(group.get("algorithm")) for group in groups} - {"muon", "adamw"})
        if unknown:
            raise ValueError(f"algorithm={', '.join(unknown)} must be one of: muon, adamw.")
        by_algorithm = {name: [g for g in groups if g["algorithm"] == name] for name in ("muon", "adamw")}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if by_algorithm["muon"]:
            self._optimizers["muon"] = torch.optim.Muon(by_algorithm["muon"], **{**MUON_OPTIONS, "momentum": momentum})
        if by_algorithm["adamw"]:
            self._optimizers["adamw"] = torch.optim.AdamW(by_algorithm["adamw"], betas=betas, eps=eps, fused=True)
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
            inner.step()
        return loss


__all__ = ["MuonAdamW"]
