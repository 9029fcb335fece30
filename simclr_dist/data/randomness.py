"""Random numbers without state: every draw of a view is a hash of (seed, epoch, sample id, view, draw number).

A view therefore does not depend on rank, number of threads, order or loader, and a resumed run needs no generator
state. The hash is SplitMix64's finaliser (Steele, Lea and Flood 2014); all operations are exact, so the numbers are the
same on every machine and under every version of numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Fixed draw numbers, a range for each purpose, so that a new augmentation changes no other. Never renumber them.
CROP = 0  # 0..39: ten tries of (area, ratio, top, left)
FLIP = 64
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, JITTER_ORDER = 80, 81, 82, 83, 84, 85
GRAYSCALE = 96
BLUR, BLUR_SIGMA = 112, 113
SOLARIZE = 128
DROPOUT, DROPOUT_OF_BATCH = 144, 145
SPAN_LENGTH, SPAN_START = 160, 176  # five draws, one draw
BRIGHTNESS_OF_CHANNEL, CONTRAST_OF_CHANNEL = 192, 208  # 16 each
TEXT = 224  # which of an image's texts
TOKEN_CHANGED, TOKEN_INSTEAD = 1 << 20, 1 << 21  # and the token's place

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)  # of the hash, and of a number in [0, 1)


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit reaches every output bit."""
    z = (z ^ (z >> SHIFTS[0])) * MULTIPLIERS[0]
    z = (z ^ (z >> SHIFTS[1])) * MULTIPLIERS[1]
    return z ^ (z >> SHIFTS[2])


def keys(seed: int, epoch: ArrayLike, sample_ids: ArrayLike, view: ArrayLike) -> NDArray[np.uint64]:
    """One key for each view of each sample; the arguments broadcast. At least one-dimensional."""
    key = mix(_words(seed) + GOLDEN)
    for part in (epoch, sample_ids, view):
        key = mix(key ^ (_words(part) + GOLDEN))
    return key


def uniform(keys: NDArray[np.uint64], draw: ArrayLike) -> NDArray[np.float64]:
    """The draw-th number of each key, in [0, 1) with 53 random bits; keys and draw broadcast."""
    words = mix(keys + (_words(draw) + np.uint64(1)) * GOLDEN)
    return (words >> SHIFTS[3]).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, stream: int, n: int) -> NDArray[np.int64]:
    """A random order of 0..n-1 that depends on the arguments only: n hashes, sorted."""
    words = mix(keys(seed, epoch, stream, _PERMUTATION) + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN)
    return np.argsort(words, kind="stable")


_PERMUTATION = 1 << 32  # used in place of a view's number, so that orders and views share no key


def _words(value: ArrayLike) -> NDArray[np.uint64]:
    # Arrays of one element instead of scalars: numpy warns when scalars overflow, which is intended here.
    return np.atleast_1d(np.asarray(value)).astype(np.uint64)
