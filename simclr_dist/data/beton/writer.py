"""Writes a .beton file record by record: pages of data first, then the tables. The layout is drawn in reader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.reader import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    VERSION,
    metadata_type,
)

PAGE_BYTES = 8 << 20  # ffcv's default; a record lies within one page


@dataclass(frozen=True)
class Record:
    content: bytes
    mode: int
    height: int
    width: int
    label: int
    histogram: NDArray[np.int64]  # [3, 256]: how often each value occurs in each channel


class PagedWriter:
    """Puts records into pages; `finish` writes the tables before and after them."""

    _FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))

    def __init__(self, file: IO[bytes], max_samples: int) -> None:
        self._file = file
        self._metadata = metadata_type([type_id for _, type_id in self._FIELDS])
        self._metadata_start = HEADER.itemsize + len(self._FIELDS) * DESCRIPTOR.itemsize
        tables = self._metadata_start + max_samples * self._metadata.itemsize
        self._position = -(-tables // PAGE_BYTES) * PAGE_BYTES
        self._file.seek(self._position)
        self.rows: list[_Row] = []
        self._histogram = np.zeros((3, 256), np.int64)

    def add(self, record: Record) -> None:
        size = len(record.content)
        left = PAGE_BYTES - self._position % PAGE_BYTES
        if size > left:
            self._file.write(bytes(left))
            self._position += left
        self._file.write(record.content)
        self.rows.append(_Row(record.mode, record.width, record.height, self._position, size, record.label))
        self._position += size
        self._histogram += record.histogram

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([row.label for row in self.rows], np.int64)

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation per channel, in [0, 1]."""
        share = self._histogram / self._histogram.sum(1, keepdims=True)
        value = np.arange(256) / 255
        mean = share @ value
        deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        return {"mean": mean.round(6).tolist(), "std": deviation.round(6).tolist()}

    def finish(self) -> None:
        # Whole pages only: ffcv's reader for files larger than memory reads page by page.
        left = -self._position % PAGE_BYTES
        self._file.write(bytes(left))
        table_start = self._position + left
        table = np.array([(i, row.offset, row.size) for i, row in enumerate(self.rows)], ALLOCATION)
        self._file.write(table.tobytes())
        header = np.array((VERSION, len(self._FIELDS), PAGE_BYTES, len(self.rows), table_start), HEADER)
        descriptors = np.zeros(len(self._FIELDS), DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, self._FIELDS, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name.encode("ascii")
        metadata = np.zeros(len(self.rows), self._metadata)
        metadata["f0"] = [(row.mode, row.width, row.height, row.offset) for row in self.rows]
        metadata["f1"] = self.labels
        self._file.seek(0)
        for part in (header, descriptors, metadata):
            self._file.write(part.tobytes())


@dataclass(frozen=True, slots=True)
class _Row:
    mode: int
    width: int
    height: int
    offset: int
    size: int
    label: int
