"""The rows of a global batch: normalised to length one, gathered from all ranks.

Letters: B images per device, V views, n = V*B rows of this rank, W ranks, N = n*W rows, G = B*W images, K the width
of z. Rank r holds the global rows r*n .. r*n + n - 1, view after view:

          rank 0            rank 1
    ┌───────┬───────┬───────┬───────┐
    │ view 0│ view 1│ view 0│ view 1│       row r*n + v*B + b is view v of image b of rank r;
    └───────┴───────┴───────┴───────┘       rows whose numbers differ by a multiple of B *inside*
      B rows  B rows  B rows  B rows        one rank show the same image
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr_dist.loss.enumeration import Pairs
from simclr_dist.parallel import distributed

SHORTEST_ROW = 1e-12  # F.normalize's; a shorter row has no direction


@dataclass
class GlobalBatch:
    """The unit rows of this rank, and a function that waits for those of all ranks."""

    z: Tensor  # [n, K], unit rows of this rank, float32 or float64, differentiable
    all_rows: Callable[[], Tensor]  # waits for the rows [N, K] of all ranks
    ids: Tensor | None  # [G]: images with the same id are no negatives of one another
    temperature: float
    num_views: int
    rank: int = 0
    world_size: int = 1
    grad_scale: float = 1.0  # factor on this rank's gradients: W where the training loop averages over ranks
    row_dtype: torch.dtype = torch.float32  # what the rows were rounded to
    code: str = "tiled"  # of implementations.CODES, the same on every rank
    pairs: Pairs = "within"

    @property
    def num_rows(self) -> int:
        return self.z.shape[0]

    @property
    def num_all_rows(self) -> int:
        return self.z.shape[0] * self.world_size

    @property
    def num_images(self) -> int:
        return self.z.shape[0] // self.num_views

    @property
    def view_of_row(self) -> Tensor:
        """[N]"""
        rows = torch.arange(self.num_all_rows, device=self.z.device)
        return rows // self.num_images % self.num_views

    @property
    def own(self) -> slice:
        """The rows of this rank within those of all ranks."""
        return slice(self.rank * self.num_rows, (self.rank + 1) * self.num_rows)

    @cached_property
    def duplicates(self) -> Tensor:
        """[], int64: how many images have an id that occurs earlier in the batch."""
        if self.ids is None:
            return torch.zeros((), dtype=torch.int64, device=self.z.device)
        return (self._sorted_ids[1:] == self._sorted_ids[:-1]).sum()

    @cached_property
    def image_keys(self) -> Tensor:
        """[G], int32: equal for images with the same id."""
        if self.ids is None:
            return torch.arange(self.num_images * self.world_size, dtype=torch.int32, device=self.z.device)
        return torch.searchsorted(self._sorted_ids, self.ids, out_int32=True)

    @cached_property
    def _sorted_ids(self) -> Tensor:
        assert self.ids is not None
        return self.ids.sort().values

    def temperature_of(self, temperature: float | Tensor) -> Tensor:
        """[], in the dtype of the rows: what a gradient of the temperature goes to."""
        # Filled in on the device: a copy would make the host wait.
        return temperature.to(self.z) if isinstance(temperature, Tensor) else self.z.new_full((), temperature)

    def temperature_gradient(self, z: Tensor, gradient: Tensor) -> Tensor:
        """[]: this rank's part of dL/dtemperature, from its rows z and dL/dz [n, K].

        As L depends on z_i.z_j / temperature only, it is -1 / (2 temperature) sum_i z_i.dL/dz_i.
        """
        return torch.dot(z.flatten(), gradient.flatten()) / (-2 * self.temperature)

    def per_row(self, per_image: Tensor) -> Tensor:
        """[G] -> [N], contiguous: the value of each image, for each of its rows."""
        by_rank = per_image.view(self.world_size, 1, self.num_images)
        # A reshape alone would repeat the value of a single image without writing it down: a kernel reads past its end.
        return by_rank.expand(-1, self.num_views, -1).reshape(-1).contiguous()


def row_lengths(z: Tensor) -> Tensor:
    """z [n, K] -> [n], float32 or float64; NaN or infinite where a number of the row is."""
    return torch.linalg.vector_norm(z.detach(), dim=1, dtype=computing_dtype(z))


def computing_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def gather_batch(
    z: Tensor,
    lengths: Tensor,
    ids: Tensor | None,
    *,
    temperature: float,
    num_views: int,
    row_dtype: torch.dtype,
    wide_ids: bool,
    grad_reduction: str,
    code: str,
    pairs: Pairs,
) -> GlobalBatch:
    """Starts gathering z [V*B, K] and ids [B]; all ranks have agreed on the rest. The host waits for nothing.

    row_dtype: what the unit rows are rounded to, and sent as, where it is narrower than z.
    """
    world = distributed.world_size()
    wait_for_ids = None
    if ids is not None:
        wait_for_ids = distributed.all_gather_async(ids.to(torch.int64 if wide_ids else torch.int32))
    dtype = computing_dtype(z)
    sent_dtype = row_dtype if row_dtype.itemsize < torch.float32.itemsize else dtype
    unit: Tensor = _UnitRows.apply(z, lengths[:, None], sent_dtype)  # type: ignore[no-untyped-call]
    wait_for_rows = distributed.all_gather_async(unit.detach() if world == 1 else unit.detach().to(sent_dtype))
    return GlobalBatch(
        unit,
        lambda: wait_for_rows().to(dtype),
        None if wait_for_ids is None else wait_for_ids(),
        temperature,
        num_views,
        distributed.rank(),
        world,
        grad_scale=distributed.world_size() if grad_reduction == "mean" else 1,
        row_dtype=row_dtype,
        code=code,
        pairs=pairs,
    )


class _UnitRows(torch.autograd.Function):
    """x / |x|, rounded to the dtype that is sent, so that every rank computes with the same numbers.

    A row of zeros has no direction: it stays zero and receives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, sent_dtype: torch.dtype) -> Tensor:
        scale = torch.where(lengths > SHORTEST_ROW, 1 / lengths, 0)
        unit = x * scale
        ctx.save_for_backward(x, scale)
        return unit.to(sent_dtype).to(unit.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        unit = x * scale  # as it was before it was rounded: the gradient stays at right angles to x
        along = (unit * grad).sum(1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale).to(x.dtype), None, None
