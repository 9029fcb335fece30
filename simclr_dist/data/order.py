"""Who reads what: a pure function of (seed, epoch, step, rank, world size).

    perm of an epoch   ┌── global batch 0 ──┬── global batch 1 ──┬─ ... ─┬ tail ┐
                       │ rank 0 │ rank 1 │… │ rank 0 │ rank 1 │… │       │ left │
                       └────────────────────┴────────────────────┴───────┴─ out ┘

A global batch does not depend on the number of processes, and any step can be started from: a resume needs the step
number and nothing else. The tail shorter than a global batch is left out of its epoch, never padded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.randomness import permutation
from simclr_dist.errors import DataError

# Streams of `permutation`: the order of pages must not be the order of samples.
_SAMPLES, _PAGES = 0, 1


class Order:
    """The order in which an epoch visits the samples.

    num_samples: n, the size of the dataset.
    global_batch_size: G; must stay the same across a resume, the world size need not.
    seed: of the run.
    pages: page of each sample [n], for files larger than memory: whole pages are visited in random order,
        `window_pages` at a time, and samples are shuffled within a window. Less random, but the disk reads near
        places. None: every order of the n samples is possible.
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
        self._kept: tuple[int, NDArray[np.int64]] | None = None

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All n samples in the order of `epoch`; the last one asked for is kept."""
        kept = self._kept
        if kept is None or kept[0] != epoch:
            order = permutation(self.seed, epoch, _SAMPLES, self.num_samples)
            kept = epoch, order if self.pages is None else self._by_window(order, self.pages, epoch)
            self._kept = kept
        return kept[1]

    def sample_ids(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """The samples [G/W] that `rank` reads at `step` (0 .. steps_per_epoch-1) of `epoch`."""
        G = self.global_batch_size
        if G % world_size:
            raise DataError(f"a global batch of {G} does not divide over {world_size} processes")
        if not (0 <= step < self.steps_per_epoch and 0 <= rank < world_size):
            raise IndexError(
                f"step {step} of {self.steps_per_epoch}, rank {rank} of {world_size}: outside of the epoch or the world"
            )
        B = G // world_size
        start = step * G + rank * B
        return self.permutation(epoch)[start : start + B]

    def _by_window(self, order: NDArray[np.int64], pages: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        names, page_of = np.unique(pages, return_inverse=True)
        turn_of_page = np.empty(len(names), np.int64)
        turn_of_page[permutation(self.seed, epoch, _PAGES, len(names))] = np.arange(len(names))
        window = turn_of_page[page_of] // self.window_pages
        return order[np.argsort(window[order], kind="stable")]
