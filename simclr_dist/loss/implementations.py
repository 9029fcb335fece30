"""Chooses the code that sums the exponentials: by name and device, the GPU kernels only after a trial."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.enumeration import Pairs
from simclr_dist.loss.tiled import LARGEST_EXPONENT, Tiles

Implementation = Literal["auto", "plain", "tiled", "triton"]
IMPLEMENTATIONS = ("plain", "tiled", "triton")
# Where the ranks' own choices differ, all take the first of them.
CODES = ("plain", "tiled", "tiled in float64", "triton")
LARGEST_WIDTH = 256  # of the kernels


@dataclass(frozen=True)
class Choice:
    """The code that computes a loss, what the rows are rounded to, and why it is not the kernels, if it should be."""

    code: str
    row_dtype: torch.dtype = torch.float32
    reason: str = ""

    @property
    def name(self) -> str:
        """For example "triton on bfloat16 rows"."""
        return self.code if self.row_dtype.itemsize >= 4 else f"{self.code} on {str(self.row_dtype)[6:]} rows"

    def __str__(self) -> str:
        return self.name + (f" instead of triton: {self.reason}" if self.reason else "")


class Exponentials(Protocol):
    """E_ij = exp(s_ij) of the rows of this rank against all, summed without being stored."""

    z: Tensor  # [n, K], the rows of this rank, in the dtype of the sums
    all: Tensor  # [N, K], after `sums`

    def sums(self) -> Tensor: ...

    def gradient_rows(self, a: Tensor) -> Tensor: ...


def check_name(name: str) -> None:
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {name!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")


def choose(
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype,
    width: int,
    temperature: float,
    num_all_rows: int,
    row_dtype: torch.dtype,
    pairs: Pairs = "within",
) -> Choice:
    """What `name` means for this process and a z [.., width] of `dtype`. Asks no other rank.

    "auto" is triton on CUDA, where it works, and tiled elsewhere. Where triton does not work, tiled computes the same,
    and the choice says why.
    """
    if name == "plain":
        return Choice("plain", row_dtype)
    fits = 1 / temperature + math.log(num_all_rows) <= LARGEST_EXPONENT[torch.float32]
    # The same sums with a larger range: low temperatures need no second algorithm.
    tiles = "tiled" if fits or dtype == torch.float64 else "tiled in float64"
    if name == "tiled" or (name == "auto" and device.type != "cuda"):
        return Choice(tiles, row_dtype)
    if dtype == torch.float64:
        obstacle: str | None = "z is float64, the kernels are for float32"
    elif width > LARGEST_WIDTH:
        obstacle = f"z has the width {width}, the kernels end at {LARGEST_WIDTH}"
    elif not fits:
        obstacle = f"exp(1/temperature) at temperature {temperature:g} exceeds float32"
    else:
        obstacle = obstacle_to_triton(device, width, row_dtype, pairs)
    return Choice("triton", row_dtype) if obstacle is None else Choice(tiles, row_dtype, obstacle)


@cache
def obstacle_to_triton(device: torch.device, width: int, row_dtype: torch.dtype, pairs: Pairs = "within") -> str | None:
    """Why the kernels cannot be used on this device; None if they can.

    Compiles them for rows of this width and compares them with `Tiles`, once per process. No other rank takes part.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels are for CUDA, z is on {device.type}"
    try:
        from simclr_dist.loss.triton_kernels import Kernels

        rows = torch.randn(150, width, generator=torch.Generator().manual_seed(0))
        z = torch.nn.functional.normalize(rows, dim=1).to(row_dtype).float().to(device)
        ids = torch.arange(75, device=device) // 2
        batch = GlobalBatch(z, lambda: z, ids, 0.2, 2, row_dtype=row_dtype, pairs=pairs)
        return disagreement(Kernels(batch, "image"), Tiles(batch, "image"))
    except Exception as error:  # compilers and drivers raise anything; `Tiles` is used then
        return f"{type(error).__name__}: {error}"


def disagreement(found: Exponentials, expected: Exponentials) -> str | None:
    """How the results of two implementations differ; None if they agree. For one process."""
    r, r_expected = found.sums(), expected.sums()
    a = 1 / r_expected
    for name, x, y in (("sums", r, r_expected), ("gradient", found.gradient_rows(a), expected.gradient_rows(a))):
        error = float((x - y).norm() / y.norm())
        if not error < 1e-5:
            return f"its {name} are off by {error:.1e}"
    return None


def exponentials(batch: GlobalBatch, hide: str) -> Exponentials:
    """The code that all ranks have agreed on."""
    if batch.code == "triton":
        from simclr_dist.loss.triton_kernels import Kernels

        return Kernels(batch, hide)
    return Tiles(batch, hide)
