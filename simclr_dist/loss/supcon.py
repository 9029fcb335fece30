"""Supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362, eq. 2, "L_out"), on the tiles of NT-Xent.

All rows of the same class are positives, and every other row is in the denominator. With R_i the sum of E_ij over
all j != i, c_i the number of rows of i's class, S_c the sum of their z:

    L = mean over i of log R_i - z_i.(S_c - z_i) / (temperature (c_i - 1))
    dL/dz_i = 1 / (N temperature) [ sum_j!=i E_ij (1/R_i + 1/R_j) z_j  -  2 / (c_i - 1) (S_c - z_i) ]

The positives thus cost two passes over z, not an N x N mask. With one image per class and two views it is NT-Xent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simclr_dist.loss import plain
from simclr_dist.loss.agreement import Settings, check_types, over_all_ranks
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.implementations import Choice, Implementation, exponentials
from simclr_dist.loss.known_gradient import with_gradient


class SupConLoss(nn.Module):
    """Supervised contrastive loss over the global batch.

    Call with z [V*B, K], not normalised, view after view, and labels [B], int64 or a list. A negative label means
    "unknown": only the image's own views are then its positives, so that data may be labelled in part. Arguments,
    value, gradient and errors as for NTXentLoss.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        implementation: Implementation = "auto",
        gather_dtype: torch.dtype = torch.float32,
        *,
        num_views: int = 2,
        row_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.settings = Settings(num_views, implementation, gather_dtype, row_dtype)
        self.choice: Choice | None = None
        """The code that computed the last loss, and why."""

    def forward(self, z: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
        check_types(z, self.temperature)
        if labels is None:
            raise TypeError("SupConLoss needs labels [B]; without labels use NTXentLoss")
        with torch.autocast(z.device.type, enabled=False):
            loss, self.choice = over_all_ranks("SupCon", _sup_con, z, self.temperature, labels, self.settings)
        return loss


def _sup_con(batch: GlobalBatch) -> Tensor:
    assert batch.ids is not None
    unknown = -1 - torch.arange(len(batch.ids), device=batch.z.device)
    classes = batch.per_row(torch.where(batch.ids < 0, unknown, batch.ids))
    return plain.sup_con(batch, classes) if batch.code == "plain" else _symmetric(batch, classes)


def _symmetric(batch: GlobalBatch, classes: Tensor) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and batch.z.requires_grad
    with torch.no_grad():
        e = exponentials(batch, "self")
        r = e.sums()
        _, index, size = classes.unique(return_inverse=True, return_counts=True)
        class_sums = e.z.new_zeros(len(size), e.z.shape[1]).index_add_(0, index, e.all)
        others = class_sums[index] - e.all
        num_positives = (size[index] - 1).to(r.dtype)
        s = (e.all * others).sum(1) / num_positives / batch.temperature
        loss = (r.log() - s).mean().to(batch.z.dtype)
        if not needs_gradient:
            return loss
        gradient = e.gradient_rows(r.reciprocal())
        gradient -= 2 * others[batch.own] / num_positives[batch.own, None]
        gradient *= batch.grad_scale / (batch.num_all_rows * batch.temperature)
    return with_gradient(loss, (batch.z, gradient))
