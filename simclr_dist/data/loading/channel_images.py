"""Images of .beton files that `prepare --channels keep` made: samples as they were, of any number of channels."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.loading.decode_pool import CropRule
from simclr_dist.errors import DataError

_OFFSET, _SIZE, _MODE, _HEIGHT, _WIDTH = range(5)


class ChannelImages:
    """Crops samples of one .beton file or more; `fill` may be called from several threads at once. Needs no ffcv."""

    def __init__(self, path: str | Path) -> None:
        self.beton = open_data(path)
        self.pixel_format = self.beton.pixel_format
        self.class_names = self.beton.class_names
        self.fingerprint = self.beton.fingerprint
        self.account = self.beton.account
        self.labels = self.beton.labels
        self._scratch = threading.local()
        _crop_and_resize()  # compiles before threads ask for it

    @property
    def content_fingerprint(self) -> str:
        return self.beton.content_fingerprint

    def fill(self, ids: NDArray[np.int64], crop: CropRule, out: NDArray) -> None:
        """Writes the V crops of each image to out [V, b, S, S, C]."""
        records = self.beton.records(ids)
        crops = crop(records[:, _HEIGHT], records[:, _WIDTH])
        for part, fd in self.beton.reading(ids):
            for k in range(part.start, part.stop):
                try:
                    samples = self._read(fd, records[k].tolist())
                except DataError as error:
                    path, number = self.beton.place(int(ids[k]))
                    raise DataError(f"{path}: sample {number}: {error}") from None
                _crop_and_resize()(samples, crops[:, k], out[:, k])

    def damaged(self, ids: NDArray[np.int64]) -> dict[int, str]:
        """The reason for each of `ids` that cannot be read."""
        found, records = {}, self.beton.records(ids)
        for part, fd in self.beton.reading(ids):
            for k in range(part.start, part.stop):
                try:
                    self._read(fd, records[k].tolist())
                except DataError as error:
                    found[int(ids[k])] = str(error)
        return found

    def _read(self, fd: int, record: list[int]) -> NDArray:
        """Samples [H, W, C], which are overwritten by the next ones of this thread."""
        if not hasattr(self._scratch, "bytes"):  # one per thread, sized for the largest image
            self._scratch.bytes = np.empty(int(self.beton.record_bytes.max()), np.uint8)
        room = self._scratch.bytes[: record[_SIZE]]
        done = 0
        try:
            while done < len(room):
                got = os.preadv(fd, [room[done:]], record[_OFFSET] + done)
                if got <= 0:
                    raise DataError("the file ends before the image does")
                done += got
        except OSError as error:
            raise DataError(f"it cannot be read: {error.strerror}") from None
        kept = self.pixel_format
        samples = room.view(np.uint8 if kept.bits == 8 else np.dtype("<u2"))
        return samples.reshape(record[_HEIGHT], record[_WIDTH], kept.channels)

    def close(self) -> None:
        self.beton.close()


@cache
def _crop_and_resize() -> Callable[[NDArray, NDArray[np.int32], NDArray], None]:
    """Compiled; the same values by numpy, without numba."""
    try:
        from simclr_dist.data.decode.channel_kernel import crop_and_resize
    except ImportError:
        from simclr_dist.data.decode.channel_crops import crop_and_resize
    return crop_and_resize
