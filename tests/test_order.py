"""The order of samples: elastic over processes, resumable at any step, nothing twice, nothing padded."""

from __future__ import annotations

import numpy as np
import pytest

from simclr_dist.data import Order
from simclr_dist.errors import DataError

N, G, SEED = 103, 24, 5


def epoch_ids(order: Order, epoch: int, world_size: int = 1) -> np.ndarray:
    """[steps, W, G/W]"""
    return np.array(
        [
            [order.sample_ids(epoch, step, rank, world_size) for rank in range(world_size)]
            for step in range(order.steps_per_epoch)
        ]
    )


def test_epoch_is_a_permutation_cut_to_whole_global_batches() -> None:
    order = Order(N, G, SEED)
    ids = epoch_ids(order, 0)
    assert order.steps_per_epoch == 4
    assert np.array_equal(ids.reshape(-1), order.permutation(0)[: 4 * G])
    assert len(np.unique(ids)) == 4 * G
    assert np.array_equal(np.sort(order.permutation(0)), np.arange(N))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    order = Order(N, G, SEED)
    assert np.array_equal(epoch_ids(order, 1, world_size).reshape(4, G), epoch_ids(order, 1).reshape(4, G))


def test_any_step_can_be_started_from_at_another_world_size() -> None:
    steps = [(epoch, step) for epoch in range(2) for step in range(4)]
    expected = [Order(N, G, SEED).sample_ids(*place) for place in steps]
    for begin in range(len(steps)):
        fresh = Order(N, G, SEED)
        for world_size in (1, 2, 4):
            for place, ids in zip(steps[begin:], expected[begin:], strict=True):
                got = np.concatenate([fresh.sample_ids(*place, rank, world_size) for rank in range(world_size)])
                assert np.array_equal(got, ids)


def test_epochs_and_seeds_differ() -> None:
    a = Order(N, G, SEED)
    assert not np.array_equal(a.permutation(0), a.permutation(1))
    assert not np.array_equal(a.permutation(0), Order(N, G, SEED + 1).permutation(0))
    # ffcv's seed + epoch would make these two the same
    assert not np.array_equal(Order(N, G, 0).permutation(1), Order(N, G, 1).permutation(0))


def test_every_sample_is_left_out_now_and_then() -> None:
    order = Order(N, G, SEED)
    seen = [set(epoch_ids(order, epoch).reshape(-1).tolist()) for epoch in range(200)]
    assert set.intersection(*seen) == set()


def test_dataset_smaller_than_the_global_batch_is_refused() -> None:
    with pytest.raises(DataError, match="10 samples, fewer than one global batch of 24"):
        Order(10, G, SEED)


def test_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DataError, match="24 does not divide over 5"):
        Order(N, G, SEED).sample_ids(0, 0, 0, 5)


@pytest.mark.parametrize(("step", "rank"), [(4, 0), (-1, 0), (0, 2), (0, -1)])
def test_places_outside_of_the_epoch_are_refused(step: int, rank: int) -> None:
    with pytest.raises(IndexError):
        Order(N, G, SEED).sample_ids(0, step, rank, 2)


class TestPageLocal:
    """For files larger than memory: near samples are read at near times, and every promise above still holds."""

    pages = np.repeat(np.arange(100), 10)  # 1,000 samples on 100 pages

    def order(self, window_pages: int = 8) -> Order:
        return Order(1000, G, SEED, pages=self.pages, window_pages=window_pages)

    def test_visits_every_sample_once(self) -> None:
        assert np.array_equal(np.sort(self.order().permutation(3)), np.arange(1000))

    def test_reads_few_pages_at_a_time(self) -> None:
        read = self.pages[self.order().permutation(0)]
        for window in read.reshape(-1, 40):  # half a window: touches one window, or two where they meet
            assert len(np.unique(window)) <= 16
        first, last = np.full(100, 1000), np.zeros(100, int)
        np.minimum.at(first, read, np.arange(1000))
        np.maximum.at(last, read, np.arange(1000))
        assert (last - first < 80).all()  # a page is done with within its window of 8 pages

    def test_windows_are_shuffled_and_differ_between_epochs(self) -> None:
        order = self.order()
        first, second = (self.pages[order.permutation(epoch)[:80]] for epoch in (0, 1))
        assert set(first) != set(second)
        assert len(np.unique(first[:20])) > 4
        assert not np.array_equal(np.unique(first), np.arange(8))

    def test_does_not_depend_on_the_number_of_processes(self) -> None:
        order = self.order()
        a, b = epoch_ids(order, 0, 4), epoch_ids(order, 0, 1)
        assert np.array_equal(a.reshape(-1), b.reshape(-1))

    def test_pages_in_any_numbering(self) -> None:
        far = Order(1000, G, SEED, pages=self.pages * 7 + 3, window_pages=8)
        assert np.array_equal(far.permutation(0), self.order().permutation(0))
