"""Images for evaluation, in a given order: the central crop of each, or random crops that anybody can draw again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch
from simclr_dist.data.decode.crops import center_crops, keyed_crops
from simclr_dist.data.loading.decode_pool import CropRule, CropRuleOf, DecodePool
from simclr_dist.data.loading.open_images import LoaderName, open_images
from simclr_dist.parallel.threads import default_num_threads
from simclr_dist.views.presets import resolve_augmentation


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
    Yields (images [b, S, S, C], labels int64 [b], sample ids int64 [b]); the last b may be smaller than batch_size.
    The central 0.875 of the shorter side is resized to S = image_size, as torchvision evaluates on ImageNet;
    images of S x S stay as they are. Raises DataError.
    """

    def crop(_: NDArray[np.int64]) -> CropRule:
        return lambda heights, widths: center_crops(heights, widths, image_size)[None]

    for batch in _read(source, image_size, crop, 1, batch_size, ids, num_threads, loader, unreadable):
        yield batch.views[0], batch.labels, batch.sample_ids


def fixed_views(
    source: str,
    image_size: int,
    augment: AugmentConfig,
    *,
    num_views: int,
    seed: int,
    batch_size: int,
    ids: NDArray[np.int64] | None = None,
    num_threads: int | None = None,
    loader: LoaderName = "auto",
    unreadable: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """Batches of random crops, as `load_images` gives central ones; `Augment(augment, seed, image_size)` colours them.

    A view follows from the seed, the image's number and its own: it shows the same at any image_size, whoever asks.
    """
    numbers = resolve_augmentation(augment)
    crop = keyed_crops(seed, 0, num_views=num_views, scale_min=numbers.crop_scale_min, flip_p=numbers.flip_p)
    yield from _read(source, image_size, crop, num_views, batch_size, ids, num_threads, loader, unreadable)


def _read(
    source: str,
    image_size: int,
    crop: CropRuleOf,
    num_views: int,
    batch_size: int,
    ids: NDArray[np.int64] | None,
    num_threads: int | None,
    loader: LoaderName,
    unreadable: dict[int, str] | None,
) -> Iterator[Batch]:
    images = open_images(source, loader)
    pool = DecodePool(images, default_num_threads(num_threads), unreadable)
    everything = np.arange(len(images.labels)) if ids is None else np.asarray(ids, np.int64)
    parts = (everything[start : start + batch_size] for start in range(0, len(everything), batch_size))
    try:
        for part, views in pool.read(((part, crop) for part in parts), num_views=num_views, image_size=image_size):
            if unreadable:
                whole = np.array([int(i) not in unreadable for i in part])
                part, views = part[whole], views[:, torch.from_numpy(whole)]
            if len(part):
                labels, sample_ids = torch.from_numpy(images.labels[part]), torch.from_numpy(part.copy())
                yield Batch(views, sample_ids, labels, 0, part)
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
        pixels = images.pixel_format
        dtype = np.uint8 if pixels.bits == 8 else np.uint16
        images.fill(ids, crop, np.empty((1, len(ids), image_size, image_size, pixels.channels), dtype))
    finally:
        images.close()
    return bool(n) and all((side == image_size).all() for side in sizes)
