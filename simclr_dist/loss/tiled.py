"""Sums of exp(similarity) in tiles: few of them in memory at once, and by symmetry each pair of rows only once.

E_ij = exp(z_i.z_j / temperature) is symmetric, so a tile of pairs counts for its rows and, transposed, for its columns.
enumeration.py says which tiles those of a rank are.

Sums: one matrix product and one exp2 for each pair of rows; an all-reduce of N numbers adds up the ranks' sums.
Gradient: every rank computes its rows against all columns, its own block again from one side only. No collective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.enumeration import Enumeration, Pairs, enumerate_tiles
from simclr_dist.parallel import distributed

# exp(1/temperature) * N must stay inside the type's range (float32: e^88, float64: e^709).
LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


class Tiles:
    """E of the rows of this rank against all rows, zero where `hide` says.

    hide: "image" for all rows of the row's own image (and of its duplicates), "self" for the row itself only.
    """

    def __init__(self, batch: GlobalBatch, hide: str) -> None:
        self.batch = batch
        self.z = batch.z.detach()
        if batch.code == "tiled in float64":
            self.z = self.z.to(torch.float64)
        self.all = self.z
        self.exp2_scale = math.log2(math.e) / batch.temperature  # exp2 is several times faster than exp
        n = batch.num_rows
        self.tiles = _tiles_of(batch.pairs, n, self.z.device.type, batch.rank, batch.world_size)
        self.keeps_tiles = _keeps_tiles(n, self.z.device.type)
        self.kept: list[Tensor] = []
        self._e, self._w = (self.z.new_empty(self.tiles.size**2) for _ in range(2))
        self.diagonals = range(1) if hide == "self" else range(1 - batch.num_views, batch.num_views)
        self.keys = None
        # On a GPU, asking whether there are duplicates makes the host wait; comparing all ids does not.
        if hide == "image" and batch.ids is not None and (self.z.device.type != "cpu" or bool(batch.duplicates)):
            self.keys = batch.per_row(batch.image_keys)

    def sums(self) -> Tensor:
        """[N]: for every row of the global batch the sum of its E."""
        n, W, own = self.batch.num_rows, self.batch.world_size, self.batch.own
        sums = self.z.new_zeros(n * W)
        own_sums = sums[own]
        for i, j in self.tiles.own():  # while the rows of the other ranks arrive
            e = self._exp(i, self.z, j, own.start, self._tile_to_keep() if self.keeps_tiles else self._e)
            own_sums[i] += e.sum(1)
            if i != j:
                own_sums[j] += e.sum(0)
        if W > 1:
            self.all = self.batch.all_rows().to(self.z.dtype)
            for i, j in self.tiles.shared():
                e = self._exp(i, self.all, j, 0, self._e)
                own_sums[i] += e.sum(1)
                sums[j] += e.sum(0)
            distributed.all_reduce_sum_(sums)
        return sums

    def gradient_rows(self, a: Tensor) -> Tensor:
        """[n, K]: for every row i of this rank the sum over j of E_ij (a_i + a_j) z_j; a [N]. After `sums`."""
        own = self.batch.own
        gradient = torch.zeros_like(self.z)
        own_a = a[own]
        kept = iter(self.kept)
        for i, j in self.tiles.own():
            if self.keeps_tiles:
                e = _shape(next(kept), self.z[i], self.z[j])
            else:
                e = self._exp(i, self.z, j, own.start, self._e)
            w = self._weigh(e, own_a[i], own_a[j])
            gradient[i].addmm_(w, self.z[j])
            if i != j:
                gradient[j].addmm_(w.T, self.z[i])
        self.kept.clear()
        for i, j in self.tiles.others():
            w = self._weigh(self._exp(i, self.all, j, 0, self._e), own_a[i], a[j])
            gradient[i].addmm_(w, self.all[j])
        return gradient

    def _tile_to_keep(self) -> Tensor:
        self.kept.append(torch.empty_like(self._e))
        return self.kept[-1]

    def _exp(self, i: slice, columns: Tensor, j: slice, j_offset: int, buffer: Tensor) -> Tensor:
        """The tile of own rows i and of `columns[j]`, in `buffer`; columns[0] is the global row j_offset."""
        left, right = self.z[i], columns[j]
        e = _shape(buffer, left, right)
        torch.addmm(e, left, right.T, beta=0, alpha=self.exp2_scale, out=e).exp2_()
        first = self.batch.own.start
        i0, j0 = i.start + first, j.start + j_offset
        if self.keys is not None:
            e.masked_fill_(self.keys[i0 : i0 + len(left), None] == self.keys[j0 : j0 + len(right)], 0)
        elif first <= j0 < self.batch.own.stop:
            for view in self.diagonals:
                k = i0 - j0 + view * self.batch.num_images
                if -len(left) < k < len(right):
                    e.diagonal(k).zero_()
        return e

    def _weigh(self, e: Tensor, a_i: Tensor, a_j: Tensor) -> Tensor:
        return e.mul_(torch.add(a_i[:, None], a_j, out=_shape(self._w, a_i, a_j)))


def _shape(buffer: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The start of a buffer as a tile [rows, columns]."""
    return buffer[: len(rows) * len(columns)].view(len(rows), len(columns))


def _tile_size(num_rows: int, device_type: str) -> int:
    """A tile that fits into a core's cache; on a GPU one that takes longer than its launch."""
    if device_type != "cpu":
        return 4096
    return 256 if num_rows <= 1024 else 512


def _keeps_tiles(num_rows: int, device_type: str) -> bool:
    """Whether the gradient uses the tiles of the sums again: more than fit into the cache cost more than they save."""
    return num_rows**2 <= 1 << 20 and device_type == "cpu"


def _tiles_of(pairs: Pairs, num_rows: int, device_type: str, rank: int = 0, world_size: int = 1) -> Enumeration:
    longest = num_rows // 2 if pairs == "across" else num_rows
    return enumerate_tiles(pairs, rank, world_size, num_rows, min(longest, _tile_size(num_rows, device_type)))


def tile_bytes(num_rows: int, device_type: str, pairs: Pairs = "within") -> int:
    """Bytes of the float32 tiles that `Tiles` holds at once, for z [num_rows, K]."""
    tiles = _tiles_of(pairs, num_rows, device_type)
    kept = sum(1 for _ in tiles.own()) if _keeps_tiles(num_rows, device_type) else 0
    return (2 + kept) * 4 * tiles.size**2
