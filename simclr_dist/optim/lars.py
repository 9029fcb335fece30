"""LARS: layer-wise adaptive rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from simclr_dist.optim.remembered import remembered


class LARS(Optimizer):
    """Layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888), as in SimCLR's own code.

    For a weight w with gradient g (weight decay added): v <- momentum * v + lr * r * g, w <- w - v, with the trust
    ratio r = trust_coefficient * |w| / |g|, or 1 where a norm is 0 and in groups with `adapt=False`.
    The rate sits inside the momentum, so that a change of rate takes effect on new gradients only.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            self._step_group(group)
        return value

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        velocities = remembered(self, weights, "velocity")
        grads = [p.grad for p in weights]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            w, g = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(grads))
            rates = torch.where((w > 0) & (g > 0), group["lr"] * group["trust_coefficient"] * w / g, group["lr"])
            updates = torch._foreach_mul(grads, rates.unbind())
        else:
            updates = torch._foreach_mul(grads, group["lr"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        torch._foreach_sub_(weights, velocities)
