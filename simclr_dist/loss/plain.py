"""The definitions, by autograd on all N x N similarities: for reading, for comparisons, and for small batches.

Every rank computes the whole matrix: W times the necessary work, and several matrices of 4 N^2 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.known_gradient import scale_gradient


def nt_xent(batch: GlobalBatch, temperature: Tensor, *, decoupled: bool) -> Tensor:
    """The mean over all pairs (row i, other view p of its image) of log(1 + Q_i / P_ip).

    P_ip = exp(s_ip), Q_i the sum of exp(s_ij) over the negatives j: all rows of other images, of pairs "across" those
    of the other view.
    """
    similarity = _similarities(batch, temperature)
    image = batch.per_row(torch.arange(batch.num_images * batch.world_size, device=similarity.device))
    same_image = image[:, None] == image
    hidden = same_image
    if batch.ids is not None:
        ids = batch.per_row(batch.ids)
        hidden = ids[:, None] == ids
    if batch.pairs == "across":
        view = batch.view_of_row
        hidden = hidden | (view[:, None] == view)
    # The most negative finite number instead of -inf: a row without any negative then costs 0, not NaN.
    lowest = torch.finfo(similarity.dtype).min
    log_q = similarity.masked_fill(hidden, lowest).logsumexp(1)
    positive = same_image & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    s = similarity[positive].view(len(image), -1)
    if decoupled:
        return (log_q[:, None] - s).where(~hidden.all(1, keepdim=True), 0).mean()
    excess = log_q[:, None] - s
    return torch.logaddexp(excess, torch.zeros_like(excess)).mean()


def sup_con(batch: GlobalBatch, temperature: Tensor, classes: Tensor) -> Tensor:
    """The mean over rows i, and over the other rows p of i's class, of -log(exp(s_ip) / sum_j!=i exp(s_ij))."""
    s = _similarities(batch, temperature)
    self_ = torch.eye(len(s), dtype=torch.bool, device=s.device)
    positive = (classes[:, None] == classes) & ~self_
    log_r = s.masked_fill(self_, float("-inf")).logsumexp(1)
    return (log_r - s.where(positive, 0).sum(1) / positive.sum(1)).mean()


def _similarities(batch: GlobalBatch, temperature: Tensor) -> Tensor:
    """s [N, N], differentiable in the rows of this rank, and in the temperature."""
    # Every rank has the whole derivative by the temperature, not a part of it as by its rows.
    temperature = scale_gradient(temperature, batch.grad_scale / batch.world_size)
    z = batch.all_rows().clone()
    z[batch.own] = scale_gradient(batch.z, batch.grad_scale)
    return z @ z.T / temperature
