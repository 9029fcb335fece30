"""The compiled part of the loader: reads a record, decodes it once and cuts any number of resized crops from it.

Numba compiles it at the first import and keeps the machine code on disk (beside this file, in NUMBA_CACHE_DIR, or in
the user's cache folder); for that, C functions must be bound by name. It starts no threads: callers run it, without the
GIL, in Python threads of theirs, so that no OpenMP or TBB layer can fail after a fork or beside torch. All arithmetic
is on integers, so that every CPU gives the same bytes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
import numpy as np
from numba import types

from simclr_dist.data.decode.compiled import compiled
from simclr_dist.data.decode.ffcv_import import codec

# Columns of a record.
OFFSET, SIZE, MODE, HEIGHT, WIDTH = range(5)
JPEG, RAW = 0, 1

OK, UNREADABLE, UNDECODABLE, WRONG_SIZE = range(4)
STATUS_TEXT = {
    UNREADABLE: "the file ends before the image does, or cannot be read",
    UNDECODABLE: "its JPEG data cannot be decoded",
    WRONG_SIZE: "its stored size does not fit its height and width",
}

# Must come before anything is compiled: without it a call would jump to address 0.
llvmlite.binding.add_symbol("simclr_dist_imdecode", ctypes.cast(codec().imdecode, ctypes.c_void_p).value)
_imdecode: Any = types.ExternalFunction(
    "simclr_dist_imdecode",
    types.int32(
        types.uintp, types.uint64,  # source
        types.uint32, types.uint32,  # its height and width
        types.uintp,  # destination
        types.uint32, types.uint32, types.uint32, types.uint32,  # crop: height, width, left, top
        types.uint32, types.uint32,  # scale: numerator, denominator
        types.boolean, types.boolean,  # whether to crop, whether to flip
    ),
)  # fmt: skip
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.int64, types.int64))

# Weights of a resize are multiples of 2^-14: 8 bits of colour and twice 14 of weight stay within int32 when 6 are
# dropped in between.
_BITS = 14
_ONE = 1 << _BITS
_BETWEEN = 6


_index = np.uintp  # unsigned, so that the compiled code need not handle negative ones

_bytes_2d, _int32_1d, _int32_2d = types.uint8[:, ::1], types.int32[::1], types.int32[:, ::1]


@compiled(types.void(types.int64, types.int64, _int32_1d, _int32_1d, _int32_2d))
def _resize_weights(n_in, n_out, first, count, weight):  # type: ignore[no-untyped-def]
    """Which of n_in input pixels contribute to each of n_out, and how much: weight [n_out, taps] in units of 2^-14.

    Shrinking averages over areas; enlarging interpolates linearly between pixel centres. Rational numbers are kept as
    integers, and cumulative weights are rounded, so that every row sums to exactly one. A second weight is always set.
    """
    for o in range(n_out):
        if n_in > n_out:
            begin, end = o * n_in, (o + 1) * n_in  # in units of 1/n_out input pixels
            t = begin // n_out
            first[o] = t
            done, taps = 0, 0
            while t * n_out < end:
                covered = min(end, (t + 1) * n_out) - begin
                total = (covered * _ONE + n_in // 2) // n_in
                weight[o, taps] = total - done
                done = total
                taps += 1
                t += 1
            count[o] = taps
        else:
            centre = (2 * o + 1) * n_in - n_out  # in units of 1/(2 n_out) input pixels
            t = centre // (2 * n_out)
            right = ((centre - t * 2 * n_out) * _ONE + n_out) // (2 * n_out)
            if t < 0 or t >= n_in - 1 or right == 0:
                first[o] = min(max(t, 0), n_in - 1)
                weight[o, 0] = _ONE
                weight[o, 1] = 0
                count[o] = 1
            else:
                first[o] = t
                weight[o, 0] = _ONE - right
                weight[o, 1] = right
                count[o] = 2


@compiled(
    types.void(
        _bytes_2d,
        types.int64,
        types.int32[:],
        types.uint8[:, :, :],
        _int32_1d,
        _int32_2d,
        _int32_2d,
        types.int32[:, :, ::1],
    )
)
def resize_crop(pixels, stride, crop, out, row, first, count, weight):  # type: ignore[no-untyped-def]
    """Resizes one crop (top, left, height, width, flip) of an image to out [S, S, 3].

    pixels: uint8 [1, >= height * stride], rows of `stride` bytes. The others are scratch: row int32 [>= 3 * width + 3],
    first and count int32 [2, S], weight int32 [2, S, taps].
    """
    top, left, h, w = np.int64(crop[0]), np.int64(crop[1]), np.int64(crop[2]), np.int64(crop[3])
    S = out.shape[0]
    _resize_weights(h, S, first[0], count[0], weight[0])
    _resize_weights(w, S, first[1], count[1], weight[1])
    length = w * 3
    half_between = np.int32(1 << (_BETWEEN - 1))
    shift = np.int32(2 * _BITS - _BETWEEN)
    half = np.int32(1 << (2 * _BITS - _BETWEEN - 1))
    for y in range(S):
        base = (top + first[0, y]) * stride + left * 3
        source = pixels[0, base : base + length]
        k = weight[0, y, 0]
        for x in range(length):
            row[x] = half_between + k * np.int32(source[x])
        for t in range(1, count[0, y]):
            base += stride
            source = pixels[0, base : base + length]
            k = weight[0, y, t]
            for x in range(length):
                row[x] += k * np.int32(source[x])
        for x in range(length):
            row[x] >>= np.int32(_BETWEEN)
        line = out[y]
        for x in range(_index(S)):
            # Two taps at once, of which the second may weigh nothing: most crops have no more.
            p, n = _index(3 * first[1, x]), _index(count[1, x])
            k, l = weight[1, x, 0], weight[1, x, 1]
            r = half + k * row[p] + l * row[p + _index(3)]
            g = half + k * row[p + _index(1)] + l * row[p + _index(4)]
            b = half + k * row[p + _index(2)] + l * row[p + _index(5)]
            for t in range(_index(2), n):
                p_t, k = p + _index(3) * t, weight[1, x, t]
                r += k * row[p_t]
                g += k * row[p_t + _index(1)]
                b += k * row[p_t + _index(2)]
            place = _index(S) - _index(1) - x if crop[4] else x
            line[place, 0] = np.uint8(r >> shift)
            line[place, 1] = np.uint8(g >> shift)
            line[place, 2] = np.uint8(b >> shift)


@compiled(
    types.void(
        types.int64,
        types.int64[:, ::1],
        types.int32[:, :, :],
        types.uint8[:, :, :, :, :],
        _int32_1d,
        _bytes_2d,
        _bytes_2d,
    )
)
def decode_and_crop(fd, records, crops, out, status, encoded, pixels):  # type: ignore[no-untyped-def]
    """Reads and decodes b images, each once, and writes their V crops.

    fd: of the .beton file. records: int64 [b, 5] (OFFSET, SIZE, MODE, HEIGHT, WIDTH). crops: int32 [V, b, 5] of
    (top, left, height, width, flip). out: uint8 [V, b, S, S, 3]. status: int32 [b], see STATUS_TEXT.
    encoded, pixels: uint8 [1, n] scratch for the largest record and the largest image. (Two-dimensional because ffcv
    changes numba's type of one-dimensional bytes when it builds a Loader, which breaks compiled code.)
    """
    V, b, S = out.shape[0], out.shape[1], out.shape[2]
    largest = np.int64(1)
    for k in range(b):
        largest = max(largest, records[k, HEIGHT], records[k, WIDTH])
    row = np.empty(3 * largest + 3, np.int32)
    first = np.empty((2, S), np.int32)
    count = np.empty((2, S), np.int32)
    weight = np.empty((2, S, largest // S + 3), np.int32)
    for k in range(b):
        size, height, width = records[k, SIZE], records[k, HEIGHT], records[k, WIDTH]
        raw = records[k, MODE] == RAW
        room = pixels.shape[1] if raw else encoded.shape[1]
        if size > room or height * width * 3 > pixels.shape[1] or (raw and size != height * width * 3):
            status[k] = WRONG_SIZE
            continue
        target = pixels.ctypes.data if raw else encoded.ctypes.data
        done = np.int64(0)
        while done < size:
            got = _pread(np.int32(fd), target + np.uint64(done), size - done, records[k, OFFSET] + done)
            if got <= 0:
                break
            done += got
        if done < size:
            status[k] = UNREADABLE
            continue
        if not raw:
            H, W, zero, one = np.uint32(height), np.uint32(width), np.uint32(0), np.uint32(1)
            failed = _imdecode(
                target, np.uint64(size), H, W, pixels.ctypes.data, H, W, zero, zero, one, one, False, False
            )  # fmt: skip
            if failed:
                status[k] = UNDECODABLE
                continue
        status[k] = OK
        for v in range(V):
            resize_crop(pixels, width * 3, crops[v, k], out[v, k], row, first, count, weight)
