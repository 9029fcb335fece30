"""channel_crops.py compiled: one pass over the rows of a crop and one over its columns, without the GIL."""

from __future__ import annotations

import numpy as np
from numba import types

from simclr_dist.data.decode.compiled import compiled
from simclr_dist.data.decode.resize_weights import WEIGHT_BITS, resize_weights

_SHIFT = np.int64(2 * WEIGHT_BITS)
_HALF = np.int64(1 << (2 * WEIGHT_BITS - 1))
_int32_1d, _int32_2d = types.int32[::1], types.int32[:, ::1]
_index = np.uintp  # unsigned, so that the compiled code need not handle negative ones

_resize_weights = compiled(types.void(types.int64, types.int64, types.boolean, _int32_1d, _int32_1d, _int32_2d))(
    resize_weights
)


def _signature(number):  # type: ignore[no-untyped-def]
    return types.void(number[:, :, ::1], types.int32[:, :], number[:, :, :, :])


@compiled([_signature(types.uint8), _signature(types.uint16)])
def crop_and_resize(samples, crops, out):  # type: ignore[no-untyped-def]
    """The crops [V, 5] (top, left, height, width, flip) of samples [H, W, C] to out [V, S, S, C]."""
    W, C, S = samples.shape[1], samples.shape[2], out.shape[1]
    pixels = samples.reshape(samples.size)
    largest = max(samples.shape[0], W)
    row = np.empty(W * C, np.uint32)  # at most 16 bits and 14 of weight
    first, count = np.empty((2, S), np.int32), np.empty((2, S), np.int32)
    weight = np.empty((2, S, largest // S + 3), np.int32)
    for v in range(len(out)):
        top, left, h, w = np.int64(crops[v, 0]), np.int64(crops[v, 1]), np.int64(crops[v, 2]), np.int64(crops[v, 3])
        _resize_weights(h, S, False, first[0], count[0], weight[0])
        _resize_weights(w, S, crops[v, 4] != 0, first[1], count[1], weight[1])
        length = _index(w * C)
        for y in range(_index(S)):
            start = _index(((top + first[0, y]) * W + left) * C)
            k = np.uint32(weight[0, y, 0])
            for j in range(length):
                row[j] = k * np.uint32(pixels[start + j])
            for t in range(1, count[0, y]):
                start += _index(W * C)
                k = np.uint32(weight[0, y, t])
                for j in range(length):
                    row[j] += k * np.uint32(pixels[start + j])
            for x in range(_index(S)):
                at = _index(first[1, x] * C)
                for c in range(_index(C)):
                    total = _HALF
                    for t in range(_index(count[1, x])):
                        total += np.int64(weight[1, x, t]) * np.int64(row[at + t * _index(C) + c])
                    out[v, y, x, c] = total >> _SHIFT
