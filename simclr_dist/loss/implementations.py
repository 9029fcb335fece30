"""Chooses the code that sums the exponentials: by name and device, the GPU kernels only after a trial."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.tiled import LARGEST_EXPONENT, Tiles

Implementation = Literal["auto", "plain", "tiled", "triton"]
IMPLEMENTATIONS = ("plain", "tiled", "triton")


class Exponentials(Protocol):
    """E_ij = exp(s_ij) of the rows of this rank against all, summed without being stored."""

    z: Tensor  # [n, K], the rows of this rank, in the dtype of the sums
    all: Tensor  # [N, K], after `sums`

    def sums(self) -> Tensor: ...

    def gradient_rows(self, a: Tensor) -> Tensor: ...


def choose(name: str, device: torch.device) -> str:
    """The implementation that `name` means on this device: "plain", "tiled" or "triton".

    "auto" is triton on CUDA, where it works, and tiled elsewhere. Where triton does not work, tiled computes the same,
    and a warning says so.
    """
    if name not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"unknown implementation {name!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if name in ("plain", "tiled") or (name == "auto" and device.type != "cuda"):
        return "tiled" if name == "auto" else name
    obstacle = obstacle_to_triton(device)
    if obstacle is None:
        return "triton"
    warnings.warn(f"the loss uses implementation 'tiled' instead of 'triton': {obstacle}", stacklevel=2)
    return "tiled"


@cache
def obstacle_to_triton(device: torch.device) -> str | None:
    """Why the kernels cannot be used on this device; None if they can. Compares them with `Tiles` once per process."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, z is on {device.type}"
    try:
        from simclr_dist.loss.triton_kernels import Kernels

        generator = torch.Generator().manual_seed(0)
        z = torch.nn.functional.normalize(torch.randn(150, 24, generator=generator).to(device), dim=1)
        ids = torch.arange(75, device=device) // 2
        batch = GlobalBatch(z, lambda: z, ids, torch.ones((), device=device), 0.2, 2, 0, 1)
        return disagreement(Kernels(batch, "image"), Tiles(batch, "image"))
    except Exception as error:  # compilers and drivers raise anything; `Tiles` is used then
        return f"{type(error).__name__}: {error}"


def disagreement(found: Exponentials, expected: Exponentials) -> str | None:
    """How the results of two implementations differ; None if they agree. For one process."""
    r, r_expected = found.sums(), expected.sums()
    rows, rows_expected = found.gradient_rows(1 / r_expected), expected.gradient_rows(1 / r_expected)
    for name, x, y in (("sums", r, r_expected), ("gradient", rows, rows_expected)):
        error = float((x - y).norm() / y.norm())
        if not error < 1e-5:
            return f"its {name} are off by {error:.1e}"
    return None


def exponentials(batch: GlobalBatch, hide: str, implementation: str) -> Exponentials:
    """The code for this batch: float64, wide z and low temperatures are tiled. All ranks choose the same."""
    if implementation == "triton" and batch.z.dtype == torch.float32:
        from simclr_dist.loss.triton_kernels import LARGEST_WIDTH, Kernels

        exponent = 1 / batch.temperature + math.log(batch.num_all_rows)
        if batch.z.shape[1] <= LARGEST_WIDTH and exponent <= LARGEST_EXPONENT[torch.float32]:
            return Kernels(batch, hide)
    return Tiles(batch, hide)
