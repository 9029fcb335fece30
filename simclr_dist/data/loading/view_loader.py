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
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.data.beton.shard_set import open_data, sizes_of_places
from simclr_dist.data.decode.crops import keyed_crops
from simclr_dist.data.loading.decode_pool import CropRuleOf, DecodePool, Images
from simclr_dist.data.loading.fetch_ahead import FetchAhead, fetch_ahead
from simclr_dist.data.loading.open_images import open_images, use_cache_of
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
    use_cache_of(data)
    images = open_images(data.train, data.loader)
    try:
        order = order_of(data, len(images.labels), global_batch_size, seed)
        return ViewLoader(
            images,
            resolve_augmentation(augment),
            image_size=data.image_size,
            num_views=data.num_views,
            order=order,
            world=world,
            device=device,
            num_threads=data.num_threads,
            batches_ahead=data.batches_ahead,
            ahead=fetch_ahead(data, order, world),
        )
    except BaseException:
        images.close()
        raise


def order_of(data: DataConfig, num_samples: int, global_batch_size: int, seed: int) -> Order:
    """In which a training goes through data.train. Raises DataError."""
    if data.mix is not None:
        return MixedOrder(sizes_of_places(data.train), data.mix, global_batch_size, seed)
    if data.order == "random":
        return Order(num_samples, global_batch_size, seed)
    if not names_beton(data.train):
        raise DataError(f"data.order={data.order}: {data.train} has no pages; use .beton files, or data.order=random")
    with open_data(data.train) as beton:
        pages = beton.pages() if data.order == "page_local" else beton.file_of_each()
    return Order(num_samples, global_batch_size, seed, pages=pages, window_pages=data.order_window)


class ViewLoader:
    """Random crops of every image, in an order that can be entered at any step. See `Loader`.

    num_views: V, the crops of an image. It is decoded once, and a view's pixels do not depend on how many there are.
    order: of the samples; each of world.size processes reads G / world.size images a step.
    ahead: fetches what lies elsewhere; closed with the loader.
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
        ahead: FetchAhead | None = None,
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
        self._ahead = ahead
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
            if self._ahead is not None:
                self._ahead.at(current)
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

    def make_ready(self, step: int) -> None:
        """Waits until what lies elsewhere and the batch of `step` needs is here. Raises DataError."""
        if self._ahead is not None:
            self._ahead.wait(step)

    def close(self) -> None:
        """Ends the threads. May be called twice; iterators of a closed loader raise DataError."""
        if self._ahead is not None:
            self._ahead.close()
        self._pool.close()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
