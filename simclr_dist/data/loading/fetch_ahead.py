"""Fetches the shards of a store in the sequence in which an order needs them, ahead of the step.

When a shard is needed next is a pure function of order and step (`ShardUses`), so nothing is remembered: at every step
the cache should hold those that are needed soonest, as many as fit. What is missing of them is fetched, what is needed
later than these makes room. A resume begins with what its own step needs.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import DataConfig
from simclr_dist.data.beton.shard_cache import NEVER, CachedShard, NoRoomError, ShardCache, in_gb, shard_cache
from simclr_dist.data.beton.shard_files import names_beton
from simclr_dist.data.beton.shard_set import ShardSet, open_data
from simclr_dist.data.order import Order
from simclr_dist.data.sources.remote import UnavailableError
from simclr_dist.parallel.distributed import World
from simclr_dist.source_text import is_url, lines

_THREADS_OF_A_MACHINE = 8
_LONGEST_PAUSE_S = 15.0
_LOOKED_AT = 200  # steps, for an estimate


class ShardUses:
    """When which shard is read by the processes of a machine; for any number of threads.

    file_of_each: the shard of each sample [n]. num_bytes: of each shard.
    part: the begin and end of the machine's samples in a global batch.
    """

    def __init__(
        self, order: Order, file_of_each: NDArray[np.int64], num_bytes: NDArray[np.int64], part: tuple[int, int]
    ) -> None:
        self._order = copy.copy(order)  # its memory of the last epoch is not the loader's
        self._file_of_each, self.num_bytes, self._part = file_of_each, num_bytes, part
        self._uses: dict[int, NDArray[np.int64]] = {}
        self._computing = threading.Lock()

    def next_use(self, step: int) -> NDArray[np.int64]:
        """The first step from `step` on that needs each shard; NEVER: none of this epoch and the next."""
        steps = self._order.steps_per_epoch
        epoch, begin = divmod(step, steps)
        numbers = np.arange(len(self.num_bytes))
        found = np.full(len(numbers), NEVER)
        for of_epoch, first in ((epoch + 1, 0), (epoch, begin)):
            uses = self._of_epoch(of_epoch)
            place = np.searchsorted(uses, numbers * steps + first)
            use = uses[np.minimum(place, len(uses) - 1)]
            here = (place < len(uses)) & (use // steps == numbers)
            found[here] = of_epoch * steps + use[here] % steps
        return found

    def soonest(self, step: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards that are needed soonest from `step` on, in that sequence, as far as `limit` bytes go; and
        `next_use`.
        """
        uses = self.next_use(step)
        sequence = np.argsort(uses, kind="stable")
        fit = np.cumsum(self.num_bytes[sequence]) <= limit
        return sequence[fit & (uses[sequence] < NEVER)], uses

    def most_at_once(self, ahead: int, epoch: int = 0) -> int:
        """Bytes of the shards that are read at the same time, at most, where `ahead` steps are decoded in advance.

        Another process may be one step behind.
        """
        steps, uses = self._order.steps_per_epoch, self._of_epoch(epoch)
        shard, step = np.divmod(uses, steps)
        begin, end = step - ahead, step + 2
        again = np.r_[False, shard[1:] == shard[:-1]]
        begin[again] = np.maximum(begin[again], end[:-1][again[1:]])
        change = np.zeros(steps + ahead + 3, np.int64)
        np.add.at(change, begin + ahead, self.num_bytes[shard])
        np.subtract.at(change, end + ahead, self.num_bytes[shard])
        return int(np.cumsum(change).max())

    def fetched_an_epoch(self, limit: int) -> float:
        """Bytes, once the cache is full: of what each step makes one of the soonest, at some steps, times all steps."""
        steps = self._order.steps_per_epoch
        looked_at = np.unique(np.linspace(0, steps - 1, min(steps, _LOOKED_AT)).astype(np.int64))
        new = 0
        for step in looked_at.tolist():
            before, after = (set(self.soonest(at, limit)[0].tolist()) for at in (step, step + 1))
            new += sum(int(self.num_bytes[number]) for number in after - before)
        return new * steps / len(looked_at)

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """shard x steps + step of each use, sorted."""
        with self._computing:
            if epoch not in self._uses:
                steps, (begin, end) = self._order.steps_per_epoch, self._part
                G = self._order.global_batch_size
                samples = self._order.permutation(epoch)[: steps * G].reshape(steps, G)[:, begin:end]
                uses = np.unique(self._file_of_each[samples] * steps + np.arange(steps)[:, None])
                near = {known: self._uses[known] for known in self._uses if abs(known - epoch) <= 1}
                self._uses = near | {epoch: uses}
            return self._uses[epoch]


class FetchAhead:
    """Threads that fetch; they begin with the first `at`. Close it. shards: None where one is a file of this machine.

    ahead: steps that are decoded in advance.
    """

    def __init__(
        self, shards: Sequence[CachedShard | None], uses: ShardUses, cache: ShardCache, ahead: int, num_threads: int
    ) -> None:
        self._shards, self._uses, self._cache, self._ahead = shards, uses, cache, ahead
        self._num_threads = num_threads
        self._first = self._step = 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def at(self, step: int) -> None:
        """The batch of `step` is waited for: what earlier ones needed may go."""
        if not self._threads:
            self._first = step
        self._step = step
        self._cache.follow(self._needed, step + self._ahead)
        self._wake_one()
        if not self._threads:
            self._threads = [
                # Daemons: a copy that hangs does not keep the process.
                threading.Thread(target=self._work, name="fetch", daemon=True)
                for _ in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()

    def wait(self, step: int) -> None:
        """Until the shards are here that the machine reads at `step`. Raises DataError."""
        self.at(step)
        for shard, use in zip(self._shards, self._uses.next_use(step).tolist(), strict=True):
            if shard is not None and use == step:
                with self._cache.reading(shard):
                    pass

    def _soonest(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # Another process of the machine may be one step behind.
        return self._uses.soonest(max(self._first, self._step - 1), self._cache.place.limit)

    def _needed(self) -> dict[str, int]:
        _, uses = self._soonest()
        return {shard.name: use for shard, use in zip(self._shards, uses.tolist(), strict=True) if shard is not None}

    def _work(self) -> None:
        failures = 0
        while not self._closed:
            try:
                fetched = self._fetch_next()
                failures = 0
            except UnavailableError:  # said by whoever waits for it
                fetched, failures = False, failures + 1
            if not fetched:
                with self._changed:
                    if not self._closed:
                        self._changed.wait(min(2.0**failures / 2, _LONGEST_PAUSE_S))

    def _fetch_next(self) -> bool:
        """The soonest that is not there and not being fetched; False: there is none, or no room for it."""
        sequence, _ = self._soonest()
        there = self._cache.names()
        soonest = {shard.name for number in sequence.tolist() if (shard := self._shards[number]) is not None}
        for number in sequence.tolist():
            shard = self._shards[number]
            if self._closed:
                return False
            if shard is None or shard.name in there:
                continue
            self._wake_one()  # for the next one
            with suppress(NoRoomError):
                if self._cache.fetch(shard, keep=soonest, each=self._go_on):
                    return True
                continue
            return False
        return False

    def _wake_one(self) -> None:
        with self._changed:
            self._changed.notify()

    def _go_on(self, _: int) -> None:
        if self._closed:
            raise UnavailableError("the loader was closed")

    def close(self) -> None:
        self._closed = True
        self._cache.follow(dict, -1)
        with self._changed:
            self._changed.notify_all()


def fetch_ahead(data: DataConfig, order: Order, world: World) -> FetchAhead | None:
    """For data.train; None where it lies on this machine. Raises DataError, as where the cache is too small."""
    found = _remote(data.train)
    if found is None:
        return None
    G = order.global_batch_size
    first = max(0, world.rank - world.local_rank) * G // world.size
    part = first, min(G, first + max(1, world.local_size) * G // world.size)
    uses = _uses(found, order, part)
    shards = {shard.cached.name: shard.cached.num_bytes for shard in found.shards if shard.cached is not None}
    cache = shard_cache()
    cache.refuse_if_too_small(uses.most_at_once(data.batches_ahead), shards)
    threads = max(1, _THREADS_OF_A_MACHINE // max(1, world.local_size))
    return FetchAhead([shard.cached for shard in found.shards], uses, cache, data.batches_ahead, threads)


def sentence_of_store(data: DataConfig, order: Order) -> str:
    """What a training will fetch on one machine that reads whole batches; empty where nothing. Raises DataError."""
    found = _remote(data.train)
    if found is None:
        return ""
    uses, cache = _uses(found, order, (0, order.global_batch_size)), shard_cache()
    there, limit = cache.names(), cache.place.limit
    shards = [shard.cached for shard in found.shards if shard.cached is not None]
    total = sum(shard.num_bytes for shard in shards)
    held = sum(shard.num_bytes for shard in shards if shard.name in there)
    at_once = uses.most_at_once(data.batches_ahead)
    text = (
        f"{len(shards):,} shards behind URLs, {in_gb(total)}, of which {in_gb(held)} are in {cache.place.folder}; at "
        f"most {in_gb(at_once)} are read at once"
    )
    if at_once > limit:
        return f"{text}, more than data.cache_size ({in_gb(limit)})"
    if total <= limit:
        return f"{text}; each is fetched once"
    fetched = uses.fetched_an_epoch(limit)
    return f"{text}; data.cache_size holds {in_gb(limit)}, so about {in_gb(round(fetched))} are fetched an epoch"


def _remote(source: str) -> ShardSet | None:
    if not any(map(is_url, lines(source))) or not names_beton(source):
        return None
    with open_data(source) as data:
        return data if isinstance(data, ShardSet) else None


def _uses(found: ShardSet, order: Order, part: tuple[int, int]) -> ShardUses:
    """A file of this machine takes no room in the cache."""
    sizes = np.array([0 if shard.cached is None else shard.cached.num_bytes for shard in found.shards], np.int64)
    return ShardUses(order, found.file_of_each(), sizes, part)
