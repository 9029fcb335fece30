"""JPEG files at other steps of quantisation and with colours at half the size, from coefficients instead of pixels.

Decoding and encoding only the compressed data is less work, and nothing is rounded or cut off to 8 bits on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton import requantise_kernel as kernel
from simclr_dist.data.beton.coefficients import Plane, read_planes, write_planes
from simclr_dist.data.beton.kept_jpeg import keep, plain_steps
from simclr_dist.data.sources.jpeg_file import JpegFile

_FULL, _HALF = b"\x11\x11\x11", b"\x22\x11\x11"  # samples of Y, Cb and Cr, down and across: 4:4:4 and 4:2:0
# For each step of a table, which is in the order of zigzag, its place in a block.
_ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
_TABLES = 64  # of quantisation that are kept as arrays
_SIGNS = np.where(np.arange(8) % 2, -1, 1)
_MIRRORED = np.stack(np.broadcast_arrays(1, _SIGNS, _SIGNS[:, None], _SIGNS * _SIGNS[:, None])).astype(np.float32)


@dataclass(frozen=True)
class Recoded:
    """content: a 4:2:0 JPEG file. sample: about the first of each 16 x 16 pixels, RGB. kept: as it came."""

    content: bytes
    sample: NDArray[np.uint8]
    kept: bool


@dataclass(frozen=True)
class Recoder:
    """picture: of 16 x 16 pixels whose coefficients are all 0, encoded as others are to be: 4:2:0, with its steps."""

    picture: JpegFile

    def __call__(self, file: JpegFile) -> Recoded | None:
        """None for a file that is damaged, or neither grey nor YCbCr at 4:4:4 or 4:2:0, or without libturbojpeg."""
        tables = [file.tables.get(number, b"") for number in file.frame[8::3]]
        kind = _HALF if file.num_components == 1 else file.frame[7::3]  # grey has no colours at the full size
        if not all(tables) or kind not in (_FULL, _HALF) or not (file.num_components == 1 or file.is_ycc):
            return None
        if file.scan[0] != file.num_components:  # tables for later scans may stand between the scans
            return None
        luma_shape, colour_shape = _shape(file, 8), _shape(file, 16) if kind == _HALF else (*_shape(file, 8)[:2], 32)
        planes = read_planes(file.content, [luma_shape, colour_shape, colour_shape][: file.num_components])
        if planes is None:
            return None
        kept = keep(file, self._tables)
        if kept is not None:
            return Recoded(kept, _sample(file, planes, tables), kept=True)
        planes = self._requantised(file, planes, tables)
        content = write_planes(self._empty(file), planes)
        return None if content is None else Recoded(content, _sample(file, planes, self._tables), kept=False)

    def _requantised(self, file: JpegFile, planes: list[Plane], tables: list[bytes]) -> list[Plane]:
        out = [np.empty_like(planes[0]), *(np.zeros(_shape(file, 16), np.int16) for _ in range(2))]
        for old, new, table, new_table in zip(planes, out, tables, self._tables, strict=False):  # may be grey
            if old.shape == new.shape:
                kernel.requantise(old, _natural(table) / _natural(new_table), new)
            else:
                kernel.halve(old, _mirrored(table), 1 / _natural(new_table), new)
        return out

    @cached_property
    def _tables(self) -> list[bytes]:
        tables = plain_steps(self.picture)
        assert tables is not None
        return tables

    def _empty(self, file: JpegFile) -> bytes:
        """The picture at the size of `file`: its only MCU, which takes whole bytes, again and again."""
        picture = self.picture
        (frame,) = (begin for begin, _ in picture.needed if picture.content[begin + 1] == picture.frame_marker)
        rows, columns, _ = _shape(file, 16)
        return b"".join(
            [
                picture.content[: frame + 5],
                file.frame[1:5],  # height and width
                picture.content[frame + 9 : picture.scan_begin],
                picture.content[picture.scan_begin : -2] * (rows * columns),
                picture.content[-2:],
            ]
        )


def _sample(file: JpegFile, planes: list[Plane], tables: list[bytes]) -> NDArray[np.uint8]:
    pixels = np.empty((*_shape(file, 16)[:2], 3), np.uint8)
    kernel.sample(*planes, *map(_natural, tables), pixels)
    return pixels


def _shape(file: JpegFile, pixels: int) -> tuple[int, int, int]:
    """Of a plane whose blocks cover so many pixels."""
    return -(-file.height // pixels), -(-file.width // pixels), 64


@lru_cache(_TABLES)
def _natural(table: bytes) -> NDArray[np.float32]:
    steps = np.empty(64, np.float32)
    steps[_ZIGZAG] = np.frombuffer(table, np.uint8)
    return steps


@lru_cache(_TABLES)
def _mirrored(table: bytes) -> NDArray[np.float32]:
    """The first 32 steps, with the signs that mirror a block: not at all, across, down, both [4, 32]."""
    return np.ascontiguousarray((_MIRRORED * _natural(table).reshape(8, 8)).reshape(4, 64)[:, :32])
