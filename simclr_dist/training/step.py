"""What one training step gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simclr_dist.data import Batch
from simclr_dist.health.check import Recording


@dataclass(frozen=True)
class StepResult:
    """One update. All tensors are detached; letters as in docs/architecture.md."""

    loss: Tensor
    """[]: of the global batch, the same on every rank; NaN for a skipped step."""
    grad_norm: Tensor
    """[]: global 2-norm of the gradients that the optimiser was given; NaN for a skipped step."""
    h: Tensor
    """[V*B, D], view after view; empty for a skipped step."""
    z: Tensor
    """[V*B, K], likewise."""
    recording: Recording | None = None
    """For the health check, where one is due."""
    loss_scale: float = 1.0
    """What the loss of a recorded step, and so its gradient, was multiplied with; other than 1 in fp16 alone."""
    skipped: bool = False
    """The loss or the gradient was not finite, and `train.on_non_finite` says skip."""

    @classmethod
    def of_skipped_step(cls) -> StepResult:
        nan, empty = torch.tensor(math.nan), torch.empty(0, 0)
        return cls(nan, nan, empty, empty, skipped=True)


@dataclass(frozen=True)
class FinishedStep:
    """A step seen from outside, for observers."""

    batch: Batch
    result: StepResult
    step: int
    """Steps done, this one included."""
    samples_seen: int
    began_s: float
    """When the loop began to wait for the batch, by time.monotonic()."""
    waited_s: float
    """What the loader's `wait_s` was then."""
    ended_epoch: int | None
    """Number of the epoch that ended with this step, from 1."""
    is_last: bool
    figures: dict[str, float]
    """By TensorBoard tag: what the observers before have measured after this step."""
