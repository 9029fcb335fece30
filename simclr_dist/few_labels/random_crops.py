"""Images with one random crop and flip each, for supervised training on a part of a dataset (SimCLR, appendix B.5)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.loading.decode_pool import CropRule, DecodePool
from simclr_dist.data.loading.open_images import open_images
from simclr_dist.data.randomness import keys, permutation
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import ImageBatch
from simclr_dist.parallel import distributed
from simclr_dist.parallel.threads import default_num_threads

_ORDER_STREAM = 1 << 16  # keeps this order apart from that of pretraining


class RandomCrops:
    """The samples `ids` of `source` in whole batches, in a new order with new crops every epoch.

    Order and crops are functions of (seed, epoch, sample id). With fewer images than a batch, all of them are the
    batch; otherwise the tail of an epoch is left out. With several ranks each reads its part of a batch; parts differ
    by one image at most. Close it, or use it with `with`. Raises DataError.
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
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        if self.batch_size < self._world_size:
            raise DataError(
                f"a batch of {self.batch_size} image(s) has none for some of {self._world_size} processes: use fewer "
                "processes, more labels or a larger --batch-size"
            )
        self.seed = seed
        self._ids, self._image_size = ids, image_size
        self._crop_scale_min, self._flip_p = crop_scale_min, flip_p
        self._images = open_images(source, "auto")
        self._pool = DecodePool(self._images, default_num_threads(num_threads))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[ImageBatch]:
        """Images uint8 [b, S, S, 3], labels int64 [b], sample ids int64 [b] of one epoch, from batch `first_batch` on.

        b: this rank's part of the batch.
        """
        order = self._ids[permutation(self.seed, epoch, _ORDER_STREAM, len(self._ids))]
        wholes = order[: self.batches_per_epoch * self.batch_size].reshape(-1, self.batch_size)[first_batch:]

        def crop(part: NDArray[np.int64]) -> CropRule:
            view_keys = keys(self.seed, epoch, part[None], 0)
            return lambda heights, widths: random_crops(
                view_keys, heights, widths, scale_min=self._crop_scale_min, flip_p=self._flip_p
            )

        batches = ((np.array_split(whole, self._world_size)[self._rank], crop) for whole in wholes)
        for part, out in self._pool.read(batches, num_views=1, image_size=self._image_size):
            yield out[0], torch.from_numpy(self._images.labels[part]), torch.from_numpy(part)

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> RandomCrops:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
