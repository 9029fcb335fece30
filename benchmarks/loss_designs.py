"""Three ways to NT-Xent over the ranks, with the same gradient: what each computes, sends and holds.

    ours                 sums of tiles; one all-gather of z; no collective in the backward
    gathered gradient    own rows against all columns by autograd; the gathered z's gradient is all-reduced. So do
                         lightly (gather_distributed), solo-learn and VISSL
    full logits          every rank computes all N x N; the same two collectives. So does FFCV-SSL's example

Letters: n rows of a rank, W ranks, N = n W, K the width of z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.loss import NTXentLoss
from simclr_dist.loss.agreement import HEADER_BYTES
from simclr_dist.parallel import distributed
from simclr_dist.plan.traffic import Collective

TEMPERATURE = 0.1

# Bytes read and written for each similarity by the operations of `_cross_entropy` and its backward, counted there:
# product 1; divide, mask, log-softmax 2 each; their backward 3, 2, 2; two products 2.
PASSES = 16
# How many matrices of similarities are held at once at most (tests/test_scaling.py measures it).
COPIES = 3.3154


class _Gather(torch.autograd.Function):
    """All rows of all ranks; the backward sums over the ranks what each found for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return distributed.all_gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = distributed.all_reduce_sum_(gradient.contiguous())
        n = len(gradient) // distributed.world_size()
        return total[distributed.rank() * n :][:n]


def _cross_entropy(rows: Tensor, columns: Tensor, own: Tensor, positives: Tensor) -> Tensor:
    logits = rows @ columns.T / TEMPERATURE
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, own[:, None], True)
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positives)


def gathered_gradient(z: Tensor) -> Tensor:
    """z [n, K], both views of this rank. The mean over its own rows: DDP's average makes it that of all."""
    unit = F.normalize(z, dim=1)
    own = torch.arange(len(z), device=z.device)
    first = distributed.rank() * len(z)
    return _cross_entropy(unit, _Gather.apply(unit), first + own, first + own.roll(len(z) // 2))


def full_logits(z: Tensor) -> Tensor:
    """z [n, K]. The mean over all rows, computed by every rank."""
    unit = _Gather.apply(F.normalize(z, dim=1))
    own = torch.arange(len(unit), device=z.device)
    return _cross_entropy(unit, unit, own, own.view(-1, 2, len(z) // 2).roll(1, dims=1).flatten())


@dataclass(frozen=True)
class Design:
    name: str
    implementation: Literal["tiled", "kernels", "autograd"]
    all_rows: bool  # every rank computes the rows of all
    loss: Callable[[Tensor], Tensor]

    def flops(self, n: int, W: int, K: int) -> float:
        """Floating-point operations of the matrix products of one rank, forward and backward."""
        N = n * W
        if self.implementation == "tiled":  # each pair once, then again for the gradient; the own block by its triangle
            return (4 * n * n + 5 * n * (N - n)) * K
        rows = N if self.all_rows else n
        return 6.0 * rows * N * K  # three products

    def moved_bytes(self, n: int, W: int) -> float:
        """Bytes of similarities that go to memory and back; tiles stay in the cache, kernels' in registers."""
        if self.implementation != "autograd":
            return 0.0
        return PASSES * 4.0 * (n * W if self.all_rows else n) * n * W

    def held_bytes(self, n: int, W: int, K: int) -> float:
        """The most that an autograd design holds at once: matrices of similarities, gathered z and its gradient."""
        N = n * W
        return COPIES * 4.0 * (N if self.all_rows else n) * N + 2 * 4.0 * N * K

    def collectives(self, n: int, W: int, K: int) -> list[Collective]:
        if W == 1:
            return []
        N = n * W
        z = Collective("loss: z", "all_gather", 4 * n * K)
        if self.implementation == "autograd":
            return [z, Collective("loss: gradient of z", "all_reduce", 4 * N * K)]
        agreement = Collective("loss: agreement", "all_gather", HEADER_BYTES)
        return [agreement, z, Collective("loss: sums", "all_reduce", 4 * N)]


OURS = Design("ours", "tiled", False, NTXentLoss(TEMPERATURE, "tiled"))
OURS_ON_GPU = Design("ours", "kernels", False, NTXentLoss(TEMPERATURE, "triton"))
GATHERED = Design("gathered gradient", "autograd", False, gathered_gradient)
FULL = Design("full logits", "autograd", True, full_logits)
