"""The weights of a resize, as integers: plain Python, which the kernels compile."""

from __future__ import annotations

import numpy as np

WEIGHT_BITS = 14
_ONE = 1 << WEIGHT_BITS


def resize_weights(n_in, n_out, flip, first, count, weight):  # type: ignore[no-untyped-def]
    """Which of n_in input pixels contribute to each of n_out, and how much: weight [n_out, taps] in units of 2^-14.

    Shrinking averages over areas; enlarging interpolates linearly between pixel centres. Rational numbers are kept as
    integers, and cumulative weights are rounded, so that every row sums to exactly one. A second weight is always set.
    flip: the output is mirrored.
    """
    t = 0
    for i in range(n_out):
        o = n_out - 1 - i if flip else i
        if n_in > n_out:
            begin, end = i * n_in, (i + 1) * n_in  # in units of 1/n_out input pixels
            while (t + 1) * n_out <= begin:
                t += 1
            first[o] = t
            done, taps, tap = 0, 0, t
            while tap * n_out < end:
                covered = min(end, (tap + 1) * n_out) - begin
                total = (covered * _ONE + n_in // 2) // n_in
                weight[o, taps] = total - done
                done = total
                taps += 1
                tap += 1
            count[o] = taps
        else:
            centre = max((2 * i + 1) * n_in - n_out, 0)  # in units of 1/(2 n_out) input pixels
            while (t + 1) * 2 * n_out <= centre:
                t += 1
            right = np.int64(np.uint32((centre - t * 2 * n_out) * _ONE + n_out) // np.uint32(2 * n_out))
            if t == n_in - 1 or right == 0:
                right = np.int64(0)
            first[o] = t
            weight[o, 0] = _ONE - right
            weight[o, 1] = right
            count[o] = 1 if right == 0 else 2
