"""What a data set holds, as one short text: a digest of its records (pixels as stored), labels and class names.

`prepare` digests the records while it writes them, and puts the digest into the descriptor of the image field, in bytes
that ffcv leaves unused. Files without it (ffcv's own, or of release 0.1) are read once; their digests are kept in the
user's cache folder under path, size, time of change and inode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simclr_dist.bounded_json import parse_json
from simclr_dist.data.digest_cache import digest_once
from simclr_dist.errors import DataError
from simclr_dist.pixel_format import PixelFormat

if TYPE_CHECKING:
    from simclr_dist.data.beton.reader import Beton

_MARK = b"records sha256 "
_CHUNK_BYTES = 1 << 20  # stays in the CPU cache between reading and digesting


class RecordsDigest:
    """SHA-256 of all records in the order of the samples, then of the tables that say what the bytes mean."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()  # with the CPU's instructions for it, the fastest of Python's own digests

    def update(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)

    def finish(
        self,
        images: NDArray[Any],
        record_bytes: NDArray[np.int64],
        labels: NDArray[np.int64],
        kept: PixelFormat | None = None,
    ) -> str:
        """images: rows of IMAGE [n]. Where records lie in the file does not matter. kept: of `--channels keep`."""
        if kept is not None:
            self._sha256.update(f"{kept.channels} x {kept.bits}".encode())
        for column in (images["mode"], images["height"], images["width"], record_bytes, labels):
            self._sha256.update(column.astype("<i8").tobytes())
        return self._sha256.hexdigest()


def content_fingerprint(records_digest: str, class_names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([records_digest, list(class_names)]).encode()).hexdigest()[:32]


def to_arguments(records_digest: str, kept: PixelFormat | None = None) -> NDArray[np.uint8]:
    """The 1024 bytes of a field descriptor that are the field's own to use: the digest, and what pixels are."""
    arguments = np.zeros(1024, np.uint8)
    text = _MARK + records_digest.encode("ascii")
    if kept is not None:
        text += b"\n" + json.dumps(kept.to_json()).encode("ascii")
    arguments[: len(text)] = np.frombuffer(text, np.uint8)
    return arguments


def from_arguments(arguments: NDArray[np.uint8]) -> tuple[str | None, PixelFormat | None]:
    """What `to_arguments` took. Raises ValueError where the format of pixels is none."""
    text = arguments.tobytes().rstrip(b"\0")
    if not text.startswith(_MARK):
        return None, None
    digest, _, kept = text.removeprefix(_MARK).decode("ascii", "replace").partition("\n")
    return digest, PixelFormat.from_json(parse_json(kept)) if kept else None


def read_records_digest(beton: Beton) -> str:
    """Reads all records of an open file, 1 GB/s on one core where the disk is as fast. Raises DataError."""
    digest = RecordsDigest()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for offset, size in _stretches(beton.images["data_ptr"].astype(np.int64), beton.record_bytes):
        for start in range(offset, offset + size, _CHUNK_BYTES):
            part = buffer[: min(_CHUNK_BYTES, offset + size - start)]
            try:
                num_read = os.preadv(beton.fd, [part], start)
            except OSError as error:
                raise DataError(f"{beton.path}: cannot be read at byte {start}: {error.strerror}") from None
            if num_read != len(part):
                raise DataError(f"{beton.path}: ends before byte {start + len(part)}, which it had when it was opened")
            digest.update(part)
    return digest.finish(beton.images, beton.record_bytes, beton.labels, beton.kept)


def record_digests(beton: Beton) -> NDArray[np.bytes_]:
    """[n]: equal for images that are stored alike. Reads all records of an open file. Raises DataError."""
    found = np.empty(beton.num_samples, "S16")
    offsets, sizes = beton.images["data_ptr"].astype(np.int64), beton.record_bytes
    for i, (offset, size, row) in enumerate(zip(offsets.tolist(), sizes.tolist(), beton.images, strict=True)):
        content = os.pread(beton.fd, size, offset)
        if len(content) != size:
            raise DataError(f"{beton.path}: ends before byte {offset + size}, which it had when it was opened")
        shape = f"{row['mode']} {row['height']} {row['width']} ".encode()
        found[i] = hashlib.blake2b(shape + content, digest_size=8).hexdigest().encode()
    return found


def _stretches(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Offset and size of the stretches of the file that hold the records in order, neighbours joined."""
    first = np.flatnonzero(np.r_[True, offsets[1:] != offsets[:-1] + sizes[:-1]])
    last = np.r_[first[1:], len(offsets)] - 1
    ends = offsets[last] + sizes[last]
    yield from zip(offsets[first].tolist(), (ends - offsets[first]).tolist(), strict=True)


def cached_records_digest(beton: Beton) -> str:
    """`read_records_digest`, from the user's cache folder where it has this file as it is now."""
    state = os.fstat(beton.fd)
    identity = os.path.realpath(beton.path), state.st_size, state.st_mtime_ns, state.st_ino
    return digest_once(identity, lambda: read_records_digest(beton))
