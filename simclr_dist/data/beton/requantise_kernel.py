"""Quantised DCT coefficients of JPEG at other steps, and colours at half the size, compiled.

All arithmetic is on float32, in an order that the compiler may not change, so that every CPU gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from simclr_dist.data.decode.compiled import compiled, compiled_for_c

_LARGEST = np.float32(1023)  # of a coefficient in baseline JPEG
_plane, _floats, _index = types.int16[:, :, ::1], types.float32[::1], np.uintp


def _dct(n: int) -> np.ndarray:
    """The orthonormal DCT [frequency, sample]."""
    basis = np.cos(np.arange(n)[:, None] * (2 * np.arange(n) + 1) * np.pi / (2 * n)) * np.sqrt(2 / n)
    basis[0] /= np.sqrt(2)
    return basis


# Of 8 samples whose halves have the 4 frequencies p and q, frequency 2 m is (p + q mirrored)[m] / sqrt(2), and the odd
# ones are a matrix times p - q mirrored. Mirrored, every second frequency changes its sign. The 4 are the lower ones of
# 8, of twice as many samples: hence another sqrt(1/2). Rounded, as the last bits of a cosine depend on the CPU.
_EVEN = np.float32(0.5)
_ODD = tuple(map(tuple, (np.sqrt(0.5) * _dct(8)[1::2, :4] @ _dct(4).T).round(6).astype(np.float32)))
_FIRST = np.outer(_dct(8)[:, 0], _dct(8)[:, 0]).ravel().round(6).astype(np.float32)  # sample of a block


def _to_pointer(_, address):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_to_pointer)


@compiled_for_c(
    types.int32(
        types.voidptr,  # the coefficients of a row of blocks
        types.uint64, types.uint64,  # its place and size: C puts four integers of 32 bits into two registers
        types.uint64, types.uint64,  # those of all its colour
        types.int32, types.int32,  # the index of the colour, that of the transform
        types.voidptr,  # the transform
    )
)  # fmt: skip
def copy_row(coefficients, place, size, colour_place, colour_size, index, _, transform):  # type: ignore[no-untyped-def]
    """Copies a row of blocks to or from our plane, if that has as many as this colour. See `coefficients`."""
    copying = carray(_pointer(carray(transform, 4, np.int64)[3]), 2 + 4 * 3, np.int64)
    if index >= copying[0]:
        return -1
    entry = 2 + 4 * index
    address, rows, columns, length = copying[entry], copying[entry + 1], copying[entry + 2], copying[entry + 3]
    if size & 0xFFFFFFFF != 8 * columns or colour_size >> 32 != 8 * rows:
        return -1
    row = np.int64(place >> 32) // 8
    if row >= rows:  # libjpeg adds rows up to a whole number of MCUs
        return 0
    theirs = carray(coefficients, 16 * columns, np.int64)  # four coefficients each
    if copying[1] == 0:
        ours = carray(_pointer(address + row * columns * 128), 16 * columns, np.int64)
        for i in range(16 * columns):
            theirs[i] = ours[i]
    elif length == 64:
        ours = carray(_pointer(address + row * columns * 128), 16 * columns, np.int64)
        for i in range(16 * columns):
            ours[i] = theirs[i]
    else:
        ours = carray(_pointer(address + row * columns * 64), 8 * columns, np.int64)
        for column in range(_index(columns)):
            for i in range(_index(8)):
                ours[_index(8) * column + i] = theirs[_index(16) * column + i]
    return 0


@compiled(types.void(_plane, _floats, _plane))
def requantise(plane, ratio, out):  # type: ignore[no-untyped-def]
    """ratio [64]: of the old steps to the new ones."""
    old, new = plane.reshape(plane.size), out.reshape(plane.size)
    for start in range(_index(0), _index(plane.size), _index(64)):
        for i in range(_index(64)):
            value = np.rint(np.float32(old[start + i]) * ratio[i])
            new[start + i] = np.int16(min(max(value, -_LARGEST), _LARGEST))


@compiled(types.void(_floats, types.uintp))
def _join(work, start):  # type: ignore[no-untyped-def]
    """Pairs of lines become one of half their length, 64 pairs at once.

    From `start` on lie the lower 4 frequencies of the first lines, those of the second, and the result, [4 + 4 + 8,
    64]: in one array at fixed distances, as the compiler then sees that nothing overlaps, and takes several at a time.
    """
    for i in range(_index(64)):
        p = start + i
        q = p + _index(256)
        out = q + _index(256)
        p0, p1, p2, p3 = work[p], work[p + _index(64)], work[p + _index(128)], work[p + _index(192)]
        q0, q1, q2, q3 = work[q], work[q + _index(64)], work[q + _index(128)], work[q + _index(192)]
        work[out] = _EVEN * (p0 + q0)
        work[out + _index(128)] = _EVEN * (p1 - q1)
        work[out + _index(256)] = _EVEN * (p2 + q2)
        work[out + _index(384)] = _EVEN * (p3 - q3)
        p0, p1, p2, p3 = p0 - q0, p1 + q1, p2 - q2, p3 + q3
        work[out + _index(64)] = _ODD[0][0] * p0 + _ODD[0][1] * p1 + _ODD[0][2] * p2 + _ODD[0][3] * p3
        work[out + _index(192)] = _ODD[1][0] * p0 + _ODD[1][1] * p1 + _ODD[1][2] * p2 + _ODD[1][3] * p3
        work[out + _index(320)] = _ODD[2][0] * p0 + _ODD[2][1] * p1 + _ODD[2][2] * p2 + _ODD[2][3] * p3
        work[out + _index(448)] = _ODD[3][0] * p0 + _ODD[3][1] * p1 + _ODD[3][2] * p2 + _ODD[3][3] * p3


@compiled(types.void(_plane, types.intp, types.intp, types.float32[:, ::1], _floats, types.uintp))
def _load(plane, r, c, steps, work, target):  # type: ignore[no-untyped-def]
    """The lower 4 x 4 frequencies of a block. At an edge with no second block, the first one is mirrored."""
    mirrored = _index((c >= plane.shape[1]) + 2 * (r >= plane.shape[0]))
    r, c = _index(min(r, plane.shape[0] - 1)), _index(min(c, plane.shape[1] - 1))
    for v in range(_index(4)):
        for u in range(_index(4)):
            i = _index(8) * v + u
            work[target + _index(64) * v + u] = np.float32(plane[r, c, i]) * steps[mirrored, i]


@compiled(types.void(_plane, types.float32[:, ::1], _floats, _plane))
def halve(plane, steps, new_steps, out):  # type: ignore[no-untyped-def]
    """Half as many samples both ways, which have the lower half of the frequencies.

    plane: [rows, columns, 32], the lower half of those down. out: [ceil(rows / 2), ceil(columns / 2), 64].
    steps [4, 32]: as they are, mirrored across, mirrored down, both. new_steps [64]: what 1 is divided by them.
    """
    work = np.empty(33 * 64, np.float32)
    across, block = _index(16 * 64), _index(32 * 64)
    for row in range(out.shape[0]):
        for first in range(0, out.shape[1], 8):  # eight blocks of the result, joined down, then across
            for c in range(16):
                _load(plane, 2 * row, 2 * first + c, steps, work, _index(4 * c))
                _load(plane, 2 * row + 1, 2 * first + c, steps, work, _index(256 + 4 * c))
            _join(work, _index(0))
            for c in range(16):
                source, target = _index(512 + 4 * c), across + _index(256 * (c % 2) + 8 * (c // 2))
                for v in range(_index(8)):
                    for u in range(_index(4)):
                        work[target + _index(64) * u + v] = work[source + _index(64) * v + u]
            _join(work, across)
            for c in range(min(8, out.shape[1] - first)):
                source = across + _index(512 + 8 * c)
                for v in range(_index(8)):
                    for u in range(_index(8)):
                        work[block + _index(8) * v + u] = work[source + _index(64) * u + v]
                for i in range(_index(64)):
                    value = np.rint(work[block + i] * new_steps[i])
                    out[_index(row), _index(first + c), i] = np.int16(min(max(value, -_LARGEST), _LARGEST))


@compiled(types.float32(_plane, types.int64, types.int64, _floats, _floats))
def _first_sample(plane, row, column, weights, work):  # type: ignore[no-untyped-def]
    r, c = _index(row), _index(column)
    for i in range(_index(16)):
        j, k, m = i + _index(16), i + _index(32), i + _index(48)
        upper = np.float32(plane[r, c, i]) * weights[i] + np.float32(plane[r, c, j]) * weights[j]
        work[i] = upper + np.float32(plane[r, c, k]) * weights[k] + np.float32(plane[r, c, m]) * weights[m]
    even = ((work[0] + work[8]) + (work[2] + work[10])) + ((work[4] + work[12]) + (work[6] + work[14]))
    return even + (((work[1] + work[9]) + (work[3] + work[11])) + ((work[5] + work[13]) + (work[7] + work[15])))


@compiled(types.void(_plane, _plane, _plane, _floats, _floats, _floats, types.uint8[:, :, ::1]))
def sample(luma, blue, red, luma_steps, blue_steps, red_steps, out):  # type: ignore[no-untyped-def]
    """Of a 4:2:0 picture about the first of each 16 x 16 pixels: RGB out [ceil(H / 16), ceil(W / 16), 3]."""
    work, weights = np.empty(64, np.float32), np.empty((3, 64), np.float32)
    for i in range(64):
        weights[0, i], weights[1, i], weights[2, i] = luma_steps[i], blue_steps[i], red_steps[i]
        for colour in range(3):
            weights[colour, i] *= _FIRST[i]
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            y = _first_sample(luma, 2 * row, 2 * column, weights[0], work) + np.float32(128.5)
            cb = _first_sample(blue, row, column, weights[1], work)
            cr = _first_sample(red, row, column, weights[2], work)
            r = y + np.float32(1.402) * cr
            g = y - np.float32(0.344136) * cb - np.float32(0.714136) * cr
            b = y + np.float32(1.772) * cb
            for i, value in enumerate((r, g, b)):
                out[row, column, i] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))
