"""NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", eq. 1) and its decoupled form.

For unit rows z, s_ij = z_i.z_j / temperature, E_ij = exp(s_ij). Row i has its positives p, the other views of its
image, and its negatives, all rows of other images. With P_ip = E_ip and Q_i the sum of E_ij over the *negatives*:

    L = mean over (i, p) of log(1 + Q_i / P_ip)                          two views: the paper's loss, mean of 2G rows

Since E is symmetric, the gradient for a row needs the E of that row only, and the sums Q of all rows. With V - 1
positives per row, a_i = mean_p 1 / (Q_i + P_ip) and m_ip = Q_i / (Q_i + P_ip) / (V - 1):

    dL/dz_i = 1 / (N temperature) [ sum_neg j E_ij (a_i + a_j) z_j  -  sum_p (m_ip + m_pi) z_p ]
    dL/dtemperature = -1 / (2 temperature) sum_i z_i.dL/dz_i             as L depends on z_i.z_j / temperature only

The positive is part of no sum. Where it is much larger than the negatives, the usual form, softmax minus one-hot,
subtracts nearly equal numbers and loses their digits; this form does not.

Pairs "within": the negatives of a row are all rows of other images. "across": those of the other view only, so that
two towers, images and texts, say, are compared with each other alone. E is then that of a bipartite graph, symmetric
as before: the formulas stay, the sums have fewer terms. With S the similarities [G, G] of view 0 and view 1, this is
(cross_entropy(S, arange) + cross_entropy(S.T, arange)) / 2, the loss of CLIP (Radford et al. 2021, arXiv:2103.00020).

The decoupled loss (DCL; Yeh et al. 2022, arXiv:2110.06848) leaves P out of the denominator:
L = mean of log(Q_i) - s_ip, hence a_i = 1 / Q_i and m_ip = 1 / (V - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from simclr_dist.loss import plain
from simclr_dist.loss.agreement import Settings, check_types, over_all_ranks
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.contrastive import ContrastiveLoss
from simclr_dist.loss.enumeration import Pairs
from simclr_dist.loss.implementations import Choice, Implementation, exponentials
from simclr_dist.loss.known_gradient import with_gradient


def nt_xent(
    z: Tensor,
    temperature: float | Tensor = 0.1,
    sample_ids: Tensor | Sequence[int] | None = None,
    *,
    group_ids: Tensor | Sequence[int] | None = None,
    num_views: int = 2,
    pairs: Pairs = "within",
    decoupled: bool = False,
    implementation: Implementation = "auto",
    gather_dtype: torch.dtype = torch.float32,
    row_dtype: torch.dtype = torch.float32,
    grad_reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """`NTXentLoss` as a function; the temperature may be a tensor that requires a gradient."""
    settings = Settings(num_views, implementation, gather_dtype, row_dtype, grad_reduction, pairs, decoupled)
    ids = sample_ids if group_ids is None else group_ids
    (loss, _), _ = _nt_xent(z, temperature, ids, settings)
    return loss


class NTXentLoss(ContrastiveLoss):
    """The loss of SimCLR over the global batch. Settings: see `ContrastiveLoss`.

    pairs: which rows are compared: "within" all of them, "across" those of view 0 with those of view 1 (CLIP).
    decoupled: leave the positive out of the denominator (DCL).

    Call with z [V*B, K], not normalised, all rows of view 0 first, and optionally sample_ids int64 [B]: images with
    the same id are then not negatives of each other. group_ids int64 [B], in their place, say the same of samples that
    belong together: equal texts, captions of one image. A row's own positive stays. Returns the mean over the *global*
    batch, the same number on every rank, in float32 (float64 for float64). The gradient on this rank's z is that of the
    global mean, times W for "mean": after DDP's averaging, exactly the gradient of one process with the whole batch.
    The same holds for `log_temperature` if this module is inside the one that DDP wraps.

    Raises ValueError on every rank if any rank's z, ids or settings do not fit; NonFiniteError (a ValueError) if
    any row anywhere is NaN or infinite. All ranks must call it together.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        implementation: Implementation = "auto",
        gather_dtype: torch.dtype = torch.float32,
        *,
        pairs: Pairs = "within",
        decoupled: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, implementation, gather_dtype, **settings)
        self.settings = replace(self.settings, pairs=pairs, decoupled=decoupled)
        self.masked_duplicates = torch.zeros((), dtype=torch.int64)
        """How many images of the last global batch have an id that occurs earlier in it (int64, on z's device)."""

    def forward(
        self,
        z: Tensor,
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        group_ids: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        ids = sample_ids if group_ids is None else group_ids
        (loss, self.masked_duplicates), choice = _nt_xent(z, self.temperature, ids, self.settings)
        self._note(choice)
        return loss


def _nt_xent(
    z: Tensor,
    temperature: float | Tensor,
    ids: Tensor | Sequence[int] | None,
    settings: Settings,
) -> tuple[tuple[Tensor, Tensor], Choice]:
    """(the loss, how many duplicates), and the code that was used."""
    check_types(z, temperature)

    def compute(batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        tau = batch.temperature_of(temperature)
        if batch.code == "plain":
            return plain.nt_xent(batch, tau, decoupled=settings.decoupled), batch.duplicates
        return _symmetric(batch, tau, settings.decoupled), batch.duplicates

    with torch.autocast(z.device.type, enabled=False):
        return over_all_ranks("NT-Xent", compute, z, temperature, ids, settings)


def _symmetric(batch: GlobalBatch, temperature: Tensor, decoupled: bool) -> Tensor:
    """Value and gradient by the formulas at the top of this file."""
    needs_gradient = torch.is_grad_enabled() and (batch.z.requires_grad or temperature.requires_grad)
    with torch.no_grad():
        e = exponentials(batch, "image")
        loss, a, m = _value(batch, e.sums(), e.all, decoupled)
        loss = loss.to(batch.z.dtype)
        if not needs_gradient:
            return loss
        gradient = e.gradient_rows(a)
        views = e.z.view(batch.num_views, batch.num_images, -1)
        gradient_by_view = gradient.view_as(views)
        for shift in range(1, batch.num_views):
            # m_ip of the rows, and m_pi of their positives, which are `shift` views later.
            weight = m[shift] + m[-shift].roll(-shift, dims=0)
            gradient_by_view.addcmul_(weight[..., None], views.roll(-shift, dims=0), value=-1)
        gradient *= batch.grad_scale / (batch.num_all_rows * batch.temperature)
        temperature_gradient = batch.temperature_gradient(e.z, gradient)
    return with_gradient(loss, (batch.z, gradient), (temperature, temperature_gradient))


def _value(batch: GlobalBatch, q: Tensor, z: Tensor, decoupled: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """From the sums q [N] and all rows z [N, K]: the loss, a [N], and m of this rank's rows.

    m[shift] [V, B] is for the pairs of a row and the view of its image that comes `shift` views later, cyclically;
    m[-shift] is for the view as many before. m[0] is not used.
    """
    W, V, B = batch.world_size, batch.num_views, batch.num_images
    z, q = z.view(W, V, B, -1), q.view(W, V, B)
    loss, a, m = q.new_zeros(()), torch.zeros_like(q), [q.new_empty(0)]
    has_negatives = q > 0
    for shift in range(1, V):
        s = (z * z.roll(-shift, dims=1)).sum(-1) / batch.temperature
        excess = q.log() - s
        if decoupled:  # a row without negatives adds nothing to the loss
            loss += excess.where(has_negatives, 0).mean()
            r = q.where(has_negatives, float("inf"))
            m.append(has_negatives[batch.rank].to(q.dtype))
        else:
            loss += torch.logaddexp(excess, torch.zeros_like(s)).mean()
            r = q + s.exp()
            m.append((q / r)[batch.rank])
        a += r.reciprocal()
    positives = V - 1
    return loss / positives, a.flatten() / positives, [m_shift / positives for m_shift in m]
