"""Resized crops of images with any number of channels of 8 or 16 bits, by numpy: what the kernel is, without numba.

All arithmetic is on integers below 2^53, so sums of float64 are exact in any order: every CPU, and the compiled
kernel, give the same values.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.decode.resize_weights import WEIGHT_BITS, resize_weights

_HALF = 1 << (2 * WEIGHT_BITS - 1)


def resize(samples: NDArray, height: int, width: int, *, flip: bool = False) -> NDArray:
    """Samples [h, w, C] of unsigned integers to [height, width, C]: averaged over areas, or interpolated linearly.

    flip: mirrored from left to right.
    """
    h, w, C = samples.shape
    rows = _matrix(h, height, False) @ samples.reshape(h, w * C).astype(np.float64)
    rows = rows.reshape(height, w, C).transpose(1, 0, 2).reshape(w, height * C)
    columns = (_matrix(w, width, flip) @ rows).reshape(width, height, C).transpose(1, 0, 2)
    return ((columns.astype(np.int64) + _HALF) >> 2 * WEIGHT_BITS).astype(samples.dtype)


def crop_and_resize(samples: NDArray, crops: NDArray[np.int32], out: NDArray) -> None:
    """The crops [V, 5] (top, left, height, width, flip) of samples [H, W, C] to out [V, S, S, C]."""
    for crop, view in zip(crops.tolist(), out, strict=True):
        top, left, height, width, flip = crop
        view[:] = resize(samples[top : top + height, left : left + width], *view.shape[:2], flip=bool(flip))


@lru_cache(64)
def _matrix(n_in: int, n_out: int, flip: bool) -> NDArray[np.float64]:
    """[n_out, n_in], each row of sum 2^14."""
    taps = n_in // n_out + 3
    first, count = np.empty(n_out, np.int32), np.empty(n_out, np.int32)
    weight = np.empty((n_out, taps), np.int32)
    resize_weights(n_in, n_out, flip, first, count, weight)
    matrix = np.zeros((n_out, n_in))
    for o in range(n_out):
        matrix[o, first[o] : first[o] + count[o]] = weight[o, : count[o]]
    return matrix
