"""What an optimiser remembers of each weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def remembered(optimizer: Optimizer, weights: list[Tensor], name: str) -> list[Tensor]:
    """Its state `name` of each weight, of that weight's shape and strides; zeros before the first step."""
    for weight in weights:
        state = optimizer.state[weight]
        if name not in state:
            state[name] = torch.zeros_like(weight)
    return [optimizer.state[weight][name] for weight in weights]
