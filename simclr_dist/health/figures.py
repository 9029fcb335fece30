"""Numbers that tell whether contrastive learning goes well: pure functions of h, z, gradients and BatchNorm.

Letters: M images, V views of each, K width of z, D width of h. z_i are unit rows, s_ij = z_i.z_j.

    alignment, uniformity    Wang & Isola 2020, arXiv:2005.10242, eq. 1 and 2 (alpha = 2, t = 2)
    contrastive_accuracy     the instance discrimination of Wu et al. 2018, arXiv:1805.01978, among M images
    neighbours_shared        the mutual nearest neighbours of Huh et al. 2024, arXiv:2405.07987, appendix
    rankme                   Garrido et al. 2023, arXiv:2210.02885, eq. 1; the effective rank of Roy & Vetterli 2007
    lidar                    Thilak et al. 2023, arXiv:2312.04000, eq. 4 and 5
    alpha_req                Agrawal et al. 2022, "alpha-ReQ", NeurIPS, section 3: the decay of h's covariance
    spread                   Chen & He 2021, arXiv:2011.10566, section 4.1: 0 where everything has collapsed
    gradient_disagreement    the noise over signal of McCandlish et al. 2018, arXiv:1812.06162, between ranks
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BatchNorm = nn.modules.batchnorm._BatchNorm

# ---------------------------------------------------------------------------------------------------------------------
# What the loss sees


@dataclass(frozen=True)
class Similarities:
    """Cosines of all rows: positives [V*M, V-1], with the other views; negatives [V*M, ...], with all other rows that
    the loss compares a row with, NaN where such a row is of its group.
    """

    positives: Tensor
    negatives: Tensor


def similarities(z: Tensor, *, across: bool = False, groups: Tensor | None = None) -> Similarities:
    """z [V, M, K], not necessarily of length one, M >= 2.

    across: negatives are rows of another view only. groups [M]: rows of one group are no negatives of one another.
    """
    V, M, _ = z.shape
    n = V * M
    rows = F.normalize(z.flatten(0, 1), dim=1)
    s = (rows @ rows.T).clamp_(-1, 1)  # rounding may leave the interval
    row = torch.arange(n, device=z.device)
    same = row[:, None] % M == row % M
    compared = ~same
    if across:
        compared &= row[:, None] // M != row // M
    negatives = s
    if groups is not None:
        of_row = groups.repeat(V)
        negatives = s.masked_fill(of_row[:, None] == of_row, math.nan)
    return Similarities(s[same.fill_diagonal_(False)].view(n, V - 1), negatives[compared].view(n, -1))


def contrastive_accuracy(found: Similarities, k: int) -> Tensor:
    """The share of positives that come before all but k - 1 of their row's negatives. A tie counts against the
    positive: where everything is alike, nothing has been found.
    """
    ahead = [(found.negatives >= positive[:, None]).sum(1) for positive in found.positives.T]
    return (torch.stack(ahead) < k).float().mean()


def alignment(found: Similarities) -> Tensor:
    """The mean squared distance of positives on the unit sphere; 0 is perfect."""
    return (2 - 2 * found.positives).mean()


def uniformity(z: Tensor) -> Tensor:
    """log of the mean over pairs of different images of exp(-2 distance^2), mean over views; -4 + 2/K is near perfect,
    0 is collapse. z [V, M, K].
    """
    z = F.normalize(z, dim=2)
    potentials = (4 * (z @ z.mT) - 4).exp()
    potentials.diagonal(dim1=1, dim2=2).zero_()
    M = z.shape[1]
    return (potentials.sum((1, 2)) / (M * (M - 1))).log().mean()


# ---------------------------------------------------------------------------------------------------------------------
# How much room the representation takes


def rankme(x: Tensor) -> Tensor:
    """exp of the entropy of the singular values of x [M, d], between 1 and min(M, d)."""
    x = x.double()
    singular = torch.linalg.eigvalsh(_smaller_gram(x)).clamp_min(0).sqrt()
    return _effective_rank(singular)


def _smaller_gram(x: Tensor) -> Tensor:
    """Has the squares of the singular values of x [M, d] as its eigenvalues."""
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


def _effective_rank(spectrum: Tensor) -> Tensor:
    """exp of the entropy of a spectrum's shares."""
    p = spectrum / spectrum.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return (-(p * p.log()).sum()).exp()


def lidar(x: Tensor) -> Tensor:
    """RankMe among images, in units of how much the views of an image differ: x [V, M, d], between 1 and d.

    exp of the entropy of the eigenvalues of S_w^-1/2 S_b S_w^-1/2. S_b [d, d]: the covariance of the M images' mean
    views; S_w: the mean over images of the covariance of their views, with 1e-4 of its mean variance added on the
    diagonal (the paper adds 1e-4 itself, whatever the features' scale). Wants V >= 4, and V M several times d.
    """
    x = x.double()
    centres = x.mean(0)
    within = (x - centres).flatten(0, 1)
    between = centres - centres.mean(0)
    S_w, S_b = within.T @ within / len(within), between.T @ between / len(between)
    least = 1e-9 * S_b.diagonal().mean() + torch.finfo(torch.float64).tiny  # where views do not differ at all
    S_w.diagonal().add_(1e-4 * S_w.diagonal().mean() + least)
    # The same eigenvalues as those of L^-1 S_b L^-T, where S_w = L L^T.
    L = torch.linalg.cholesky(S_w)
    half = torch.linalg.solve_triangular(L, S_b, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return _effective_rank(torch.linalg.eigvalsh(whitened).clamp_min(0))


def alpha_req(x: Tensor) -> Tensor:
    """a, where the eigenvalues of the covariance of x [M, d] fall as i^-a; near 1 is said to be good.

    Fitted by least squares of logarithms to the eigenvalues from number min(10, d/8) to min(100, d/2), d at most M: the
    first are those of a few strong directions, the last are noise. Not finite where these are 0.
    """
    x = x.double() - x.double().mean(0)
    d = min(x.shape)
    eigenvalues = torch.linalg.eigvalsh(_smaller_gram(x)).flip(0)
    first, last = max(min(10, d // 8), 1), min(max(min(100, d // 2), 3), d)
    fallen = eigenvalues[first - 1 : last].log()
    i = torch.arange(first, last + 1, device=x.device, dtype=torch.float64).log()
    i = i - i.mean()
    return -(i @ (fallen - fallen.mean())) / (i @ i)


def neighbours_shared(a: Tensor, b: Tensor, k: int = 10) -> Tensor:
    """[M]: of each row's k nearest other rows by cosine in a [M, d], the share that is so in b [M, d'] too.

    a and b are of the same M images: two of their views, or two encoders. Unrelated ones share k / (M - 1).
    """
    first, second = (_nearest_others(x, k) for x in (a, b))
    return (first[:, :, None] == second[:, None]).any(2).float().mean(1)


def _nearest_others(x: Tensor, k: int) -> Tensor:
    unit = F.normalize(x, dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(min(k, len(x) - 1), dim=1).indices


def spread(x: Tensor) -> Tensor:
    """Standard deviation of each dimension of the directions of x [M, d], times sqrt(d), [d]: 1 everywhere if they
    are spread evenly around 0, and 0 everywhere if all are the same.
    """
    return F.normalize(x, dim=1).std(0, correction=0) * math.sqrt(x.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@contextmanager
def local_gradient_norm(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The norm of the gradients that a backward inside yields on this rank, before DDP averages them over ranks.

    Afterwards the list holds one number per parameter that took part; `norm_of` joins them. In several backward
    passes the last one counts, with what the earlier ones have left in `.grad`.
    """
    parameters = [p for p in parameters if p.requires_grad]
    norms: dict[int, Tensor] = {}
    found: list[Tensor] = []

    def measure(at: int, p: nn.Parameter) -> None:
        def hook(gradient: Tensor) -> None:
            try:
                norms[at] = _norm((gradient if p.grad is None else p.grad + gradient).detach())
            except Exception:  # such as too little memory: the figure is lost, the backward goes on
                norms[at] = gradient.new_tensor(math.nan)

        handles.append(p.register_hook(hook))  # runs before the gradient reaches .grad and DDP

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for at, p in enumerate(parameters):
        measure(at, p)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.extend(norms[at] for at in sorted(norms))


def _norm(x: Tensor) -> Tensor:
    """In float32 at least: squares of float16 numbers overflow."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def norm_of(norms: Sequence[Tensor]) -> Tensor:
    """The norm of the whole from the norms of its parts."""
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def gradient_disagreement(local_norms: Tensor, averaged_norm: Tensor) -> Tensor:
    """mean over ranks of |g_r - g|^2 / |g|^2, where g is the mean of the ranks' gradients g_r: 0 if all agree.

    local_norms [W] of g_r, averaged_norm [] of g.
    """
    return (local_norms.square().mean() / averaged_norm.square() - 1).clamp_min(0)


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm


def tracking_norms(model: nn.Module) -> list[BatchNorm]:
    """The BatchNorms that keep running statistics as an exponential average."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats and m.momentum]


def running_statistics(norms: Sequence[BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """Copies of each one's running mean and variance [C]."""
    return [(m.running_mean.clone(), m.running_var.clone()) for m in norms]  # type: ignore[union-attr]


def batch_norm_drift(norms: Sequence[BatchNorm], before: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """How far the last batch's statistics lie from the running ones `before` it, in the worst layer: the distance of
    means in standard deviations (root mean square over channels), and the mean of |ln(ratio of variances)|.

    The batch's statistics follow from the step that the running ones made: running += momentum (batch - running).
    """
    shifts, ratios = [], []
    for norm, (mean, var) in zip(norms, before, strict=True):
        assert norm.momentum is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean_step, var_step = (norm.running_mean - mean) / norm.momentum, (norm.running_var - var) / norm.momentum
        shifts.append((mean_step / (var + norm.eps).sqrt()).square().mean().sqrt())
        ratios.append((((var + var_step).clamp_min(0) + norm.eps) / (var + norm.eps)).log().abs().mean())
    return torch.stack(shifts).amax(), torch.stack(ratios).amax()


# ---------------------------------------------------------------------------------------------------------------------
# Histograms and alarms


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; `upper_edges[i]` ends the i-th."""

    low: float
    high: float
    total: float
    total_of_squares: float
    upper_edges: list[float]
    counts: list[float]


def histogram(values: Tensor, low: float = -1.0, high: float = 1.0, bins: int = 64) -> Histogram:
    """Of values between low and high."""
    counts = torch.histc(values, bins, low, high)
    smallest, largest, total, squares = torch.stack(
        [values.amin(), values.amax(), values.sum(), values.square().sum()]
    ).tolist()
    edges = torch.linspace(low, high, bins + 1)[1:].tolist()
    return Histogram(smallest, largest, total, squares, edges, counts.tolist())


class Alarm:
    """Rings once an episode: when something has been bad `patience` times in a row; armed again after one good time."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._bad_times = 0

    def rings(self, bad: bool) -> bool:
        self._bad_times = self._bad_times + 1 if bad else 0
        return self._bad_times == self.patience
