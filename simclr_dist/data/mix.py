"""Several sources by weight: which of them each place of a global batch is drawn from, as a pure function of the step.

Place p of all that a training draws (p = step x G + place in the batch) takes the source in whose stretch of [0, 1) the
fractional part of p x golden ratio lies: any run of places has the shares of the weights, within a few. Each source is
gone through in an order of its own, and begins its next epoch where it runs out. How often a source was drawn before p
is a sum of floors in closed form, so any step can be entered, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.order import Order
from simclr_dist.data.randomness import keys, permutation
from simclr_dist.errors import DataError

_BITS = 32
_WHOLE = 1 << _BITS
_GOLDEN = 2654435769  # the golden ratio's fractional part in units of 2^-32, odd
_STREAM = 16  # of `permutation`; `Order` has the first ones
_MIX = (1 << 32) + 2  # in place of a view's number, so that the offset shares no key with views and orders


class MixedOrder(Order):
    """Draws from several sources, whose samples are numbered one source after the other.

    sizes: number of samples of each source. weights: of each, above 0; only their ratios count.
    An epoch is as many draws as there are samples, in whole global batches.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], global_batch_size: int, seed: int) -> None:
        super().__init__(sum(sizes), global_batch_size, seed)
        self.left_out = 0
        self.sizes = tuple(sizes)
        self.shares = tuple(weight / sum(weights) for weight in weights)
        self._first = np.cumsum([0, *sizes])
        self._borders = [round(share * _WHOLE) for share in np.cumsum([0.0, *self.shares])]
        if any(begin >= end for begin, end in pairwise(self._borders)):
            raise DataError(f"data.mix: {min(weights):g} is too small a weight beside {max(weights):g}")
        self._offset = int(keys(seed, 0, 0, _MIX)[0]) % _WHOLE

    def epoch_of_draws(self, step: int) -> int:
        """Every step: a source that is drawn from often comes again within an epoch, and is to give other views."""
        return step

    def num_drawn(self, place: int) -> list[int]:
        """How many samples of each source the places 0 .. place-1 draw."""
        return [self._below(place, end) - self._below(place, begin) for begin, end in pairwise(self._borders)]

    def _below(self, place: int, border: int) -> int:
        """How many of the places before have (place x golden + offset) mod 2^32 < border."""
        whole = floor_sum(place, _WHOLE, _GOLDEN, self._offset)
        return whole - floor_sum(place, _WHOLE, _GOLDEN, self._offset + _WHOLE - border) + place

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        num_draws = self.steps_per_epoch * self.global_batch_size
        start = epoch * num_draws
        places = (start * _GOLDEN + self._offset) % _WHOLE + np.arange(num_draws, dtype=np.uint64) * np.uint64(_GOLDEN)
        source = np.searchsorted(self._borders[1:-1], places % np.uint64(_WHOLE), side="right")
        order = np.empty(num_draws, np.int64)
        for number, before in enumerate(self.num_drawn(start)):
            here = np.flatnonzero(source == number)
            order[here] = self._first[number] + self._samples(number, before, len(here))
        return order

    def _samples(self, source: int, before: int, count: int) -> NDArray[np.int64]:
        """The draws before .. before+count-1 of a source, by its own numbers."""
        size, found = self.sizes[source], [np.empty(0, np.int64)]
        while count:
            epoch, done = divmod(before, size)
            part = permutation(self.seed, epoch, _STREAM + source, size)[done : done + count]
            found.append(part)
            before, count = before + len(part), count - len(part)
        return np.concatenate(found)

    def sentences(self, places: Sequence[str], num_steps: int) -> list[str]:
        """For people: share, size and epochs of each source in a training of so many steps."""
        num_draws = num_steps * self.global_batch_size
        return [
            f"{share:.1%} of {place}: {size:,} images, {share * num_draws / size:,.1f} epochs"
            for place, share, size in zip(places, self.shares, self.sizes, strict=True)
        ]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over i = 0 .. n-1, for whole numbers that are not negative: as Euclid divides."""
    total = 0
    while n > 0:
        total += (a // m) * n * (n - 1) // 2 + (b // m) * n
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        m, a = a, m
    return total
