"""Writes a .beton file record by record, then its tables. The layout is drawn in reader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.content import RecordsDigest, to_arguments
from simclr_dist.data.beton.reader import (
    ALLOCATION,
    BYTES_FIELD,
    DESCRIPTOR,
    HEADER,
    IMAGE,
    IMAGE_FIELD,
    INT_FIELD,
    VERSION,
    metadata_type,
)
from simclr_dist.pixel_format import PixelFormat

PAGE_BYTES = 8 << 20  # ffcv's default; a record lies within one page
KEPT_PAGE_BYTES = 64 << 20  # of images with their own channels and depth, which are never JPEG


@dataclass(frozen=True)
class Record:
    content: bytes
    mode: int
    height: int
    width: int
    label: int


class PagedWriter:
    """Puts records into pages, the first of which begins with the tables; `finish` writes the tables.

    keeps: records are samples with channels and a depth of their own (see reader.py), not ffcv's images.
    page_bytes: a record lies within one page, and no record may be larger; None: as `prepare` has them.
    records_digest: set by `finish`.
    """

    _FIELDS: tuple[tuple[str, int], ...] = (("image", IMAGE_FIELD), ("label", INT_FIELD))
    _FIELDS_OF_KEPT = (("image", BYTES_FIELD), ("label", INT_FIELD), ("height", INT_FIELD), ("width", INT_FIELD))

    def __init__(
        self, file: IO[bytes], max_samples: int, *, keeps: bool = False, page_bytes: int | None = None
    ) -> None:
        self._file = file
        self._page_bytes = page_bytes or (KEPT_PAGE_BYTES if keeps else PAGE_BYTES)
        if keeps:
            self._FIELDS = self._FIELDS_OF_KEPT
        self._metadata = metadata_type([type_id for _, type_id in self._FIELDS])
        self._metadata_start = HEADER.itemsize + len(self._FIELDS) * DESCRIPTOR.itemsize
        self._position = self._metadata_start + max_samples * self._metadata.itemsize
        self._file.seek(self._position)
        self.rows: list[_Row] = []
        self.records_digest = ""
        self._digest = RecordsDigest()

    def add(self, record: Record) -> None:
        size = len(record.content)
        left = self._page_bytes - self._position % self._page_bytes
        if size > left:
            self._file.write(bytes(left))
            self._position += left
        self._file.write(record.content)
        self.rows.append(_Row(record.mode, record.width, record.height, self._position, size, record.label))
        self._position += size
        self._digest.update(record.content)

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([row.label for row in self.rows], np.int64)

    def finish(self, kept: PixelFormat | None = None) -> None:
        """kept: what the samples are, where the writer `keeps` them."""
        table = np.array([(i, row.offset, row.size) for i, row in enumerate(self.rows)], ALLOCATION)
        self._file.write(table.tobytes())
        header = np.array((VERSION, len(self._FIELDS), self._page_bytes, len(self.rows), self._position), HEADER)
        descriptors = np.zeros(len(self._FIELDS), DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, self._FIELDS, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name.encode("ascii")
        metadata = np.zeros(len(self.rows), self._metadata)
        images = np.array([(row.mode, row.width, row.height, row.offset) for row in self.rows], IMAGE)
        sizes = np.array([row.size for row in self.rows], np.int64)
        metadata["f1"] = self.labels
        if kept is None:
            metadata["f0"] = images
        else:
            metadata["f0"]["ptr"], metadata["f0"]["size"] = images["data_ptr"], sizes
            metadata["f2"], metadata["f3"] = images["height"], images["width"]
        self.records_digest = self._digest.finish(images, sizes, self.labels, kept)
        descriptors["arguments"][0] = to_arguments(self.records_digest, kept)
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
