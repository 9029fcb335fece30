"""Sums of exp(similarity) on the GPU, one kernel per pass; the N x N similarities stay in registers.

    sums       a program holds BLOCK rows and goes through the columns:   S_i += sum_j E_ij
    gradient   the same, with a second product for each block:            g_i += sum_j E_ij (a_i + a_j) z_j

Products are made of three TF32 products each, which is as exact as float32, and accumulated in float32. With few rows
the columns are cut into chunks too, so that every multiprocessor has work; the chunks' sums are added afterwards, in a
fixed order: no atomics. Every rank sums its own rows, and an all-gather of N numbers joins the sums.

Importing this module needs triton; `implementations.py` does so on CUDA only. The kernels are compared with `Tiles`
once per process before they are used. Tests run them by triton's interpreter on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.parallel import distributed

LARGEST_WIDTH = 256
WARPS_AND_STAGES = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


def padded_width_and_block(K: int) -> tuple[int, int]:
    """K rounded up to a power of two, and the rows of a block.

    A block of rows and the blocks of columns fit into 96 KiB of shared memory on Ampere (160 KiB on Hopper).
    """
    K_padded = max(16, triton.next_power_of_2(K))
    return K_padded, 64 if K_padded <= 128 else 32


class Kernels:
    """The interface of `tiled.Tiles`, for CUDA, float32 and K <= 256."""

    def __init__(self, batch: GlobalBatch, hide: str) -> None:
        self.batch = batch
        self.z = batch.z.detach().contiguous()
        self.all = self.z
        self.K_padded, self.block = padded_width_and_block(self.z.shape[1])
        images = torch.arange(batch.num_images * batch.world_size, device=self.z.device)
        if hide == "self":
            self.keys = torch.arange(batch.num_all_rows, device=self.z.device)
        else:
            self.keys = batch.per_row(images if batch.ids is None else batch.ids)

    def sums(self) -> Tensor:
        """[N]: for every row of the global batch the sum of its E."""
        self.all = self.batch.all_rows().contiguous()
        grid, chunk = self._grid()
        partial = self.z.new_empty(grid[1], self.batch.num_rows)
        _sums_kernel[grid](*self._rows(), partial, chunk, **self._constants())
        return distributed.all_gather(partial.sum(0))

    def gradient_rows(self, a: Tensor) -> Tensor:
        """[n, K]: for every row i of this rank the sum over j of E_ij (a_i + a_j) z_j; a [N]. After `sums`."""
        grid, chunk = self._grid()
        partial = self.z.new_empty(grid[1], *self.z.shape)
        _gradient_kernel[grid](*self._rows(), a.contiguous(), partial, chunk, self.batch.own.start, **self._constants())
        return partial.sum(0)

    def _grid(self) -> tuple[tuple[int, int], int]:
        """(blocks of rows, chunks of columns), and the columns of a chunk."""
        row_blocks, column_blocks = (triton.cdiv(len(rows), self.block) for rows in (self.z, self.all))
        chunks = min(column_blocks, max(1, _multiprocessors(self.z.device) // row_blocks))
        chunk = triton.cdiv(column_blocks, chunks) * self.block
        return (row_blocks, triton.cdiv(len(self.all), chunk)), chunk

    def _rows(self) -> tuple[Any, ...]:
        exp2_scale = math.log2(math.e) / self.batch.temperature
        return self.z, self.all, self.keys[self.batch.own], self.keys, *map(len, (self.z, self.all)), exp2_scale

    def _constants(self) -> dict[str, Any]:
        return {"K": self.z.shape[1], "K_PADDED": self.K_padded, "BLOCK": self.block, **WARPS_AND_STAGES}


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _load(z, keys, first, count, K: tl.constexpr, K_PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows first .. first + BLOCK - 1: their numbers, which of them exist, z and keys."""
    i = first + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PADDED)
    real = i < count
    rows = tl.load(z + i[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
    return i, real, rows, tl.load(keys + i, mask=real, other=-1)


@triton.jit
def _exp(z_i, key_i, z_j, key_j, real_j, exp2_scale):  # type: ignore[no-untyped-def]
    e = tl.exp2(tl.dot(z_i, tl.trans(z_j), input_precision="tf32x3") * exp2_scale)
    return tl.where((key_i[:, None] != key_j[None, :]) & real_j[None, :], e, 0.0)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    own,
    all_rows,
    own_keys,
    all_keys,
    n,
    N,
    exp2_scale,
    sums,  # [chunks, n]
    chunk,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, real_i, z_i, key_i = _load(own, own_keys, tl.program_id(0) * BLOCK, n, K, K_PADDED, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, min(first + chunk, N), BLOCK):
        _, real_j, z_j, key_j = _load(all_rows, all_keys, start, N, K, K_PADDED, BLOCK)
        total += tl.sum(_exp(z_i, key_i, z_j, key_j, real_j, exp2_scale), 1)
    tl.store(sums + tl.program_id(1) * n + i, total, mask=real_i)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    own,
    all_rows,
    own_keys,
    all_keys,
    n,
    N,
    exp2_scale,
    a,  # [N]
    gradient,  # [chunks, n, K]
    chunk,
    own_start,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, real_i, z_i, key_i = _load(own, own_keys, tl.program_id(0) * BLOCK, n, K, K_PADDED, BLOCK)
    a_i = tl.load(a + own_start + i, mask=real_i, other=0.0)
    total = tl.zeros([BLOCK, K_PADDED], tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, min(first + chunk, N), BLOCK):
        j, real_j, z_j, key_j = _load(all_rows, all_keys, start, N, K, K_PADDED, BLOCK)
        a_j = tl.load(a + j, mask=real_j, other=0.0)
        weight = _exp(z_i, key_i, z_j, key_j, real_j, exp2_scale) * (a_i[:, None] + a_j[None, :])
        total += tl.dot(weight, z_j, input_precision="tf32x3")
    k = tl.arange(0, K_PADDED)
    place = (tl.program_id(1) * n + i[:, None]) * K + k[None, :]
    tl.store(gradient + place, total, mask=real_i[:, None] & (k < K)[None, :])
