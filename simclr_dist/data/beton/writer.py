"""Writes a .beton file record by record, then its tables. The layout is drawn in reader.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.content import RecordsDigest, digest_to_arguments
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


class PagedWriter:
    """Puts records into pages, the first of which begins with the tables; `finish` writes the tables.

    records_digest: set by `finish`.
    """

    _FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))

    def __init__(self, file: IO[bytes], max_samples: int) -> None:
        self._file = file
        self._metadata = metadata_type([type_id for _, type_id in self._FIELDS])
        self._metadata_start = HEADER.itemsize + len(self._FIELDS) * DESCRIPTOR.itemsize
        self._position = self._metadata_start + max_samples * self._metadata.itemsize
        self._file.seek(self._position)
        self.rows: list[_Row] = []
        self.records_digest = ""
        self._digest = RecordsDigest()

    def add(self, record: Record) -> None:
        size = len(record.content)
        left = PAGE_BYTES - self._position % PAGE_BYTES
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

    def finish(self) -> None:
        table = np.array([(i, row.offset, row.size) for i, row in enumerate(self.rows)], ALLOCATION)
        self._file.write(table.tobytes())
        header = np.array((VERSION, len(self._FIELDS), PAGE_BYTES, len(self.rows), self._position), HEADER)
        descriptors = np.zeros(len(self._FIELDS), DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, self._FIELDS, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name.encode("ascii")
        metadata = np.zeros(len(self.rows), self._metadata)
        metadata["f0"] = [(row.mode, row.width, row.height, row.offset) for row in self.rows]
        metadata["f1"] = self.labels
        sizes = np.array([row.size for row in self.rows], np.int64)
        self.records_digest = self._digest.finish(metadata["f0"], sizes, self.labels)
        descriptors["arguments"][0] = digest_to_arguments(self.records_digest)
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
