"""What a loader yields."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Two cropped and flipped views of B images; colour comes later, on the device.

    views: uint8 [2, B, H, W, 3]; view 0 of all images, then view 1.
    sample_ids: int64 [B], the images' numbers in their dataset.
    labels: int64 [B], -1 where there is none; SimCLR does not look at them.
    epoch: of the sample order; with the seed and the ids it fixes every random draw.
    """

    views: Tensor
    sample_ids: Tensor
    labels: Tensor
    epoch: int
    # The ids once more, on the host: random parameters are drawn there, and reading them back would stall the device.
    host_ids: NDArray[np.int64] = field(default=None, repr=False, compare=False)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.host_ids is None:
            object.__setattr__(self, "host_ids", self.sample_ids.cpu().numpy())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        views, ids, labels = (
            x.to(device, non_blocking=non_blocking) for x in (self.views, self.sample_ids, self.labels)
        )
        return Batch(views, ids, labels, self.epoch, self.host_ids)
