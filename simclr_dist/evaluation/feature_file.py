"""Features that are computed into a file, mapped into memory: a node holds them once, its memory not at all.

    rows of the file    rank 0 ──────────▶│ rank 1 ─────────▶│ rank 2 ───────▶│       each writes its own as they come
    images left out     rank 0 ────────│rank 1 ─────────│rank 2 ───────│             then the gaps are closed

Ranks of a node write to one file; where there are several nodes, each gets the rows of the others. The file has no name
when this is done, so that it goes with the process, however that ends.

Letters: n images, D width of h, W ranks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simclr_dist.config import Precision
from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import (
    Features,
    ImageBatch,
    Normalize,
    check_given,
    encode,
    frozen,
    gather_facts,
    part_of_rank,
    refuse_non_finite,
)
from simclr_dist.network.precision import autocast
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

BLOCK_BYTES = 16 * 2**20  # that are moved at once


def extract_to_file(
    encoder: nn.Module,
    load: Callable[[np.ndarray], Iterable[ImageBatch]],
    ids: np.ndarray,
    *,
    places: Sequence[Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    precision: Precision = "fp32",
    normalize: Normalize,
) -> Features:
    """What `extract_features_distributed` gives, with h in `dtype`, float32 or float16, in a file of each node.

    places: folders for it; the first with room on every node is taken. Raises as it does, and DataError where none has.
    """
    own = ids[part_of_rank(len(ids), distributed.rank(), distributed.world_size())]
    labels: list[Tensor] = []
    found: list[Tensor] = []
    with frozen(encoder), torch.no_grad(), autocast(device, precision):
        batches = encode(encoder, load(own) if len(own) else (), device=device, normalize=normalize)
        first = run_on_all_ranks(lambda: next(batches, None), device, catch=Exception)
        width = int(distributed.all_reduce_max_(torch.tensor([first[0].shape[1] if first else 0], device=device)))
        if width == 0:
            raise DataError(f"none of {len(ids):,} images can be read")
        file = _NodeFile.reserve(places, len(ids), width, dtype, device)
        try:

            def write() -> None:
                row, bad = file.first_row, 0
                for h, of_labels, of_ids in chain([first] if first else [], batches):
                    stored = h.to(dtype)
                    bad_rows = ~torch.isfinite(stored).all(dim=1)
                    if bad_rows.any() and not bad:
                        first_bad = int(of_ids[bad_rows][0])
                    bad += int(bad_rows.sum())
                    file.write(row, stored)
                    row += len(h)
                    labels.append(of_labels)
                    found.append(of_ids)
                if bad:
                    refuse_non_finite(bad, row - file.first_row, first_bad, precision, dtype)
                check_given(own, torch.cat(found).numpy() if found else own[:0])

            run_on_all_ranks(write, device, catch=Exception)
            nothing = torch.empty(0, dtype=torch.int64)
            facts = [torch.cat(parts) if parts else nothing for parts in (labels, found)]
            return file.joined(*facts)
        finally:
            file.forget()


class _NodeFile:
    """n rows of D values on this node; those of a rank begin at `first_row`, which is its part of the images."""

    def __init__(self, path: Path, n: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.path, self.n, self.width, self.device = path, n, width, device
        self.dtype = np.dtype(np.float16 if dtype == torch.float16 else np.float32)
        self.torch_dtype = dtype
        self.world = distributed.world()
        self.share = -(-n // self.world.size)
        self.first_row = self.world.rank * self.share
        self._descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))

    @classmethod
    def reserve(cls, places: Sequence[Path], n: int, width: int, dtype: torch.dtype, device: torch.device) -> _NodeFile:
        """In the first of `places` where every node can have a file of this size. All ranks together."""
        world = distributed.world()
        name = f".features-{distributed.broadcast_text_from_main(secrets.token_hex(16), device)}"
        num_bytes = n * width * dtype.itemsize
        reasons = []
        for place in places:
            path = place / f"{name}-{world.rank - world.local_rank}.tmp"  # a file for each node, were the disk shared
            failure = _make(path, num_bytes) if world.local_rank == 0 else None
            if distributed.first_failing_rank(failure is not None, device) is None:
                return run_on_all_ranks(lambda: cls(path, n, width, dtype, device), device)  # noqa: B023
            if world.local_rank == 0:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            reasons.append(f"{place} ({failure.strerror if failure else 'on another node'})")

        def refuse() -> None:
            raise DataError(
                f"features of {n:,} images take {num_bytes / 2**20:,.0f} MiB, and there is no room for them: "
                f"{', '.join(reasons)}; name a folder that has room with --out or in TMPDIR"
            )

        run_on_all_ranks(refuse, device)
        raise AssertionError

    def write(self, row: int, h: Tensor) -> None:
        self._write(row, np.ascontiguousarray(h.numpy()))

    def _write(self, row: int, values: np.ndarray) -> None:
        left, offset = memoryview(values.reshape(-1).view(np.uint8)), row * self.width * self.dtype.itemsize
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            left, offset = left[written:], offset + written

    def _read(self, row: int, count: int) -> np.ndarray:
        size, parts = count * self.width * self.dtype.itemsize, []
        offset = row * self.width * self.dtype.itemsize
        while size:
            parts.append(os.pread(self._descriptor, size, offset))
            if not parts[-1]:
                raise OSError(f"{self.path}: shorter than it was made")
            size, offset = size - len(parts[-1]), offset + len(parts[-1])
        return np.frombuffer(bytearray(b"".join(parts)), self.dtype).reshape(count, self.width)

    def joined(self, labels: Tensor, sample_ids: Tensor) -> Features:
        """The rows of all ranks. labels, sample_ids: of those that this one has written."""
        counts = distributed.all_gather(torch.tensor([len(sample_ids)], device=self.device)).tolist()
        block = max(1, BLOCK_BYTES // (self.width * self.dtype.itemsize))
        if self.world.local_size < self.world.size:
            self._exchange(block, max(counts))
        if self.world.local_rank == 0:  # the gaps: rows move towards the beginning, so none is written over unread
            end = 0
            for rank, count in enumerate(counts):
                for start in range(0, count if end < rank * self.share else 0, block):
                    some = min(block, count - start)
                    self._write(end + start, self._read(rank * self.share + start, some))
                end += count
        all_labels, all_ids = gather_facts((labels, sample_ids), self.share, self.device)
        distributed.barrier()
        shape = (sum(counts), self.width)
        h = torch.from_numpy(np.memmap(self.path, self.dtype, mode="c", shape=shape))
        distributed.barrier()  # before the name goes
        return Features(h, all_labels, all_ids)

    def _exchange(self, block: int, most: int) -> None:
        """Every node gets the rows of the others, some at a time."""
        for start in range(0, most, block):
            some = min(block, most - start, self.n - self.first_row - start)
            rows = np.zeros((min(block, most - start), self.width), self.dtype)
            if some > 0:
                rows[:some] = self._read(self.first_row + start, some)
            gathered = distributed.all_gather(torch.from_numpy(rows).to(self.device)).cpu().numpy()
            if self.world.local_rank == 0:
                for rank, part in enumerate(gathered.reshape(self.world.size, *rows.shape)):
                    first = rank * self.share + start
                    self._write(first, part[: max(0, min(len(part), self.n - first, self.share - start))])

    def forget(self) -> None:
        os.close(self._descriptor)
        if self.world.local_rank == 0:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def _make(path: Path, num_bytes: int) -> OSError | None:
    """A file with so much room that later writes do not fail. Why it cannot be made, if so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                os.ftruncate(descriptor, num_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error
    return None
