"""The loader of pretraining: batches of random crops of each image, decoded ahead of the training step.

loader = build_loader(config.data, config.augment, seed=0, global_batch_size=512, world=world(), device="cpu")
with loader:
    for batch in loader.batches(step=0):
        ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.beton.shard_set import sizes_of_places
from simclr_dist.data.decode.crops import keyed_crops
from simclr_dist.data.loading.decode_pool import CropRuleOf, DecodePool, Images
from simclr_dist.data.loading.open_images import open_images
from simclr_dist.data.loading.pinned_memory import PinnedSlots
from simclr_dist.data.mix import MixedOrder
from simclr_dist.data.order import Order
from simclr_dist.errors import DataError
from simclr_dist.parallel.distributed import World
from simclr_dist.parallel.threads import default_num_threads
from simclr_dist.views.presets import Augmentation, resolve_augmentation


def build_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    seed: int,
    global_batch_size: int,
    world: World,
    device: torch.device | str,
) -> Loader:
    """The loader of a pretraining run; close it, or use it with `with`. Raises DataError."""
    images = open_images(data.train, data.loader)
    try:
        return ViewLoader(
            images,
            resolve_augmentation(augment),
            image_size=data.image_size,
            num_views=data.num_views,
            order=_order(data, images, global_batch_size, seed),
            world=world,
            device=device,
            num_threads=data.num_threads,
            batches_ahead=data.batches_ahead,
        )
    except BaseException:
        images.close()
        raise


def _order(data: DataConfig, images: Images, global_batch_size: int, seed: int) -> Order:
    if data.mix is not None:
        return MixedOrder(sizes_of_places(data.train), data.mix, global_batch_size, seed)
    pages = images.pages() if data.order == "page_local" else None
    if data.order == "page_local" and pages is None:
        raise DataError(f"data.order=page_local: {data.train} has no pages; use a .beton file, or data.order=random")
    return Order(len(images.labels), global_batch_size, seed, pages=pages)


class ViewLoader:
    """Random crops of every image, in an order that can be entered at any step. See `Loader`.

    num_views: V, the crops of an image. It is decoded once, and a view's pixels do not depend on how many there are.
    order: of the samples; each of world.size processes reads G / world.size images a step.
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        *,
        image_size: int,
        num_views: int = 2,
        order: Order,
        world: World,
        device: torch.device | str = "cpu",
        num_threads: int | None = None,
        batches_ahead: int = 2,
    ) -> None:
        self.num_samples = len(images.labels)
        self.class_names = images.class_names
        self.fingerprint = images.fingerprint
        self.content_fingerprint = images.content_fingerprint
        self.account = images.account
        self.order = order
        self.wait_s = 0.0
        self._labels = images.labels
        self._augmentation = augmentation
        self._image_size = image_size
        self._num_views = num_views
        self._world = world
        self._device = torch.device(device)
        self._batches_ahead = batches_ahead
        self._pool = DecodePool(images, default_num_threads(num_threads, world.local_size))

    def batches(self, step: int) -> Iterator[Batch]:
        """All batches of this rank from global step `step` on, without end, on the loader's device.

        A batch stays as it is for as long as it is held. Raises DataError, with file and sample, when the turn of a
        batch comes that cannot be decoded.
        """
        slots = PinnedSlots(self._device, self._batches_ahead + 1) if self._device.type == "cuda" else None
        decoded = self._pool.read(
            self._requests(step),
            num_views=self._num_views,
            image_size=self._image_size,
            batches_ahead=self._batches_ahead,
            empty=slots.take if slots else None,
        )
        for current in count(step):
            begin = time.perf_counter()
            host_ids, views = next(decoded)
            epoch = self.order.epoch_of_draws(current)
            ids, labels = torch.from_numpy(host_ids.copy()), torch.from_numpy(self._labels[host_ids])
            if slots is not None:
                # From page-locked memory: an ordinary copy would wait until the device has done all its work.
                ids, labels = (x.pin_memory().to(self._device, non_blocking=True) for x in (ids, labels))
                views = slots.upload(views)
            batch = Batch(views, ids, labels, epoch, host_ids)
            self.wait_s += time.perf_counter() - begin
            yield batch

    def _requests(self, first_step: int) -> Iterator[tuple[NDArray[np.int64], CropRuleOf]]:
        for step in count(first_step):
            epoch, step_of_epoch = divmod(step, self.order.steps_per_epoch)
            ids = self.order.sample_ids(epoch, step_of_epoch, self._world.rank, self._world.size)
            yield (
                ids,
                keyed_crops(
                    self.order.seed,
                    self.order.epoch_of_draws(step),
                    num_views=self._num_views,
                    scale_min=self._augmentation.crop_scale_min,
                    flip_p=self._augmentation.flip_p,
                ),
            )

    def close(self) -> None:
        """Ends the threads. May be called twice; iterators of a closed loader raise DataError."""
        self._pool.close()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
