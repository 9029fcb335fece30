"""Samples of TIFF files that Pillow does not open, or opens with other values: many bands, 16 bits and more, pages.

Pillow still does the decompression. A page is shown to it as grey bytes: one line of W pixels with S samples of
b bytes each is one line of W * S * b grey pixels.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_SIZES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES = 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, ORIENTATION, COLOUR_MAP, YCBCR_SUBSAMPLING = 338, 339, 274, 320, 530
_STORAGE = (HEIGHT, COMPRESSION, STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_SIZES, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES)
_MEANING = (
    SUBFILE_TYPE,
    WIDTH,
    BITS,
    PHOTOMETRIC,
    FILL_ORDER,
    SAMPLES,
    PLANAR,
    PREDICTOR,
    TILE_WIDTH,
    EXTRA_SAMPLES,
    SAMPLE_FORMAT,
)
_OF_PIXELS = (*_STORAGE, *_MEANING, ORIENTATION, COLOUR_MAP, YCBCR_SUBSAMPLING)

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
BYTES_ONLY = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, LZMA, Zstandard
_REDUCED_OR_MASK = 0b101  # of SUBFILE_TYPE: a thumbnail or a mask of another page
# What exceeds these is damage.
_MOST_PAGES = _MOST_TAGS = 10_000
_LARGEST_TILE = 1 << 16


@dataclass(frozen=True)
class Page:
    """The integer tags of one page."""

    byte_order: str
    tags: dict[int, tuple[int, ...]]

    def get(self, tag: int, default: int) -> int:
        return self.tags.get(tag, (default,))[0]

    @property
    def num_samples(self) -> int:
        return self.get(SAMPLES, 1)

    @property
    def alpha(self) -> int | None:
        """The number of the sample that is declared to be transparency: the first after the colours."""
        colours = 3 if self.get(PHOTOMETRIC, 0) == RGB else 1
        if self.num_samples != colours + 1:
            return None
        undeclared = 2 if colours == 3 else 0  # four bands without a word are red, green, blue, alpha for most programs
        return colours if self.get(EXTRA_SAMPLES, undeclared) != 0 else None

    @property
    def dtype(self) -> np.dtype | None:
        """Of the samples, or None when they differ or are no whole bytes."""
        bits, formats = self.tags.get(BITS, (1,)), self.tags.get(SAMPLE_FORMAT, (1,))
        kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(formats[0])
        if len(set(bits)) > 1 or len(set(formats)) > 1 or kind is None or bits[0] not in (8, 16, 32, 64):
            return None
        return None if (kind, bits[0]) == ("f", 8) else np.dtype(f"{self.byte_order}{kind}{bits[0] // 8}")

    @property
    def is_plain(self) -> bool:
        """Whether Pillow alone gives the right pixels."""
        if self.get(PHOTOMETRIC, 0) not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) or self.dtype is None:
            return True
        colours = 3 if self.get(PHOTOMETRIC, 0) == RGB else 1
        return self.dtype == np.uint8 and (self.num_samples == colours or self.alpha is not None)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.get(HEIGHT, 0), self.get(WIDTH, 0), self.num_samples


def pages(file: IO[bytes]) -> list[Page]:
    """The pages of a TIFF without thumbnails and masks; none when the file is no TIFF or its tags cannot be read."""
    file.seek(0)
    head = file.read(16)
    byte_order = _MAGIC.get(head[:4])
    if byte_order is None:
        return []
    big = head[2:4] in (b"+\0", b"\0+")
    found: list[Page] = []
    seen: set[int] = set()
    tables = _Tables(file)
    try:
        (offset,) = struct.unpack_from(f"{byte_order}{'Q' if big else 'I'}", head, 8 if big else 4)
        while offset and offset not in seen and len(seen) < _MOST_PAGES:
            seen.add(offset)
            page, offset = _read_page(tables, offset, byte_order, big)
            if not found or not page.get(SUBFILE_TYPE, 0) & _REDUCED_OR_MASK:
                found.append(page)
    except (struct.error, OverflowError, ValueError):  # a table that is not there
        pass
    return found


class _Tables:
    """The bytes of all tables of tags in a file. In a whole one they lie apart, so they are no more than its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, file.seek(0, io.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        """Raises ValueError for tables that lie one over the other: each could stand for the whole file again."""
        self._file.seek(offset)
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError("tables of tags overlap")
        return content


def _read_page(file: _Tables, offset: int, byte_order: str, big: bool) -> tuple[Page, int]:
    """A page, and the offset of the next one."""
    entry, count_format, next_format = ("HHQ8s", "Q", "Q") if big else ("HHI4s", "H", "I")
    (count,) = _unpack(file, offset, byte_order + count_format)
    if count > _MOST_TAGS:
        raise struct.error("not a table of tags")
    offset += struct.calcsize(byte_order + count_format)
    entries = file.read(offset, count * struct.calcsize(byte_order + entry))
    (following,) = _unpack(file, offset + len(entries), byte_order + next_format)
    tags = {}
    for tag, kind, length, value in struct.iter_unpack(byte_order + entry, entries):
        if tag not in _OF_PIXELS or kind not in _INTEGER_TYPES or length == 0:
            continue
        dtype = np.dtype(byte_order + _INTEGER_TYPES[kind])
        size = length * dtype.itemsize
        if size > len(value):
            (place,) = struct.unpack(f"{byte_order}{next_format}", value)
            value = file.read(place, size)
        if len(value) >= size:
            tags[tag] = tuple(np.frombuffer(value, dtype, length).tolist())
    return Page(byte_order, tags), following


def _unpack(file: _Tables, offset: int, layout: str) -> tuple:
    return struct.unpack(layout, file.read(offset, struct.calcsize(layout)))


def read_samples(content: bytes, page: Page) -> NDArray:
    """All samples of a page [H, W, S], as stored. Raises ValueError and whatever Pillow raises."""
    dtype = page.dtype
    compression = page.get(COMPRESSION, 1)
    if dtype is None or compression not in BYTES_ONLY:
        raise ValueError(
            f"TIFF with {page.num_samples} bands of {page.get(BITS, 1)} bits and compression {compression}: "
            "convert it with a program that reads it, such as tifffile or gdal_translate"
        )
    if page.get(PLANAR, 1) == 1:
        return _read_interleaved(content, page, dtype)
    bands = []
    for band in range(page.num_samples):
        one: dict[int, tuple[int, ...]] = {SAMPLES: (1,)}
        for tag in (STRIP_OFFSETS, STRIP_SIZES, TILE_OFFSETS, TILE_SIZES):
            if tag in page.tags:
                per_band = len(page.tags[tag]) // page.num_samples
                one[tag] = page.tags[tag][band * per_band : (band + 1) * per_band]
        bands.append(_read_interleaved(content, replace(page, tags=page.tags | one), dtype))
    return np.concatenate(bands, axis=2)


def _read_interleaved(content: bytes, page: Page, dtype: np.dtype) -> NDArray:
    height, width, samples = page.shape
    if min(page.shape) < 1:
        raise ValueError(f"TIFF of {width} x {height} pixels of {samples} bands")
    per_pixel = samples * dtype.itemsize
    tile = width
    if TILE_OFFSETS in page.tags:
        tile, tile_height = page.get(TILE_WIDTH, 0), page.get(TILE_HEIGHT, 0)
        if not (0 < tile <= _LARGEST_TILE and 0 < tile_height <= _LARGEST_TILE):
            raise ValueError(f"TIFF with tiles of {tile} x {tile_height} pixels")
    padded = -(-width // tile) * tile  # the last tile is stored whole
    if padded * height > max(2 * width * height, 1 << 24):
        raise ValueError(f"TIFF of {width} x {height} pixels with tiles of {tile}")
    tags = {tag: page.tags[tag] for tag in _STORAGE if tag in page.tags}
    tags |= {WIDTH: (padded * per_pixel,), BITS: (8,), PHOTOMETRIC: (BLACK_IS_ZERO,), SAMPLES: (1,)}
    if TILE_OFFSETS in page.tags:
        tags[TILE_WIDTH] = (tile * per_pixel,)
    with Image.open(io.BytesIO(_with_tags(content, tags, "<"))) as image:
        stored = np.array(image).reshape(height, padded // tile, tile, per_pixel)
    values = [
        _without_predictor(stored[:, column], page.get(PREDICTOR, 1), samples, dtype)
        for column in range(padded // tile)
    ]
    return np.concatenate(values, axis=1)[:, :width]


def without_metadata(content: bytes, page: Page) -> bytes:
    """The file with only those tags of its first page that its pixels need."""
    return _with_tags(content, {tag: page.tags[tag] for tag in _OF_PIXELS if tag in page.tags}, page.byte_order)


def _with_tags(content: bytes, tags: dict[int, tuple[int, ...]], byte_order: str) -> bytes:
    """The file behind another header and table of tags.

    Little-endian as BigTIFF, for any size; Pillow reads no big-endian one.
    """
    big = byte_order == "<"
    letter, size, kind = ("Q", 8, 16) if big else ("I", 4, 4)
    head = b"II+\0\x08\0\0\0" if big else b"MM\0*"
    head += struct.pack(byte_order + letter, len(head) + size)
    table = struct.pack(byte_order + ("Q" if big else "H"), len(tags))
    values_at = len(head) + len(table) + len(tags) * (4 + 2 * size) + size
    content_at = values_at + size * sum(len(numbers) for numbers in tags.values() if len(numbers) > 1)
    values = b""
    for tag, numbers in sorted(tags.items()):
        shift = content_at if tag in (STRIP_OFFSETS, TILE_OFFSETS) else 0
        packed = struct.pack(f"{byte_order}{len(numbers)}{letter}", *(number + shift for number in numbers))
        table += struct.pack(f"{byte_order}HH{letter}", tag, kind, len(numbers))
        table += packed if len(numbers) == 1 else struct.pack(byte_order + letter, values_at + len(values))
        values += packed if len(numbers) > 1 else b""
    return head + table + struct.pack(byte_order + letter, 0) + values + content


def _without_predictor(lines: NDArray[np.uint8], predictor: int, samples: int, dtype: np.dtype) -> NDArray:
    """Bytes uint8 [H, W, S * itemsize] to values [H, W, S]."""
    height, width, _ = lines.shape
    if predictor == 3:  # of floats: bytes of equal rank lie together, most significant first, as differences
        flat = lines.reshape(height, width * dtype.itemsize, samples)
        flat = np.cumsum(flat, axis=1, dtype=np.uint8).reshape(height, dtype.itemsize, width * samples)
        values = np.ascontiguousarray(flat.transpose(0, 2, 1)).view(dtype.newbyteorder(">"))
        return values.reshape(height, width, samples)
    values = np.ascontiguousarray(lines).view(dtype)
    if predictor == 2:
        unsigned = values.view(f"{dtype.byteorder}u{dtype.itemsize}")
        values = np.cumsum(unsigned, axis=1, dtype=f"u{dtype.itemsize}").view(dtype.newbyteorder("="))
    return values
