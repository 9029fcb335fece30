"""A loader whose batches are a pure function of epoch and step: nothing to shut down, nothing to save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING

from simclr_dist.data.batch import Batch
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.data.order import Order

if TYPE_CHECKING:
    import torch

DrawBatch = Callable[[int, int], Batch]
"""(epoch, step of the epoch) -> the batch of this rank, on the CPU."""


class KeyedLoader:
    """See `Loader`. Batches are drawn when they are asked for, by the process that trains."""

    def __init__(self, info: DatasetInfo, order: Order, draw: DrawBatch, device: torch.device | str) -> None:
        self.num_samples, self.class_names, self.account = info.num_samples, info.class_names, info.account
        self.fingerprint, self.content_fingerprint = info.fingerprint, info.content_fingerprint
        self.order, self.wait_s = order, 0.0
        self._draw, self._device = draw, device

    def batches(self, step: int) -> Iterator[Batch]:
        """All batches of this rank from global step `step` on, without end, on the loader's device."""
        for current in count(step):
            begin = time.perf_counter()
            batch = self._draw(*divmod(current, self.order.steps_per_epoch)).to(self._device)
            self.wait_s += time.perf_counter() - begin
            yield batch

    def close(self) -> None: ...

    def __enter__(self) -> KeyedLoader:
        return self

    def __exit__(self, *exc: object) -> None: ...
