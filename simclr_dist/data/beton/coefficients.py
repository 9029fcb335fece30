"""The DCT coefficients of a JPEG file, read and written without going through pixels.

By libturbojpeg's lossless transform, whose filter sees the coefficients of one row of blocks after the other: one that
copies them out reads them, and one that copies ours over the zeros of an empty picture writes them. Damage is noticed
as in decoding, since the compressed data are decoded all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.beton.requantise_kernel import copy_row
from simclr_dist.data.sources import turbojpeg

# Of one colour: quantised coefficients [rows of blocks, blocks in a row, 64], in a block 8 v + u for the frequencies v
# down and u across; or the first 32 of them.
Plane = NDArray[np.int16]


def read_planes(content: bytes, shapes: Sequence[tuple[int, int, int]]) -> list[Plane] | None:
    """shapes: of the plane of each colour.

    None when the file is damaged or has other numbers of blocks, or libturbojpeg cannot or is not there.
    """
    planes = [np.empty(shape, np.int16) for shape in shapes]
    return None if _transform(content, planes, turbojpeg.NO_OUTPUT) is None else planes


def write_planes(empty: bytes, planes: Sequence[Plane]) -> bytes | None:
    """`empty`, a JPEG file with as many blocks, with the coefficients of `planes`. None as of `read_planes`."""
    return _transform(empty, planes, turbojpeg.NO_EXTRA_MARKERS)


def _transform(content: bytes, planes: Sequence[Plane], options: int) -> bytes | None:
    """Without output the planes are filled, otherwise they are copied to the output."""
    places = [value for plane in planes for value in (plane.ctypes.data, *plane.shape)]
    copying = np.array([len(planes), options == turbojpeg.NO_OUTPUT, *places], np.int64)
    return turbojpeg.transform_jpeg(content, options, copying.ctypes.data, copy_row.address)
