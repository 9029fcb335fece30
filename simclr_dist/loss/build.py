"""The loss that a configuration names, and what it costs to guess."""

from __future__ import annotations

from typing import Any

import torch

from simclr_dist.config import LossConfig
from simclr_dist.loss.nt_xent import NTXentLoss
from simclr_dist.loss.supcon import SupConLoss


def build_loss(config: LossConfig, num_views: int) -> NTXentLoss | SupConLoss:
    """Call it with z [num_views * B, K] and, for "supcon", labels [B], for the others sample ids [B]."""
    settings: dict[str, Any] = {
        "num_views": num_views,
        "learn_temperature": config.learn_temperature,
        "temperature_min": config.temperature_min,
        "temperature_max": config.temperature_max,
        "row_dtype": getattr(torch, config.row_dtype),
    }
    gather_dtype = getattr(torch, config.gather_dtype)
    if config.kind == "supcon":
        return SupConLoss(config.temperature, config.implementation, gather_dtype, **settings)
    settings |= {"decoupled": config.kind == "dcl", "pairs": config.pairs}
    return NTXentLoss(config.temperature, config.implementation, gather_dtype, **settings)


def negatives(config: LossConfig, num_views: int, global_batch_size: int) -> int:
    """How many rows of other images a row is compared with."""
    return (1 if config.pairs == "across" else num_views) * (global_batch_size - 1)


def choices(config: LossConfig, num_views: int, global_batch_size: int) -> int:
    """How many rows stand in the denominator for one row: where all look alike, the loss is the logarithm of it."""
    positives = {"nt_xent": 1, "dcl": 0, "supcon": num_views - 1}[config.kind]
    return negatives(config, num_views, global_batch_size) + positives
