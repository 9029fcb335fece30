"""Images of .beton files, decoded by ffcv's codec inside our kernel."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.loading.decode_pool import CropRule
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import RGB


class BetonImages:
    """Decodes samples of .beton files, 8-bit RGB; `fill` may be called from several threads at once."""

    pixel_format = RGB

    def __init__(self, path: str | Path) -> None:
        from simclr_dist.data.decode import kernel  # imported here: compiles, and needs ffcv

        self._kernel = kernel
        self.beton = open_data(path)
        self.class_names = self.beton.class_names
        self.fingerprint = self.beton.fingerprint
        self.account = self.beton.account
        self.labels = self.beton.labels
        self._scratch = threading.local()

    @property
    def content_fingerprint(self) -> str:
        return self.beton.content_fingerprint

    def fill(self, ids: NDArray[np.int64], crop: CropRule, out: NDArray[np.uint8]) -> None:
        """Writes the V crops of each image to out [V, b, S, S, 3]."""
        records = self.beton.records(ids)
        status = self._decode(ids, records, crop(records[:, self._kernel.HEIGHT], records[:, self._kernel.WIDTH]), out)
        if status.any():
            raise self._explain(ids, records, status)

    def damaged(self, ids: NDArray[np.int64]) -> dict[int, str]:
        """The reason for each of `ids` that cannot be decoded."""
        none = np.empty((0, len(ids), 5), np.int32)
        status = self._decode(ids, self.beton.records(ids), none, np.empty((0, len(ids), 1, 1, 3), np.uint8))
        return {int(ids[k]): self._kernel.STATUS_TEXT[int(status[k])] for k in np.flatnonzero(status)}

    def _decode(
        self, ids: NDArray[np.int64], records: NDArray[np.int64], crops: NDArray[np.int32], out: NDArray[np.uint8]
    ) -> NDArray[np.int32]:
        if out.size and not out[0, 0].flags.c_contiguous:
            raise ValueError("out: the pixels of a view must lie together")
        status = np.zeros(len(records), np.int32)
        if not hasattr(self._scratch, "pixels"):  # one per thread, sized for the largest image
            self._scratch.encoded = np.empty((1, int(self.beton.record_bytes.max())), np.uint8)
            self._scratch.pixels = np.empty((1, 3 * self.beton.max_pixels), np.uint8)
        encoded, pixels = self._scratch.encoded, self._scratch.pixels
        for part, fd in self.beton.reading(ids):
            self._kernel.decode_and_crop(fd, records[part], crops[:, part], out[:, part], status[part], encoded, pixels)
        return status

    def _explain(self, ids: NDArray[np.int64], records: NDArray[np.int64], status: NDArray[np.int32]) -> DataError:
        first = int(np.flatnonzero(status)[0])
        what = self._kernel.STATUS_TEXT[int(status[first])]
        sample = int(ids[first])
        path, number = self.beton.place(sample)
        try:
            before = self.beton.num_bytes_of(sample)
            for _, fd in self.beton.reading(ids[first : first + 1]):
                now = os.fstat(fd).st_size
                if now < before:
                    what = f"the file shrank from {before} to {now} bytes since it was opened"
                os.pread(fd, 1, int(records[first, 0]))
        except OSError as error:
            what = f"it cannot be read: {error.strerror}"
        return DataError(
            f"{path}: sample {number}: {what}; `simclr-dist inspect {path} --verify` lists all damaged samples"
        )

    def close(self) -> None:
        self.beton.close()
