"""Optimisers and the learning rate. The rate is a pure function of samples seen: nothing to save, nothing to drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.config import OptimConfig


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0 (or `peak` for ever). Units: images."""

    peak: float
    warmup_samples: float
    total_samples: float
    cosine: bool = True

    def __call__(self, samples_seen: float) -> float:
        """The rate of the step that starts when `samples_seen` images have been trained on."""
        if samples_seen < self.warmup_samples:
            return self.peak * samples_seen / self.warmup_samples
        if not self.cosine:
            return self.peak
        progress = (samples_seen - self.warmup_samples) / (self.total_samples - self.warmup_samples)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def peak_learning_rate(config: OptimConfig, global_batch_size: int) -> float:
    """Chen et al. 2020, appendix B.1: linear 0.3 x G/256 or square root 0.075 x sqrt(G)."""
    scale = {"linear": global_batch_size / 256, "sqrt": math.sqrt(global_batch_size), "none": 1.0}
    return config.base_lr * scale[config.lr_scaling]


def build_schedule(config: OptimConfig, global_batch_size: int, samples_per_epoch: int, epochs: int) -> LearningRate:
    return LearningRate(
        peak_learning_rate(config, global_batch_size),
        config.warmup_epochs * samples_per_epoch,
        float(epochs * samples_per_epoch),
        config.schedule == "cosine",
    )


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Weights decay; biases and norm layers (fewer than two dimensions) neither decay nor take LARS's trust ratio."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": config.weight_decay, "adapt": True},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    lr = config.base_lr  # overwritten before every step
    if config.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    for group in groups:
        del group["adapt"]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas)


def parameter_order(model: nn.Module) -> list[str]:
    """Names of the parameters in the order in which `build_optimizer` numbers them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in named if p.ndim > 1] + [name for name, p in named if p.ndim <= 1]


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


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
        velocities = []
        for p in weights:
            state = self.state[p]
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p)
            velocities.append(state["velocity"])
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
