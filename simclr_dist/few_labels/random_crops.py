"""Images with one random crop and flip each, for supervised training on a part of a dataset (SimCLR, appendix B.5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.loading.build import open_images
from simclr_dist.data.loading.loader import CropRule, DecodePool, cancel, default_num_threads
from simclr_dist.data.randomness import keys, permutation
from simclr_dist.evaluation.features import ImageBatch

_ORDER_STREAM = 1 << 16  # keeps this order apart from that of pretraining
_BATCHES_AHEAD = 2


class RandomCrops:
    """The samples `ids` of `source` in whole batches, in a new order with new crops every epoch.

    Order and crops are functions of (seed, epoch, sample id). With fewer images than a batch, all of them are the
    batch; otherwise the tail of an epoch is left out. Close it, or use it with `with`. Raises DataError.
    """

    def __init__(
        self,
        source: str,
        ids: NDArray[np.int64],
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        crop_scale_min: float = 0.08,
        flip_p: float = 0.5,
        num_threads: int | None = None,
    ) -> None:
        self.batch_size = min(batch_size, len(ids))
        self.batches_per_epoch = len(ids) // self.batch_size
        self._ids, self._image_size, self._seed = ids, image_size, seed
        self._crop_scale_min, self._flip_p = crop_scale_min, flip_p
        self._images = open_images(source, "auto")
        self._pool = DecodePool(self._images, default_num_threads(num_threads))

    def epoch(self, epoch: int) -> Iterator[ImageBatch]:
        """Images uint8 [b, S, S, 3], labels int64 [b], sample ids int64 [b] of one epoch."""
        order = self._ids[permutation(self._seed, epoch, _ORDER_STREAM, len(self._ids))]
        ahead: deque[tuple[NDArray[np.int64], Tensor, list[Future[None]]]] = deque()

        def crop(part: NDArray[np.int64]) -> CropRule:
            view_keys = keys(self._seed, epoch, part[None], 0)
            return lambda heights, widths: random_crops(
                view_keys, heights, widths, scale_min=self._crop_scale_min, flip_p=self._flip_p
            )

        try:
            for step in range(self.batches_per_epoch + _BATCHES_AHEAD):
                if step < self.batches_per_epoch:
                    part = order[step * self.batch_size : (step + 1) * self.batch_size]
                    out = torch.empty((1, len(part), self._image_size, self._image_size, 3), dtype=torch.uint8)
                    ahead.append((part, out, self._pool.start(part, crop, out)))
                if step >= _BATCHES_AHEAD and ahead:
                    part, out, parts = ahead.popleft()
                    for future in parts:
                        future.result()
                    yield out[0], torch.from_numpy(self._images.labels[part]), torch.from_numpy(part)
        finally:
            for _, _, parts in ahead:
                cancel(parts)

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> RandomCrops:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
