"""The optimiser that a configuration names, and the names of what it remembers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_dist.config import OptimConfig
from simclr_dist.optim.groups import Group, parameter_groups
from simclr_dist.optim.lars import LARS
from simclr_dist.optim.muon import Muon

_ADAM = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Each group's rate is `lr_scale` times what `set_learning_rate` sets before every step (groups.py)."""
    groups = [_settings(group, config) for group in parameter_groups(model, config)]
    lr = config.base_lr  # overwritten before every step
    match config.optimizer:
        case "lars":
            return LARS(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=config.betas)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=config.betas)
        case "muon":
            return Muon(groups, lr=lr, momentum=config.muon_momentum, ns_steps=config.muon_ns_steps, betas=config.betas)


def _settings(group: Group, config: OptimConfig) -> dict[str, Any]:
    rule = group.rule
    settings = {
        "params": list(group.parameters.values()),
        "weight_decay": config.weight_decay if rule.decays else 0.0,
        "lr_scale": rule.lr_scale,
    }
    if config.optimizer == "lars":
        settings["adapt"] = rule.decays
    if config.optimizer == "muon":
        settings["orthogonal"] = rule.orthogonal
    return settings


def parameter_order(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in the order in which `optimizer` numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(model: nn.Module, config: OptimConfig) -> dict[str, Tensor]:
    """What the optimiser of `build_optimizer` remembers after a step, under its names in a checkpoint; shapes only."""
    return {
        f"{name}/{state}": torch.empty((), device="meta") if state == "step" else parameter
        for group in parameter_groups(model, config)
        for name, parameter in group.parameters.items()
        for state in _remembered(group, config)
    }


def _remembered(group: Group, config: OptimConfig) -> tuple[str, ...]:
    match config.optimizer:
        case "lars":
            return ("velocity",)
        case "sgd":
            return ("momentum_buffer",) if config.momentum else ()
        case "muon" if group.rule.orthogonal:
            return ("momentum_buffer",)
        case _:
            return _ADAM


_USED_BY = {
    "momentum": ("lars", "sgd"),
    "nesterov": ("sgd",),
    "trust_coefficient": ("lars",),
    "betas": ("adam", "adamw", "muon"),
    "muon_momentum": ("muon",),
    "muon_ns_steps": ("muon",),
    "adamw_base_lr": ("muon",),
}


def unused_settings(config: OptimConfig) -> str:
    """A sentence about settings that were changed and that the chosen optimiser does not look at; "" if none were."""
    unused = [
        f"optim.{name} (for {' and '.join(users)})"
        for name, users in _USED_BY.items()
        if config.optimizer not in users and getattr(config, name) != OptimConfig.model_fields[name].default
    ]
    if not unused:
        return ""
    what = "this setting changes" if len(unused) == 1 else "these settings change"
    return f"optim.optimizer={config.optimizer}: {what} nothing with it: {', '.join(unused)}"
