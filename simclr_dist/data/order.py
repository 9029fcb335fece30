"""Which samples a rank reads at a step: a pure function of (seed, epoch, step, rank, world_size).

    perm of an epoch   ┌── global batch 0 ──┬── global batch 1 ──┬─ ... ─┬ tail ┐
                       │ rank 0 │ rank 1 │… │ rank 0 │ rank 1 │… │       │ left │
                       └────────────────────┴────────────────────┴───────┴─ out ┘

A global batch does not depend on the number of processes, and training can start at any step: a resume needs the step
number only. The tail, shorter than a global batch, is left out of its epoch, never padded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.randomness import permutation
from simclr_dist.errors import DataError

# Streams of `permutation`, so that the orders of pages and of samples are independent.
_SAMPLES, _PAGES = 0, 1


class Order:
    """The order in which an epoch visits the samples.

    num_samples: n, the size of the dataset.
    global_batch_size: G; must stay the same across a resume. The world size may change.
    seed: of the run.
    pages: page of each sample [n], for files larger than memory: pages are visited in random order,
        `window_pages` at a time, and samples are shuffled within a window. Less random, but disk reads are near each
        other. None: every order of the n samples is possible.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        *,
        pages: NDArray[np.int64] | None = None,
        window_pages: int = 64,
    ) -> None:
        if num_samples < global_batch_size:
            raise DataError(
                f"the dataset has {num_samples} images, fewer than one global batch of {global_batch_size}; "
                "lower train.global_batch_size or use more images"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.pages = pages
        self.window_pages = window_pages
        self.steps_per_epoch = num_samples // global_batch_size
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All n samples in the order of `epoch`. The last epoch asked for is kept in memory."""
        last = self._last
        if last is None or last[0] != epoch:
            order = permutation(self.seed, epoch, _SAMPLES, self.num_samples)
            last = epoch, order if self.pages is None else self._by_window(order, self.pages, epoch)
            self._last = last
        return last[1]

    def sample_ids(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """The samples [G/W] that `rank` reads at `step` (0 .. steps_per_epoch-1) of `epoch`."""
        G = self.global_batch_size
        if G % world_size:
            raise DataError(f"a global batch of {G} does not divide over {world_size} processes")
        if not (0 <= step < self.steps_per_epoch and 0 <= rank < world_size):
            raise IndexError(f"step {step} of {self.steps_per_epoch}, rank {rank} of {world_size}: out of range")
        B = G // world_size
        start = step * G + rank * B
        return self.permutation(epoch)[start : start + B]

    def _by_window(self, order: NDArray[np.int64], pages: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        names, page_of = np.unique(pages, return_inverse=True)
        position_of_page = np.empty(len(names), np.int64)
        position_of_page[permutation(self.seed, epoch, _PAGES, len(names))] = np.arange(len(names))
        window = position_of_page[page_of] // self.window_pages
        return order[np.argsort(window[order], kind="stable")]
