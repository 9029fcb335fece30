"""Muon: momentum whose matrices are made orthogonal, and AdamW for what is no matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from simclr_dist.optim.remembered import remembered

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from Jordan's post
EPS = 1e-7


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with `orthogonal=True`, else AdamW.

    For a weight w with gradient g: m <- momentum * m + (1 - momentum) * g, u = NS(momentum * m + (1 - momentum) * g),
    w <- (1 - lr * decay) * w - lr * sqrt(max(1, rows / columns)) * u. A weight of more than two dimensions is a matrix
    of its first against all others, so that a convolution is one row for each output channel.

    As `torch.optim.Muon`, which takes matrices only and one at a time: here equal shapes go together, and one optimiser
    holds the state of all parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        orthogonal: bool = True,
    ) -> None:
        # AdamW's own names and defaults first: it steps on the same groups and the same state.
        others = AdamW([torch.zeros(0)], lr=lr, betas=betas, weight_decay=weight_decay)
        own = {"momentum": momentum, "ns_steps": ns_steps, "orthogonal": orthogonal}
        super().__init__(params, {**others.defaults, **own})
        self._others = others

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_group(group)
        self._others.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
        self._others.state = self.state
        self._others.step()
        return value

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        momenta = remembered(self, weights, "momentum_buffer")
        grads = [p.grad for p in weights]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(weights):
            by_shape.setdefault(tuple(p.shape), []).append(i)
        for members in by_shape.values():
            matrices = torch.stack([ahead[i].flatten(1) for i in members])
            rows, columns = matrices.shape[1:]
            updates = orthogonalised(matrices, group["ns_steps"])
            rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
            for i, update in zip(members, updates, strict=True):
                weights[i].add_(update.view(weights[i].shape), alpha=-rate)


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """[n, r, c] -> [n, r, c]: for each U S V', nearly U V', by that many steps of a Newton-Schulz iteration.

    The singular values end about 1, not at it: the coefficients are chosen to grow small ones fast. In bfloat16 on GPUs
    and in float32 on CPUs, where bfloat16 took 10 times as long without hardware for it, and float32 is cheap with it.
    """
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = (matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=EPS)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
