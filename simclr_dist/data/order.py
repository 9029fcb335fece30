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

# Streams of `permutation`, so that the orders of pages, of samples and of batches are independent.
_SAMPLES, _PAGES, _BATCHES = 0, 1, 2


class Order:
    """The order in which an epoch visits the samples.

    num_samples: n, the size of the dataset.
    global_batch_size: G; must stay the same across a resume. The world size may change.
    seed: of the run.
    pages: page of each sample [n], for files larger than memory: pages are visited in random order,
        `window_pages` at a time, and samples are shuffled within a window. Less random, but disk reads are near each
        other. None: every order of the n samples is possible.
    lengths: of each sample [n], where a batch is padded to its longest: among `length_window` batches at a time,
        samples are sorted by length before they are cut into batches, and the batches come in random order. A window of
        1 leaves batches as they are. Not together with pages.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        *,
        pages: NDArray[np.int64] | None = None,
        window_pages: int = 64,
        lengths: NDArray[np.int64] | None = None,
        length_window: int = 16,
    ) -> None:
        if num_samples < global_batch_size:
            raise DataError(
                f"the dataset has {num_samples} samples, fewer than one global batch of {global_batch_size}; "
                "lower train.global_batch_size or use more"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.pages = pages
        self.window_pages = window_pages
        self.lengths = lengths
        self.length_window = length_window
        self.steps_per_epoch = num_samples // global_batch_size
        self.left_out = num_samples % global_batch_size
        """Samples of every epoch, other ones each time."""
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All n samples in the order of `epoch`. The last epoch asked for is kept in memory."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = epoch, self._order_of(epoch)
        return last[1]

    def epoch_of_draws(self, step: int) -> int:
        """What stands for the epoch in the keys of the random draws at a step of the training: a sample that comes
        again must come with another.
        """
        return step // self.steps_per_epoch

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

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        order = permutation(self.seed, epoch, _SAMPLES, self.num_samples)
        if self.pages is not None:
            order = self._by_window(order, self.pages, epoch)
        if self.lengths is not None and self.length_window > 1:
            order = self._by_length(order, self.lengths, epoch)
        return order

    def _by_window(self, order: NDArray[np.int64], pages: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        names, page_of = np.unique(pages, return_inverse=True)
        position_of_page = np.empty(len(names), np.int64)
        position_of_page[permutation(self.seed, epoch, _PAGES, len(names))] = np.arange(len(names))
        window = position_of_page[page_of] // self.window_pages
        return order[np.argsort(window[order], kind="stable")]

    def _by_length(self, order: NDArray[np.int64], lengths: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Whole batches only: the tail stays. Within a batch, samples stay in the order of `order`."""
        G, steps = self.global_batch_size, self.steps_per_epoch
        taken = order[: steps * G]
        window = np.arange(steps * G) // (self.length_window * G)
        batch = np.empty(steps * G, np.int64)
        batch[np.lexsort((lengths[taken], window))] = np.arange(steps * G) // G
        place = permutation(self.seed, epoch, _BATCHES, steps)
        return np.concatenate([taken[np.argsort(place[batch], kind="stable")], order[steps * G :]])
