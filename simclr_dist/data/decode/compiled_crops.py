"""The rule of `random_crops`, compiled: the same tables to the last bit.

numpy spends a millisecond on the crops of a few small images, more than it takes to decode and resize them, and holds
the GIL meanwhile. Additions, multiplications, divisions and square roots of float64 are exact on every CPU, and nothing
here allows the compiler to contract or reorder them.
"""

from __future__ import annotations

import numpy as np
from numba import types

from simclr_dist.data.decode.compiled import compiled
from simclr_dist.data.randomness import CROP, FLIP, GOLDEN, MULTIPLIERS, SHIFTS

_S0, _S1, _S2, _S_UNIFORM = SHIFTS
_M0, _M1 = MULTIPLIERS


@compiled(types.float64(types.uint64, types.int64))
def _uniform(key, draw):  # type: ignore[no-untyped-def]
    z = key + np.uint64(draw + 1) * GOLDEN
    z = (z ^ (z >> _S0)) * _M0
    z = (z ^ (z >> _S1)) * _M1
    z = z ^ (z >> _S2)
    return np.float64(z >> _S_UNIFORM) * 2.0**-53


@compiled(types.float64(types.float64))
def _exp(x):  # type: ignore[no-untyped-def]
    result = 1.0
    for n in range(14, 0, -1):
        result = 1.0 + x * result / n
    return result


@compiled(
    types.void(
        types.uint64[::1],
        types.float64[::1],
        types.float64[::1],
        types.float64,
        types.float64,
        types.int64,
        types.UniTuple(types.float64, 2),
        types.UniTuple(types.float64, 2),
        types.int32[:, ::1],
    )
)
def draw_crops(keys, heights, widths, scale_min, flip_p, tries, ratios, log_ratios, table):  # type: ignore[no-untyped-def]
    """Fills table [n, 5] for keys, heights and widths [n]; see `random_crops`."""
    for k in range(len(keys)):
        key, h_max, w_max = keys[k], heights[k], widths[k]
        fits = False
        for attempt in range(tries):
            draw = CROP + 4 * attempt
            area = h_max * w_max * (scale_min + (1.0 - scale_min) * _uniform(key, draw))
            aspect = _exp(log_ratios[0] + (log_ratios[1] - log_ratios[0]) * _uniform(key, draw + 1))
            w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
            fits = 0 < w <= w_max and 0 < h <= h_max
            if fits:
                top = np.floor(_uniform(key, draw + 2) * (h_max - h + 1))
                left = np.floor(_uniform(key, draw + 3) * (w_max - w + 1))
                break
        if not fits:
            h = max(min(h_max, np.rint(w_max / ratios[0])), 1.0)
            w = max(min(w_max, np.rint(h_max * ratios[1])), 1.0)
            top, left = np.floor((h_max - h) / 2), np.floor((w_max - w) / 2)
        table[k, 0], table[k, 1], table[k, 2], table[k, 3] = top, left, h, w
        table[k, 4] = _uniform(key, FLIP) < flip_p
