"""The learning rate: a pure function of samples seen. There is nothing to save, and nothing to drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """lr: of a group whose `lr_scale` is 1 or not given (groups.py)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.defaults["lr"] = lr


def learning_rate(optimizer: Optimizer) -> float:
    """What `set_learning_rate` has set."""
    return float(optimizer.defaults["lr"])
