"""Which tiles of similarities a rank computes, so that all ranks together sum each pair of rows once.

E is symmetric: a tile serves its rows and, transposed, its columns. That is so for any set of pairs that is symmetric
itself, and there are two:

    Within, every row with every other                         Across, rows of view 0 with rows of view 1

    W = 4         columns of rank                               W = 3        view 1 of rank
                   0    1    2    3                                           0    1    2
            0   │ own │  ►  │ ► / │     │                       view    0  │ own │  ►  │  ►  │
    rows    1   │     │ own │  ►  │ ► / │                       0 of    1  │  ►  │ own │  ►  │
    of      2   │ / ► │     │ own │  ►  │                       rank    2  │  ►  │  ►  │ own │
    rank    3   │  ►  │ / ► │     │ own │

    own    the block of this rank itself; of Within the tiles on and above its diagonal
    ►      summed by this rank, for its rows and for the other rank's (its columns)
    ► /    opposite ranks of an even W: the lower rank takes the upper half of its rows, the higher rank the right half
           of its columns: together one block

Tiles are (rows, columns). Rows count from 0 inside this rank, as do the columns of `own`; others count globally.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

Pairs = Literal["within", "across"]
PAIRS: tuple[Pairs, ...] = ("within", "across")
Tile = tuple[slice, slice]


class Enumeration(Protocol):
    """The tiles of one rank, of at most `size` rows and columns."""

    @property
    def size(self) -> int: ...

    def own(self) -> Iterator[Tile]:
        """Of pairs of rows of this rank, each pair in one tile."""
        ...

    def shared(self) -> Iterator[Tile]:
        """Of pairs with rows of other ranks, each pair in one tile of one rank."""
        ...

    def others(self) -> Iterator[Tile]:
        """Of all pairs of rows of this rank with rows of other ranks."""
        ...


def enumerate_tiles(pairs: Pairs, rank: int, world_size: int, num_rows: int, size: int) -> Enumeration:
    """num_rows: of a rank; of "across", the first half is view 0. size: of a tile, at most."""
    kind = Across if pairs == "across" else Within
    return kind(rank, world_size, num_rows, size)


@dataclass(frozen=True)
class Within:
    rank: int
    world_size: int
    num_rows: int
    size: int

    def own(self) -> Iterator[Tile]:
        parts = spans(0, self.num_rows, self.size)
        for at, i in enumerate(parts):
            for j in parts[at:]:
                yield i, j

    def shared(self) -> Iterator[Tile]:
        rank, W, n = self.rank, self.world_size, self.num_rows
        blocks = [((rank + k) % W, slice(0, n), slice(0, n)) for k in range(1, (W + 1) // 2)]
        if W % 2 == 0:
            other, half = (rank + W // 2) % W, n // 2
            if rank < other:
                blocks.append((other, slice(0, half), slice(0, n)))
            else:
                blocks.append((other, slice(0, n), slice(half, n)))
        for other, rows, columns in blocks:
            yield from rectangle(rows, slice(other * n + columns.start, other * n + columns.stop), self.size)

    def others(self) -> Iterator[Tile]:
        n, start = self.num_rows, self.rank * self.num_rows
        for j in (*spans(0, start, self.size), *spans(start + n, n * self.world_size, self.size)):
            for i in spans(0, n, self.size):
                yield i, j


@dataclass(frozen=True)
class Across:
    rank: int
    world_size: int
    num_rows: int
    size: int

    def own(self) -> Iterator[Tile]:
        return rectangle(self._rows(0), self._rows(1), self.size)

    def shared(self) -> Iterator[Tile]:
        return self._against_other_ranks(0)

    def others(self) -> Iterator[Tile]:
        yield from self._against_other_ranks(0)
        yield from self._against_other_ranks(1)

    def _against_other_ranks(self, view: int) -> Iterator[Tile]:
        for other in range(self.world_size):
            if other != self.rank:
                yield from rectangle(self._rows(view), self._rows(1 - view, other), self.size)

    def _rows(self, view: int, rank: int = 0) -> slice:
        start, length = rank * self.num_rows, self.num_rows // 2
        return slice(start + view * length, start + (view + 1) * length)


def spans(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def rectangle(rows: slice, columns: slice, size: int) -> Iterator[Tile]:
    return product(spans(rows.start, rows.stop, size), spans(columns.start, columns.stop, size))
