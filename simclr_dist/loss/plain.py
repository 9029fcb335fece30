"""The definitions, by autograd on all N x N similarities: to read, to compare with, and for small batches.

Every rank computes the whole matrix, so this costs W times what it must, and 4 N^2 bytes several times over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simclr_dist.loss.batch import GlobalBatch


def nt_xent(batch: GlobalBatch, temperature: Tensor, *, decoupled: bool, grad_scale: float) -> Tensor:
    """The mean over all pairs (row i, other view p of its image) of log(1 + Q_i / P_ip).

    P_ip = exp(s_ip), Q_i the sum of exp(s_ij) over the negatives j: all rows of other images.
    """
    similarity, image = _similarities(batch, temperature, grad_scale)
    same_image = image[:, None] == image
    hidden = same_image
    if batch.ids is not None:
        ids = batch.per_row(batch.ids)
        hidden = ids[:, None] == ids
    # The most negative finite number instead of -inf: a row without any negative then costs 0, not NaN.
    nothing = torch.finfo(similarity.dtype).min
    log_q = similarity.masked_fill(hidden, nothing).logsumexp(1)
    positive = same_image & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    s = similarity[positive].view(len(image), -1)
    if decoupled:
        return (log_q[:, None] - s).where(~hidden.all(1, keepdim=True), 0).mean()
    excess = log_q[:, None] - s
    return torch.logaddexp(excess, torch.zeros_like(excess)).mean()


def _similarities(batch: GlobalBatch, temperature: Tensor, grad_scale: float) -> tuple[Tensor, Tensor]:
    """s [N, N], and for every row the number of its image [N]."""
    z = batch.all_rows().clone()
    z[batch.own] = _ScaleGradient.apply(batch.z, grad_scale)  # type: ignore[no-untyped-call]
    image = batch.per_row(torch.arange(batch.num_images * batch.world_size, device=z.device))
    return z @ z.T / temperature.to(z), image


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
