"""Writes TIFF files of kinds that Pillow cannot write: any number of bands, depth, byte order, planes, tiles."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def tiff_bytes(
    *pages: np.ndarray,
    byte_order: str = "<",
    big: bool = False,
    planar: bool = False,
    deflate: bool = False,
    predictor: int = 1,
    tile: int | None = None,
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    orientation: int = 1,
) -> bytes:
    """Pages [H, W, S] of numbers. predictor: 2 for integers, 3 for floats. tile: side of square tiles, else strips."""
    letter, size, kind = ("Q", 8, 16) if big else ("I", 4, 4)
    head = b"II" if byte_order == "<" else b"MM"
    head += struct.pack(f"{byte_order}HHH", 43, 8, 0) if big else struct.pack(f"{byte_order}H", 42)
    content = bytearray(head + struct.pack(byte_order + letter, 0))
    pointer = len(head)
    for page in pages:
        height, width, num_samples = page.shape
        page = page.astype(page.dtype.newbyteorder(byte_order))
        offsets, sizes = [], []
        for plane in np.split(page, num_samples, axis=2) if planar else [page]:
            for block in _blocks(plane, tile):
                data = _predicted(block, predictor)
                data = zlib.compress(data) if deflate else data
                offsets.append(len(content))
                sizes.append(len(data))
                content += data + b"\0" * (len(data) % 2)
        storage = (322, (tile,)), (323, (tile,)), (324, offsets), (325, sizes)
        strips = (273, offsets), (278, (7,)), (279, sizes)
        tags = {
            256: (width,),
            257: (height,),
            258: (8 * page.dtype.itemsize,) * num_samples,
            259: (8 if deflate else 1,),
            262: (photometric,),
            274: (orientation,),
            277: (num_samples,),
            284: (2 if planar else 1,),
            317: (predictor,),
            339: ({"u": 1, "i": 2, "f": 3}[page.dtype.kind],) * num_samples,
            **dict(storage if tile else strips),
            **({338: extra} if extra else {}),
        }
        struct.pack_into(byte_order + letter, content, pointer, len(content))
        entries = b""
        outside = len(content) + (8 if big else 2) + len(tags) * (4 + 2 * size) + size
        values = b""
        for tag, numbers in sorted(tags.items()):
            packed = struct.pack(f"{byte_order}{len(numbers)}{letter}", *numbers)
            here = packed if len(numbers) == 1 else struct.pack(byte_order + letter, outside + len(values))
            values += packed if len(numbers) > 1 else b""
            entries += struct.pack(f"{byte_order}HH{letter}", tag, kind, len(numbers)) + here
        content += struct.pack(byte_order + ("Q" if big else "H"), len(tags)) + entries
        pointer = len(content)
        content += struct.pack(byte_order + letter, 0) + values
    return bytes(content)


def _blocks(plane: np.ndarray, tile: int | None) -> list[np.ndarray]:
    """Strips of 7 lines, or tiles padded with zeros."""
    height, width, _ = plane.shape
    if tile is None:
        return [plane[y : y + 7] for y in range(0, height, 7)]
    padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
    return [
        padded[y : y + tile, x : x + tile] for y in range(0, len(padded), tile) for x in range(0, padded.shape[1], tile)
    ]


def _predicted(block: np.ndarray, predictor: int) -> bytes:
    if predictor == 2:
        block = block.copy().view(f"{block.dtype.byteorder}u{block.dtype.itemsize}")
        block[:, 1:] -= block[:, :-1].copy()
    if predictor == 3:
        height, width, num_samples = block.shape
        ordered = np.ascontiguousarray(block.astype(block.dtype.newbyteorder(">"))).view(np.uint8)
        ranked = ordered.reshape(height, width * num_samples, -1).transpose(0, 2, 1).reshape(height, -1, num_samples)
        ranked = ranked.copy()
        ranked[:, 1:] -= ranked[:, :-1].copy()
        return ranked.tobytes()
    return block.tobytes()
