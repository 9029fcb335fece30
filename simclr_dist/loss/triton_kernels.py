"""Sums of exp(similarity) on the GPU, one kernel per pass; the N x N similarities stay in registers.

    sums       a program holds TILE_ROWS rows and goes through the columns:   S_i += sum_j E_ij
    gradient   the same, with a second product for each block of columns:     g_i += sum_j E_ij (a_i + a_j) z_j

The products are the tensor cores' float16 ones, accumulated in float32. No number in them is large: |z| <= 1, and
E_ij a_i <= 1. A float32 row is the sum of two float16 parts, hi + lo, exact to 2^-24; three products of parts, without
lo lo, are then as exact as float32. A row that was rounded to 16 bits is one part. The weights E_ij (a_i + a_j) are two
parts always, scaled by 2^14 to the middle of float16's range.

    products of N x N x K            sums   gradient: similarities, weights   together
    float32 rows (2 parts)              3                 3,            3            9
    rows of 16 bits (1 part)            1                 1,            2            4

With few rows the columns are cut into chunks too, so that every multiprocessor has work; the chunks' sums are added
afterwards, in a fixed order: no atomics. Every rank sums its own rows, and an all-gather of N numbers joins the sums.

Pairs are divided into segments: rows that follow each other, and the columns they meet, which do too.

    within     1 segment: the rows of this rank, and all columns
    across     2 segments, in an order of all rows by view, then by rank: this rank's rows of view s, and the columns of
               the other view. Half of the pairs, so half of the products.

Importing this module needs triton. `implementations.py` compares the kernels with `Tiles` before they are used. Tests
run them by triton's interpreter on the CPU, and compile them for GPUs that are not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.parallel import distributed

WEIGHT_SCALE = tl.constexpr(16384.0)  # weights are at most 2; float16 ends at 65504
MOST_CHUNKS = 132
# Before, each product of a sum of products has its own tensor memory on the B200, together more than there is.
ACCUMULATES_IN_PLACE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@dataclass(frozen=True)
class Tile:
    """The rows and columns that a program works on at once, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def choose_tile(K: int, parts: int, capability: int) -> Tile:
    """The largest tile whose programs keep their numbers in registers (tests/test_loss_compiled.py).

    K: padded. capability: the device's, major. A program may have 227 KiB of shared memory on Hopper (9) and on the
    B200 (10), 163 on the A100, 99 on other cards.
    """
    wide = K > 128
    if capability == 9 or (capability == 10 and ACCUMULATES_IN_PLACE):
        if parts == 1:
            return Tile(128, 64 if wide or capability == 10 else 128, warps=8, stages=3)
        return Tile(128, 32 if wide else 64, warps=8, stages=2)
    # Fewer than 64 rows keep a program off the B200's tensor memory.
    rows = 32 if capability == 10 or (wide and parts == 2) else 64
    columns = 64 if not wide or parts == 1 else 16 if capability == 10 else 32
    return Tile(rows, columns, warps=8, stages=2)


def num_chunks(row_blocks: int, column_blocks: int, multiprocessors: int) -> int:
    """In how many chunks the columns are cut: those that keep all multiprocessors busy, and no more.

    A multiprocessor runs one program at a time, so the programs run in rounds, and the last round should be full.
    """
    candidates = range(1, min(column_blocks, MOST_CHUNKS) + 1)
    rounds = {chunks: math.ceil(row_blocks * chunks / multiprocessors) / chunks for chunks in candidates}
    return next(chunks for chunks in candidates if rounds[chunks] <= 1.05 * min(rounds.values()))


class Kernels:
    """The interface of `tiled.Tiles`, for float32 z with K <= 256."""

    def __init__(self, batch: GlobalBatch, hide: str) -> None:
        self.batch = batch
        self.z = batch.z.detach()
        self.all = self.z
        self.parts = 1 if batch.row_dtype.itemsize == 2 else 2
        self.width = padded_width(self.z.shape[1])
        self.tile = choose_tile(self.width, self.parts, _capability(self.z.device))
        self.segments = batch.num_views if batch.pairs == "across" else 1
        self.rows_of_segment = batch.num_rows // self.segments
        self.columns_of_segment = batch.num_all_rows // self.segments
        if hide == "self":
            self.keys = torch.arange(batch.num_all_rows, dtype=torch.int32, device=self.z.device)
        else:
            self.keys = batch.per_row(batch.image_keys)
        self.keys = self._by_segment(self.keys)

    def sums(self) -> Tensor:
        """[N]: for every row of the global batch the sum of its E."""
        self.all = self.batch.all_rows()
        self._rows = float16_parts(self._by_segment(self.all), self.parts, self.width)
        grid, chunk = self._grid()
        partial = self.z.new_empty(grid[1], self.batch.num_rows)  # rows of this rank, by view: by segment
        _sums_kernel[grid](*self._arguments(chunk), partial, **self._constants())
        sums = partial.sum(0)
        # The batch decides, not the process group: a rank's trial of the kernels must not wait for the others.
        return distributed.all_gather(sums) if self.batch.world_size > 1 else sums

    def gradient_rows(self, a: Tensor) -> Tensor:
        """[n, K]: for every row i of this rank the sum over j of E_ij (a_i + a_j) z_j; a [N]. After `sums`.

        Needs E_ij a_i <= 1, as it is where a_i <= 1 / sums_i.
        """
        grid, chunk = self._grid()
        partial = self.z.new_empty(grid[1], self.batch.num_rows, self.width)
        _gradient_kernel[grid](*self._arguments(chunk), self._by_segment(a).contiguous(), partial, **self._constants())
        return partial.sum(0)[:, : self.z.shape[1]]

    def _by_segment(self, x: Tensor) -> Tensor:
        """x [N, ...] of all rows, in the order of the segments."""
        if self.segments == 1:
            return x
        batch = self.batch
        by_rank = x.view(batch.world_size, batch.num_views, batch.num_images, *x.shape[1:])
        return by_rank.transpose(0, 1).reshape(x.shape)

    def _grid(self) -> tuple[tuple[int, int, int], int]:
        """(blocks of rows, chunks of columns, segments), and the columns of a chunk."""
        row_blocks = triton.cdiv(self.rows_of_segment, self.tile.rows)
        column_blocks = triton.cdiv(self.columns_of_segment, self.tile.columns)
        chunks = num_chunks(row_blocks * self.segments, column_blocks, _multiprocessors(self.z.device))
        chunk = triton.cdiv(column_blocks, chunks) * self.tile.columns
        return (row_blocks, triton.cdiv(self.columns_of_segment, chunk), self.segments), chunk

    def _arguments(self, chunk: int) -> tuple[Any, ...]:
        exp2_scale = math.log2(math.e) / self.batch.temperature
        n, M = self.rows_of_segment, self.columns_of_segment
        return self._rows, self.keys, self.batch.rank * n, n, len(self.all), M, chunk, exp2_scale

    def _constants(self) -> dict[str, Any]:
        return {**constants(self.width, self.parts, self.tile), **self.tile.options()}


def constants(K: int, parts: int, tile: Tile) -> dict[str, int]:
    return {"K": K, "PARTS": parts, "TILE_ROWS": tile.rows, "TILE_COLUMNS": tile.columns}


def padded_width(K: int) -> int:
    """Rows are filled up with zeros to a width that tensor cores can load."""
    return max(16, triton.next_power_of_2(K))


def float16_parts(z: Tensor, parts: int, width: int) -> Tensor:
    """float16 [parts, N, width], whose parts add up to z [N, K], |z| <= 1."""
    rows = torch.zeros(parts, len(z), width, dtype=torch.float16, device=z.device)
    hi = rows[0, :, : z.shape[1]].copy_(z)
    if parts == 2:
        rows[1, :, : z.shape[1]].copy_(z - hi)
    return rows


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. Numbers of rows are arguments like any other: the program that the trial compiles is the training's.

_jit = triton.jit(do_not_specialize=["own_start", "n", "N", "M", "chunk"])


@triton.jit
def _load(rows, first, end, part, N, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Part `part` of the rows first .. first + BLOCK - 1 [BLOCK, K]; zeros from row `end` on."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(rows + (part * N + i[:, None]) * K + tl.arange(0, K)[None, :], mask=(i < end)[:, None], other=0.0)


@triton.jit
def _hidden_exp(s, key_i, key_j, real_j, exp2_scale):  # type: ignore[no-untyped-def]
    return tl.where((key_i[:, None] != key_j[None, :]) & real_j[None, :], tl.exp2(s * exp2_scale), 0.0)


@_jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    rows,  # [PARTS, N, K]
    keys,  # [N]
    own_start,  # of this rank's rows, in segment 0
    n,  # rows of this rank in a segment
    N,
    M,  # columns of a segment
    chunk,
    exp2_scale,
    sums,  # [chunks, n]
    K: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    segment, segments = tl.program_id(2), tl.num_programs(2)
    own_start += segment * M
    first = tl.program_id(0) * TILE_ROWS
    i = first + tl.arange(0, TILE_ROWS)
    key_i = tl.load(keys + own_start + i, mask=i < n, other=-1)
    hi_i = _load(rows, own_start + first, own_start + n, 0, N, K, TILE_ROWS)
    if PARTS == 2:
        lo_i = _load(rows, own_start + first, own_start + n, 1, N, K, TILE_ROWS)
    total = tl.zeros([TILE_ROWS], tl.float32)
    end = (segments - segment) * M
    begin = end - M + tl.program_id(1) * chunk
    for start in range(begin, min(begin + chunk, end), TILE_COLUMNS):
        j = start + tl.arange(0, TILE_COLUMNS)
        key_j = tl.load(keys + j, mask=j < end, other=-1)
        hi_j = _load(rows, start, end, 0, N, K, TILE_COLUMNS)
        s = tl.dot(hi_i, tl.trans(hi_j))
        if PARTS == 2:
            lo_j = _load(rows, start, end, 1, N, K, TILE_COLUMNS)
            s = tl.dot(lo_i, tl.trans(hi_j), s)
            s = tl.dot(hi_i, tl.trans(lo_j), s)
        total += tl.sum(_hidden_exp(s, key_i, key_j, j < end, exp2_scale), 1)
    tl.store(sums + (tl.program_id(1) * segments + segment) * n + i, total, mask=i < n)


@_jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    rows,  # [PARTS, N, K]
    keys,  # [N]
    own_start,  # of this rank's rows, in segment 0
    n,  # rows of this rank in a segment
    N,
    M,  # columns of a segment
    chunk,
    exp2_scale,
    a,  # [N]
    gradient,  # [chunks, n, K]
    K: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    segment, segments = tl.program_id(2), tl.num_programs(2)
    own_start += segment * M
    first = tl.program_id(0) * TILE_ROWS
    i = first + tl.arange(0, TILE_ROWS)
    key_i = tl.load(keys + own_start + i, mask=i < n, other=-1)
    a_i = tl.load(a + own_start + i, mask=i < n, other=0.0) * WEIGHT_SCALE
    hi_i = _load(rows, own_start + first, own_start + n, 0, N, K, TILE_ROWS)
    if PARTS == 2:
        lo_i = _load(rows, own_start + first, own_start + n, 1, N, K, TILE_ROWS)
    total = tl.zeros([TILE_ROWS, K], tl.float32)
    end = (segments - segment) * M
    begin = end - M + tl.program_id(1) * chunk
    for start in range(begin, min(begin + chunk, end), TILE_COLUMNS):
        j = start + tl.arange(0, TILE_COLUMNS)
        key_j = tl.load(keys + j, mask=j < end, other=-1)
        a_j = tl.load(a + j, mask=j < end, other=0.0) * WEIGHT_SCALE
        hi_j = _load(rows, start, end, 0, N, K, TILE_COLUMNS)
        s = tl.dot(hi_i, tl.trans(hi_j))
        if PARTS == 2:
            lo_j = _load(rows, start, end, 1, N, K, TILE_COLUMNS)
            s = tl.dot(lo_i, tl.trans(hi_j), s)
            s = tl.dot(hi_i, tl.trans(lo_j), s)
        weight = _hidden_exp(s, key_i, key_j, j < end, exp2_scale) * (a_i[:, None] + a_j[None, :])
        hi = weight.to(tl.float16)
        total = tl.dot(hi, hi_j, total)
        total = tl.dot((weight - hi.to(tl.float32)).to(tl.float16), hi_j, total)
        if PARTS == 2:
            total = tl.dot(hi, lo_j, total)
    place = ((tl.program_id(1) * segments + segment) * n + i[:, None]) * K + tl.arange(0, K)[None, :]
    tl.store(gradient + place, total / WEIGHT_SCALE, mask=(i < n)[:, None])
