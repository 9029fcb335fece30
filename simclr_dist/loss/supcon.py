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
from torch import Tensor

from simclr_dist.loss import plain
from simclr_dist.loss.agreement import check_types, over_all_ranks
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.contrastive import ContrastiveLoss
from simclr_dist.loss.implementations import exponentials
from simclr_dist.loss.known_gradient import with_gradient


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss over the global batch. Settings: see `ContrastiveLoss`.

    Call with z [V*B, K], not normalised, view after view, and labels [B], int64 or a list. A negative label means
    "unknown": only the image's own views are then its positives, so that data may be labelled in part. Value,
    gradient and errors as for NTXentLoss.
    """

    def forward(self, z: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
        temperature = self.temperature
        check_types(z, temperature)
        if labels is None:
            raise TypeError("SupConLoss needs labels [B]; without labels use NTXentLoss")

        def compute(batch: GlobalBatch) -> Tensor:
            return _sup_con(batch, batch.temperature_of(temperature))

        with torch.autocast(z.device.type, enabled=False):
            loss, choice = over_all_ranks("SupCon", compute, z, temperature, labels, self.settings)
        self._note(choice)
        return loss


def _sup_con(batch: GlobalBatch, temperature: Tensor) -> Tensor:
    assert batch.ids is not None
    unknown = -1 - torch.arange(len(batch.ids), device=batch.z.device)
    labels = torch.where(batch.ids < 0, unknown, batch.ids)
    ordered = labels.sort().values
    # A class goes by the first of its places in this order: nothing that the host would have to wait for.
    first, end = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    classes = batch.per_row(first)
    if batch.code == "plain":
        return plain.sup_con(batch, temperature, classes)
    return _symmetric(batch, temperature, classes, num_positives=batch.per_row((end - first) * batch.num_views - 1))


def _symmetric(batch: GlobalBatch, temperature: Tensor, classes: Tensor, num_positives: Tensor) -> Tensor:
    """classes [N], below G; num_positives [N]: how many other rows a row's class has."""
    needs_gradient = torch.is_grad_enabled() and (batch.z.requires_grad or temperature.requires_grad)
    with torch.no_grad():
        e = exponentials(batch, "self")
        r = e.sums()
        others = _class_sums(e.all, classes, batch.num_images * batch.world_size)[classes] - e.all
        num_positives = num_positives.to(r.dtype)
        s = (e.all * others).sum(1) / num_positives / batch.temperature
        loss = (r.log() - s).mean().to(batch.z.dtype)
        if not needs_gradient:
            return loss
        gradient = e.gradient_rows(r.reciprocal())
        gradient.addcdiv_(others[batch.own], num_positives[batch.own, None], value=-2)
        gradient *= batch.grad_scale / (batch.num_all_rows * batch.temperature)
        temperature_gradient = batch.temperature_gradient(e.z, gradient)
    return with_gradient(loss, (batch.z, gradient), (temperature, temperature_gradient))


def _class_sums(rows: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """[C, K], added up in a fixed order: `index_add_` on a GPU, and `index_put_` on a CPU, would do it in any."""
    sums = rows.new_zeros(num_classes, rows.shape[1])
    if rows.is_cuda:
        return sums.index_put_((classes,), rows, accumulate=True)
    return sums.index_add_(0, classes, rows)
