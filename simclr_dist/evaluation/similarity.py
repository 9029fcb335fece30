"""How well the cosine similarity of pairs agrees with what people said of them: Spearman's correlation, as in STS.

Agirre et al. 2012 (STS); Cer et al. 2017 (STS-B); reported as SimCSE does (Gao et al. 2021, section 5): one correlation
over all pairs, no regression on top.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.errors import DataError


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """float32 [n] on the CPU: of each row of a [n, D] with the same row of b [n, D]."""
    if a.shape != b.shape:
        raise ValueError(f"a and b must both be [n, D], found {tuple(a.shape)} and {tuple(b.shape)}")
    return F.cosine_similarity(a.float(), b.float(), dim=1).cpu()


def similarity_correlation(a: Tensor, b: Tensor, scores: NDArray[np.float64]) -> float:
    """Spearman's correlation between the cosine of a [n, D] and b [n, D], row by row, and scores [n]. See `spearman`.

    Memory: both features, and 40 bytes a pair. Time: two sorts.
    """
    return spearman(cosine(a, b).double().numpy(), scores)


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's correlation of the ranks of x [n] and y [n]; equal values share the mean of their ranks.

    Between -1 and 1. Where all of x are alike, nothing is told apart: 0. Raises DataError where y, what is to be found,
    is the same for all or has no two pairs.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x and y must both be [n], found {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("a similarity or a score is NaN or infinite")
    if len(y) < 2 or (y == y[0]).all():
        raise DataError(f"all {len(y):,} pairs have the same score: there is no order to agree with")
    if (x == x[0]).all():
        return 0.0
    a, b = (ranks - ranks.mean() for ranks in (mean_ranks(x), mean_ranks(y)))
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def mean_ranks(x: NDArray) -> NDArray[np.float64]:
    """Ranks [n] from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
