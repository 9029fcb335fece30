"""Threads that decode and crop images, some batches ahead of the one in use.

There is no queue and no producer thread. Asking for a batch hands the coming batches, in parts, to a pool of threads
and waits for the oldest one; decoding runs without the GIL. An error is therefore raised where its batch is asked for,
an abandoned iterator leaves nothing behind, and several iterators can run side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_dist.data.account import Account
from simclr_dist.data.decode.recycled_memory import RecycledMemory
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import PixelFormat

# From heights and widths [b] of images to a table [V, b, 5] of (top, left, height, width, flip).
CropRule = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32]]
# From any part of a batch's sample ids to the crops of that part.
CropRuleOf = Callable[[NDArray[np.int64]], CropRule]


class Images(Protocol):
    """A dataset that can decode and crop; `fill` is called from several threads."""

    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    pixel_format: PixelFormat

    # For a folder of many files these two take long: they are not computed unless they are asked for.
    @property
    def fingerprint(self) -> str: ...
    @property
    def content_fingerprint(self) -> str: ...
    @property
    def account(self) -> Account | None:
        """What was taken from the source; None for a .beton file that does not tell."""
        ...

    def fill(self, ids: NDArray[np.int64], crop: CropRule, out: NDArray) -> None:
        """Writes the V crops of each image to out [V, b, S, S, C], of C channels. Raises DataError."""
        ...

    def close(self) -> None: ...


_PIXELS_OF_A_PART = 1 << 18
"""Of views, at least. In smaller parts the threads, and the training beside them, wait for Python's lock: 512 images of
CIFAR in 32 parts took twice the processor's time, and a GPU waited."""


class DecodePool:
    """Owns the images and the threads that decode them; close it.

    unreadable: if given, an image that cannot be decoded is no error: its reason is put there, under its number, and
    its place in the batch holds anything.
    """

    def __init__(self, images: Images, num_threads: int, unreadable: dict[int, str] | None = None) -> None:
        self.images = images
        self._unreadable = unreadable
        self.num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._closed = False

    def read(
        self,
        batches: Iterable[tuple[NDArray[np.int64], CropRuleOf]],
        *,
        num_views: int,
        image_size: int,
        batches_ahead: int = 2,
        empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """(ids [b], crops [V, b, S, S, C]) of every batch in order, while the next ones are decoded.

        C and the type are those of the images' pixel_format.

        batches: sample ids and crops of each batch; may be endless.
        empty: gives the memory for a batch. By default a batch stays as it is for as long as it is held.
        Raises DataError when the turn of a batch comes that cannot be decoded.
        """
        empty = empty or RecycledMemory().empty
        pixels = self.images.pixel_format
        dtype = torch.uint8 if pixels.bits == 8 else torch.uint16
        batches = iter(batches)
        started: deque[tuple[NDArray[np.int64], Tensor, list[Future[None]]]] = deque()
        try:
            while True:
                for ids, crop in islice(batches, batches_ahead + 1 - len(started)):
                    out = empty((num_views, len(ids), image_size, image_size, pixels.channels), dtype)
                    started.append((ids, out, self._start(ids, crop, out)))
                if not started:
                    return
                ids, out, parts = started[0]
                for part in parts:
                    part.result()
                started.popleft()
                yield ids, out
        except CancelledError:
            raise DataError("the loader was closed while its batches were in use") from None
        finally:
            for *_, parts in started:
                for part in parts:
                    part.cancel()

    def _start(self, ids: NDArray[np.int64], crop: CropRuleOf, out: Tensor) -> list[Future[None]]:
        if self._closed:
            raise DataError("the loader is closed")
        array = out.numpy()
        num_parts = 2 * self.num_threads if self.num_threads > 1 else 1  # two each, so that they end together
        size = max(-(-len(ids) // num_parts), _PIXELS_OF_A_PART * len(ids) // (array.size // 3))
        parts = [slice(i, i + size) for i in range(0, len(ids), size)]
        return [self._executor.submit(self._fill, ids[part], crop, array[:, part]) for part in parts]

    def _fill(self, ids: NDArray[np.int64], crop: CropRuleOf, out: NDArray) -> None:
        try:
            self.images.fill(ids, crop(ids), out)
        except (DataError, OSError) as error:
            if self._unreadable is None:
                raise
            if len(ids) == 1:
                self._unreadable[int(ids[0])] = str(error)
                return
            for k in range(len(ids)):  # which of them is it?
                self._fill(ids[k : k + 1], crop, out[:, k : k + 1])

    def close(self) -> None:
        """Ends the threads, drops what they have not begun, and closes the images. May be called twice."""
        if not self._closed:
            self._closed = True
            self._executor.shutdown(wait=True, cancel_futures=True)
            self.images.close()
