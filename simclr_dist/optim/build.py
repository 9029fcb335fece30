"""The optimiser that a configuration names, and the names of what it remembers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.config import OptimConfig
from simclr_dist.optim.lars import LARS


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


def optimizer_state(model: nn.Module, config: OptimConfig) -> dict[str, Tensor]:
    """What the optimiser of `build_optimizer` remembers after a step, under its names in a checkpoint; shapes only."""
    parameters = dict(model.named_parameters())
    states = {
        "lars": ["velocity"],
        "sgd": ["momentum_buffer"] if config.momentum else [],
        "adamw": ["step", "exp_avg", "exp_avg_sq"],
    }[config.optimizer]
    return {
        f"{name}/{state}": torch.empty((), device="meta") if state == "step" else parameters[name]
        for name in parameter_order(model)
        for state in states
    }
