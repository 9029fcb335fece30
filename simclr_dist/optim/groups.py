"""Which parameters share a learning rate, a weight decay and a rule of update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from simclr_dist.config import OptimConfig
from simclr_dist.optim.depth import layers

ENCODER = "encoder."


class Rule(NamedTuple):
    """What the parameters of a group have in common."""

    decays: bool
    """Weights do. Biases and norms, with fewer than two dimensions, neither decay nor take LARS's trust ratio."""
    orthogonal: bool
    """Whether Muon's rule moves them; False everywhere with another optimiser."""
    lr_scale: float
    """The group's learning rate, as a multiple of the schedule's."""


@dataclass(frozen=True)
class Group:
    rule: Rule
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """By name in the model."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """The trainable parameters, each in one group: weights before biases and norms, and in the model's order.

    model: with an `encoder`, where `encoder_lr_scale` or `layer_decay` is set.
    """
    scales = encoder_scales(model, config)
    matrices = weight_matrices(model) if config.optimizer == "muon" else frozenset()
    others = config.adamw_base_lr / config.base_lr if config.optimizer == "muon" else 1.0
    groups: dict[Rule, Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = name in matrices
        rule = Rule(parameter.ndim > 1, is_matrix, scales.get(name, 1.0) * (1.0 if is_matrix else others))
        groups.setdefault(rule, Group(rule)).parameters[name] = parameter
    return sorted(groups.values(), key=lambda group: (not group.rule.decays, not group.rule.orthogonal))


def encoder_scales(model: nn.Module, config: OptimConfig) -> Mapping[str, float]:
    """By parameter of the encoder: its rate as a multiple of the head's. Empty where all rates are one.

    `layer_decay` counts from the head down: the encoder's last layer has it once, the first as often as there are
    layers (BEiT's rule, arXiv 2106.08254, with the projection head on top).
    """
    if config.encoder_lr_scale == config.layer_decay == 1:
        return {}
    found = layers(model.get_submodule("encoder"))
    return {
        ENCODER + name: config.encoder_lr_scale * config.layer_decay ** (len(found) - depth)
        for depth, names in enumerate(found)
        for name in names
    }


def weight_matrices(model: nn.Module) -> frozenset[str]:
    """Names of the weights that multiply: of linear layers, convolutions, attention. Muon is made for these.

    Not tables that are looked up or added (embeddings, positions, class tokens), and no scales.
    """
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim > 1
    )


def describe_scales(model: nn.Module, config: OptimConfig) -> list[str]:
    """For people: the rates of the encoder's layers, from the images on, and of the head; [] if all are alike."""
    scales = encoder_scales(model, config)
    if not scales:
        return []
    first: dict[float, str] = {}
    counts: dict[float, int] = {}
    parameters = dict(model.named_parameters())
    for name, scale in scales.items():
        first.setdefault(scale, name.removeprefix(ENCODER))
        counts[scale] = counts.get(scale, 0) + parameters[name].numel() * parameters[name].requires_grad
    lines = [f"x {scale:.4g} from {name} on ({counts[scale]:,} parameters)" for scale, name in first.items()]
    return [*lines, "x 1 for the projection head"]
