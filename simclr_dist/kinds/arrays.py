"""A kind whose samples are rows of an array, in memory or mapped into it: what most kinds of one's own are.

A subclass says what a source holds and how a view of a row is drawn; order, labels, fingerprint, loader and evaluations
follow. docs/guides/extending.md has one. Letters: n samples, V views, B samples of a process.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch, Loader
from simclr_dist.data.loading.open_images import DatasetInfo
from simclr_dist.data.order import Order
from simclr_dist.data.randomness import keys
from simclr_dist.errors import DataError
from simclr_dist.kinds.keyed_loader import KeyedLoader
from simclr_dist.kinds.kind import Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from simclr_dist.kinds.kind import SampleBatch
    from simclr_dist.network.inputs import Inputs
    from simclr_dist.parallel.distributed import World


@dataclass(frozen=True)
class Rows:
    """values [n, ...]; classes: the name of each row's class [n], empty where it has none; None: no row has one."""

    values: NDArray
    classes: NDArray | None = None

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return () if self.classes is None else tuple(str(name) for name in np.unique(self.classes) if str(name))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[n]: the place of each class among `class_names`, -1 where there is none."""
        if self.classes is None:
            return np.full(len(self.values), -1, np.int64)
        number = {name: i for i, name in enumerate(self.class_names)}
        return np.array([number.get(str(name), -1) for name in self.classes], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of values and classes: equal only if they are."""
        found = hashlib.blake2b(digest_size=16)
        found.update(json.dumps([str(self.values.dtype), self.values.shape, self.class_names]).encode())
        for part in (self.values, self.labels):
            found.update(np.ascontiguousarray(part).data.cast("B"))
        return found.hexdigest()


class ArrayKind(Kind):
    """Samples are rows of an array. The encoder eats what `draw_views` returns, and in evaluations the rows."""

    @abstractmethod
    def open(self, source: str) -> Rows:
        """What `source` holds. Raises DataError."""

    @abstractmethod
    def draw_views(self, values: NDArray, view_keys: NDArray[np.uint64]) -> NDArray:
        """Views [V, B, ...] of the rows values [B, ...].

        view_keys: uint64 [V, B]. Draw from them by `uniform(view_keys, number)` of simclr_dist.data.randomness, and a
        view depends on nothing else: not on the number of processes, nor on where a run was interrupted.
        """

    def rows(self, source: str) -> Rows:
        """What `open` finds. It is kept in this process until the file changes."""
        path = Path(source)
        stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
        name = type(self), source, json.dumps(self.data.options, sort_keys=True)
        if name not in _OPENED or _OPENED[name][0] != stamp:
            rows = self.open(source)
            if rows.classes is not None and len(rows.classes) != len(rows.values):
                raise DataError(
                    f"{source}: {len(rows.values):,} {self.noun}s, but {len(rows.classes):,} classes of them"
                )
            _OPENED[name] = stamp, rows
        return _OPENED[name][1]

    @property
    def inputs(self) -> Inputs:
        """As rows of data.train."""
        import torch

        from simclr_dist.network.inputs import Inputs

        values = self.rows(self.data.train).values
        size = " x ".join(map(str, values.shape[1:])) + " numbers"
        return Inputs("rows", size, lambda n: as_input(values[torch.randint(len(values), (n,)).numpy()]))

    def describe(self, source: str) -> DatasetInfo:
        rows = self.rows(source)
        return DatasetInfo(
            len(rows.values), rows.class_names, rows.fingerprint, lambda: rows.fingerprint, rows.labels, None
        )

    def loader(
        self, augment: AugmentConfig, *, seed: int, global_batch_size: int, world: World, device: torch.device | str
    ) -> Loader:
        rows = self.rows(self.data.train)
        order = Order(len(rows.values), global_batch_size, seed)

        def draw(epoch: int, step: int) -> Batch:
            import torch

            ids = order.sample_ids(epoch, step, world.rank, world.size)
            view_keys = keys(order.seed, epoch, ids[None], np.arange(self.data.num_views)[:, None])
            views = as_input(self.draw_views(rows.values[ids], view_keys))
            if views.shape[:2] != view_keys.shape:
                raise DataError(f"draw_views gave {tuple(views.shape)}, not {len(view_keys)} views of {len(ids)} rows")
            return Batch(views, torch.from_numpy(ids.copy()), torch.from_numpy(rows.labels[ids]), epoch, ids)

        return KeyedLoader(self.describe(self.data.train), order, draw, device, self.data.batches_ahead)

    def evaluation_batches(
        self, source: str, ids: NDArray[np.int64], batch_size: int, unreadable: dict[int, str] | None = None
    ) -> Iterator[SampleBatch]:
        import torch

        rows = self.rows(source)
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            yield as_input(rows.values[part]), torch.from_numpy(rows.labels[part]), torch.from_numpy(part.copy())


_OPENED: dict[tuple[type, str, str], tuple[tuple[int, int] | None, Rows]] = {}


def as_input(values: NDArray) -> Tensor:
    """Floating-point numbers as float32, others as int64."""
    import torch

    return torch.from_numpy(values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64))
