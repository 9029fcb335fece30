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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from simclr_dist.data.decode.compiled import compiled
from simclr_dist.data.decode.ffcv_import import codec
from simclr_dist.data.decode.resize_weights import WEIGHT_BITS, resize_weights

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
# dropped in between. What is left in between has 16 bits, and is stored less _MIDDLE to have a sign: a product of such
# numbers of 16 bits takes a CPU one instruction for many, one of 32 bits several.
_BITS = WEIGHT_BITS
_BETWEEN = 6
_SHIFT = 2 * _BITS - _BETWEEN
_MIDDLE = 1 << 15
_WEIGHT_MASK = (1 << 15) - 1  # changes no weight, but tells the compiler that it is short


_index = np.uintp  # unsigned, so that the compiled code need not handle negative ones

_bytes_2d, _int16_1d, _int32_1d, _int32_2d = (
    types.uint8[:, ::1],
    types.int16[::1],
    types.int32[::1],
    types.int32[:, ::1],
)


_resize_weights = compiled(types.void(types.int64, types.int64, types.boolean, _int32_1d, _int32_1d, _int32_2d))(
    resize_weights
)


def _pixel_writer(typing_context, row, p, weights, n, address):  # type: ignore[no-untyped-def]
    """Writes four bytes at `address`: those of the pixel that n taps from row[p] on give, and one to spare.

    A vector for each pixel; numba would compute each colour by itself. weights: int32 [>= 2].
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, p, weights, n, address = arguments
        row, weights = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in ((signature.args[0], row), (signature.args[2], weights))
        )
        short, four = ir.IntType(16), ir.VectorType(ir.IntType(32), 4)

        def pixels(t, size):  # type: ignore[no-untyped-def]
            place = builder.gep(row, [builder.add(p, builder.mul(t, t.type(3)))])
            return builder.load(builder.bitcast(place, ir.VectorType(short, size).as_pointer()), align=2)

        def part(vector, indices):  # type: ignore[no-untyped-def]
            return builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)
            )

        def weighted(pixel, t):  # type: ignore[no-untyped-def]
            k = builder.trunc(builder.load(builder.gep(weights, [t])), short)
            first = builder.insert_element(
                ir.Constant(ir.VectorType(short, 4), ir.Undefined), k, ir.Constant(ir.IntType(32), 0)
            )
            return builder.mul(builder.sext(pixel, four), builder.sext(part(first, [0] * 4), four))

        both = pixels(n.type(0), 8)
        two = builder.add(weighted(part(both, [0, 1, 2, 3]), n.type(0)), weighted(part(both, [3, 4, 5, 6]), n.type(1)))
        total = builder.add(two, ir.Constant(four, [(_MIDDLE << _BITS) + (1 << (_SHIFT - 1))] * 4))
        kept = cgutils.alloca_once_value(builder, total)
        with cgutils.for_range_slice(builder, n.type(2), n, n.type(1)) as (t, _):
            builder.store(builder.add(builder.load(kept), weighted(pixels(t, 4), t)), kept)
        shifted = builder.lshr(builder.load(kept), ir.Constant(four, [_SHIFT] * 4))
        four_bytes = ir.VectorType(ir.IntType(8), 4)
        builder.store(builder.trunc(shifted, four_bytes), builder.inttoptr(address, four_bytes.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(row, types.uintp, weights, types.uintp, types.uintp), generate


_write_pixel: Any = intrinsic(_pixel_writer)


@compiled(
    types.void(
        _bytes_2d,
        types.int64,
        types.int32[:],
        types.uint8[:, :, :],
        _int16_1d,
        _int32_1d,
        _int32_2d,
        _int32_2d,
        types.int32[:, :, ::1],
    )
)
def resize_crop(pixels, stride, crop, out, row, sums, first, count, weight):  # type: ignore[no-untyped-def]
    """Resizes one crop (top, left, height, width, flip) of an image to out [S, S, 3], the last two contiguous.

    pixels: uint8 [1, >= height * stride], rows of `stride` bytes. The others are scratch: row int16 and sums int32
    [>= 3 * width + 8], first and count int32 [2, S], weight int32 [2, S, taps].
    """
    top, left, h, w = np.int64(crop[0]), np.int64(crop[1]), np.int64(crop[2]), np.int64(crop[3])
    S = out.shape[0]
    _resize_weights(h, S, False, first[0], count[0], weight[0])
    _resize_weights(w, S, crop[4] != 0, first[1], count[1], weight[1])
    begin = _index(top * stride + left * 3)
    # Whole vectors, as far as there are bytes: what is beside the crop is computed too, and not used.
    length = _index(min((3 * w + 7) // 8 * 8, pixels.shape[1] - (top + h - 1) * stride - left * 3))
    half_between = np.int32(1 << (_BETWEEN - 1))
    middle = np.int32(_MIDDLE)
    last_pixel = np.empty(4, np.uint8)
    for y in range(_index(S)):
        # Two taps at once, of which the second may weigh nothing: most crops have no more.
        base = begin + _index(first[0, y] * stride)
        below = base + _index(stride) if count[0, y] > 1 else base
        k, l = weight[0, y, 0] & np.int32(_WEIGHT_MASK), weight[0, y, 1] & np.int32(_WEIGHT_MASK)
        if count[0, y] <= 2:
            for j in range(length):
                total = half_between + k * np.int32(pixels[0, base + j]) + l * np.int32(pixels[0, below + j])
                row[j] = np.int16((total >> np.int32(_BETWEEN)) - middle)
        else:
            for j in range(length):
                sums[j] = half_between + k * np.int32(pixels[0, base + j]) + l * np.int32(pixels[0, below + j])
            for t in range(2, count[0, y]):
                below += _index(stride)
                k = weight[0, y, t] & np.int32(_WEIGHT_MASK)
                for j in range(length):
                    sums[j] += k * np.int32(pixels[0, below + j])
            for j in range(length):
                row[j] = np.int16((sums[j] >> np.int32(_BETWEEN)) - middle)
        # The fourth byte is the next pixel's, which is written later; the last pixel of a row has no next.
        address = out[y].ctypes.data
        for x in range(_index(S - 1)):
            _write_pixel(row, _index(3 * first[1, x]), weight[1, x], _index(count[1, x]), address + _index(3) * x)
        last = _index(S - 1)
        _write_pixel(row, _index(3 * first[1, last]), weight[1, last], _index(count[1, last]), last_pixel.ctypes.data)
        for c in range(3):
            out[y, last, c] = last_pixel[c]


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
    row = np.empty(3 * largest + 8, np.int16)
    sums = np.empty(3 * largest + 8, np.int32)
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
            resize_crop(pixels, width * 3, crops[v, k], out[v, k], row, sums, first, count, weight)
