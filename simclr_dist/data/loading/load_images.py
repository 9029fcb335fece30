"""Images for evaluation: the central crop of each, in a given order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.decode.crops import center_crops
from simclr_dist.data.loading.decode_pool import CropRule, DecodePool
from simclr_dist.data.loading.open_images import LoaderName, open_images
from simclr_dist.parallel.threads import default_num_threads


def load_images(
    source: str,
    image_size: int,
    *,
    batch_size: int,
    ids: NDArray[np.int64] | None = None,
    num_threads: int | None = None,
    loader: LoaderName = "auto",
    unreadable: dict[int, str] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images for evaluation, in the order of `ids` (all of them by default).

    unreadable: images that cannot be decoded are left out, and the reason of each is put there, under its number.
    Without it the first of them is a DataError, and none is left out.
    Yields (uint8 [b, S, S, 3], labels int64 [b], sample ids int64 [b]); the last b may be smaller than batch_size.
    The central 0.875 of the shorter side is resized to S = image_size, as torchvision evaluates on ImageNet;
    images of S x S stay as they are. Raises DataError.
    """
    images = open_images(source, loader)
    pool = DecodePool(images, default_num_threads(num_threads), unreadable)
    everything = np.arange(len(images.labels)) if ids is None else np.asarray(ids, np.int64)
    parts = (everything[start : start + batch_size] for start in range(0, len(everything), batch_size))

    def crop(_: NDArray[np.int64]) -> CropRule:
        return lambda heights, widths: center_crops(heights, widths, image_size)[None]

    try:
        for part, out in pool.read(((part, crop) for part in parts), num_views=1, image_size=image_size):
            pixels = out[0]
            if unreadable:
                whole = np.array([int(i) not in unreadable for i in part])
                part, pixels = part[whole], pixels[torch.from_numpy(whole)]
            if len(part):
                yield pixels, torch.from_numpy(images.labels[part]), torch.from_numpy(part.copy())
    finally:
        pool.close()


def are_whole(source: str, image_size: int, *, at_most: int = 64) -> bool:
    """Whether an evaluation leaves the images whole, because they are S x S: looks at some of them, evenly spread.

    Raises DataError.
    """
    images = open_images(source, "auto")
    sizes: list[NDArray[np.int64]] = []

    def crop(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int32]:
        sizes.extend((heights, widths))
        return center_crops(heights, widths, image_size)[None]

    try:
        n = len(images.labels)
        ids = np.unique(np.linspace(0, n - 1, min(n, at_most)).astype(np.int64)) if n else np.empty(0, np.int64)
        images.fill(ids, crop, np.empty((1, len(ids), image_size, image_size, 3), np.uint8))
    finally:
        images.close()
    return bool(n) and all((side == image_size).all() for side in sizes)
