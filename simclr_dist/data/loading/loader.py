"""The loader: batches of two views, decoded ahead of the training step by a few threads of its own.

There is no queue and no producer. The consumer's `next()` hands the coming batches, in parts, to a pool of threads
and waits for the oldest one; the decoding runs without the GIL. Errors therefore surface where the batch is asked
for, an abandoned iterator leaves nothing behind, and several iterators can live side by side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.batch import Batch
from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.decode.memory import RecycledMemory
from simclr_dist.data.decode.presets import Recipe
from simclr_dist.data.order import Order
from simclr_dist.data.randomness import keys
from simclr_dist.errors import DataError
from simclr_dist.parallel.distributed import World
from simclr_dist.parallel.threads import default_num_threads

# From heights and widths [b] of pictures to a table [V, b, 5] of (top, left, height, width, flip).
CropRule = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32]]


class Images(Protocol):
    """A dataset that can decode and crop; `fill` is called from several threads."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    fingerprint: str

    def fill(self, ids: NDArray[np.int64], crop: CropRule, out: NDArray[np.uint8]) -> None: ...
    def pages(self) -> NDArray[np.int64] | None:
        """Which samples lie near each other on disk [n], if that is known."""
        ...

    def close(self) -> None: ...


class DecodePool:
    """Threads that fill batches part by part."""

    def __init__(self, images: Images, num_threads: int) -> None:
        self.images = images
        self.num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._closed = False

    def start(
        self, ids: NDArray[np.int64], crop: Callable[[NDArray[np.int64]], CropRule], out: Tensor
    ) -> list[Future[None]]:
        """Begins to fill out, uint8 [V, b, S, S, 3]; `crop` gives the rule for a part of the ids."""
        if self._closed:
            raise DataError("the loader is closed")
        array = out.numpy()
        part = -(-len(ids) // (2 * self.num_threads))
        return [
            self._executor.submit(self._fill, ids[i : i + part], crop, array[:, i : i + part])
            for i in range(0, len(ids), part)
        ]

    def _fill(
        self, ids: NDArray[np.int64], crop: Callable[[NDArray[np.int64]], CropRule], out: NDArray[np.uint8]
    ) -> None:
        self.images.fill(ids, crop(ids), out)

    def close(self) -> None:
        """Ends the threads; parts that have not begun are dropped."""
        if not self._closed:
            self._closed = True
            self._executor.shutdown(wait=True, cancel_futures=True)
            self.images.close()


def cancel(parts: list[Future[None]]) -> None:
    for part in parts:
        part.cancel()


class ViewLoader:
    """Two random crops of every image, in an order that any step can be started from. See `Loader`.

    global_batch_size: G; each of world.size processes reads G / world.size images a step.
    pages: the page of each sample, to visit a file page by page when it is larger than memory (see `Order`).
    """

    def __init__(
        self,
        images: Images,
        recipe: Recipe,
        *,
        image_size: int,
        seed: int,
        global_batch_size: int,
        world: World,
        device: torch.device | str = "cpu",
        num_threads: int | None = None,
        batches_ahead: int = 2,
        pages: NDArray[np.int64] | None = None,
    ) -> None:
        self.num_samples = len(images.labels)
        self.class_names = images.class_names
        self.fingerprint = images.fingerprint
        self.order = Order(self.num_samples, global_batch_size, seed, pages=pages)
        self.wait_s = 0.0
        self._images = images
        self._recipe = recipe
        self._image_size = image_size
        self._world = world
        self._device = torch.device(device)
        self._batches_ahead = batches_ahead
        self._pool = DecodePool(images, default_num_threads(num_threads, world.local_size))

    def batches(self, step: int) -> Iterator[Batch]:
        """All batches of this rank from global step `step` on, without end, on the loader's device.

        A batch stays as it is for as long as it is held. Errors of the decoding are raised here, as DataError with
        file and sample, when their batch's turn comes.
        """
        slots = _PinnedSlots(self._device, self._batches_ahead + 1) if self._device.type == "cuda" else None
        memory = RecycledMemory()
        ahead: deque[_Pending] = deque()
        try:
            while True:
                begin = time.perf_counter()
                while len(ahead) <= self._batches_ahead:
                    ahead.append(self._start(step, slots.take if slots else memory.empty))
                    step += 1
                batch = self._finish(ahead.popleft(), slots)
                self.wait_s += time.perf_counter() - begin
                yield batch
        finally:
            for pending in ahead:
                cancel(pending.parts)

    def _start(self, step: int, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> _Pending:
        epoch, step_of_epoch = divmod(step, self.order.steps_per_epoch)
        ids = self.order.sample_ids(epoch, step_of_epoch, self._world.rank, self._world.size)
        shape = (2, len(ids), self._image_size, self._image_size, 3)
        views = empty(shape, torch.uint8)

        def crop(part: NDArray[np.int64]) -> CropRule:
            view_keys = keys(self.order.seed, epoch, part[None], np.arange(2)[:, None])
            return lambda heights, widths: random_crops(
                view_keys, heights, widths, scale_min=self._recipe.crop_scale_min, flip_p=self._recipe.flip_p
            )

        return _Pending(epoch, ids, views, self._pool.start(ids, crop, views))

    def _finish(self, pending: _Pending, slots: _PinnedSlots | None) -> Batch:
        try:
            for part in pending.parts:
                part.result()
        except CancelledError:
            raise DataError("the loader was closed while its batches were in use") from None
        finally:
            cancel(pending.parts)
        ids, labels = torch.from_numpy(pending.ids.copy()), torch.from_numpy(self._images.labels[pending.ids])
        if slots is None:
            return Batch(pending.views, ids, labels, pending.epoch)
        # From page-locked memory: an ordinary copy would wait until the device has done all its work.
        ids, labels = (x.pin_memory().to(self._device, non_blocking=True) for x in (ids, labels))
        return Batch(slots.upload(pending.views), ids, labels, pending.epoch, pending.ids)

    def close(self) -> None:
        """Ends the threads. May be called twice; iterators of a closed loader raise DataError."""
        self._pool.close()

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class _Pending:
    epoch: int
    ids: NDArray[np.int64]
    views: Tensor
    parts: list[Future[None]]


class _PinnedSlots:
    """Page-locked memory that batches are decoded into, and the stream that carries them to the GPU.

    The copy of a batch runs beside the computation on the one before. A slot is filled again only when its copy has
    ended: that is waited for on the CPU, since an event on the GPU alone would not keep the decoder from overwriting
    bytes that are still on their way.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._count = count
        self._free: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._made = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._made < self._count:
            self._made += 1
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        slot, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()
        return slot

    def upload(self, slot: Tensor) -> Tensor:
        """The slot's content on the device, ready for the current stream."""
        consumer = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            views = slot.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        consumer.wait_stream(self._stream)
        views.record_stream(consumer)  # the allocator must not give its memory away before the consumer is done
        self._free.append((slot, copied))
        return views
