"""A loader whose batches are a pure function of epoch and step: nothing to save."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    """See `Loader`. A thread draws the next batches while a step computes."""

    def __init__(
        self, info: DatasetInfo, order: Order, draw: DrawBatch, device: torch.device | str, batches_ahead: int
    ) -> None:
        self.num_samples, self.class_names, self.account = info.num_samples, info.class_names, info.account
        self.fingerprint, self.content_fingerprint = info.fingerprint, info.content_fingerprint
        self.order, self.wait_s = order, 0.0
        self._draw, self._device, self._ahead = draw, device, batches_ahead
        self._thread = ThreadPoolExecutor(1, "batches")

    def batches(self, step: int) -> Iterator[Batch]:
        """All batches of this rank from global step `step` on, without end, on the loader's device."""
        steps = count(step)
        drawn = deque(self._begin(next(steps)) for _ in range(self._ahead))
        while True:
            begin = time.perf_counter()
            batch = drawn.popleft().result().to(self._device)
            self.wait_s += time.perf_counter() - begin
            drawn.append(self._begin(next(steps)))
            yield batch

    def _begin(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._draw, *divmod(step, self.order.steps_per_epoch))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> KeyedLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
