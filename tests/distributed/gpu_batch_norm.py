"""torch's CUDA kernels for SyncBatchNorm, written out for a CPU by what torch documents of them."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    return rows.mean(0), torch.rsqrt(rows.var(0, correction=0) + eps)


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    n = counts.sum()
    weights = (counts / n)[:, None]
    mean = (weights * means).sum(0)
    var = (weights * (1 / invstds**2 - eps + (means - mean) ** 2)).sum(0)
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var * n / (n - 1), alpha=momentum)
    return mean, torch.rsqrt(var + eps)


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return _like(x, (_rows(x) - mean) * invstd * weight + bias)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dy.stride() == x.stride()
    sum_dy = _rows(dy).sum(0)
    sum_dy_xmu = (_rows(dy) * (_rows(x) - mean)).sum(0)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32
    n = counts.sum()
    centred = _rows(dy) - sum_dy / n - (_rows(x) - mean) * invstd**2 * sum_dy_xmu / n
    return _like(x, centred * invstd * weight)


ALL = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


def _rows(x: Tensor) -> Tensor:
    """[n, C, ...] -> [n * ..., C]"""
    return x.movedim(1, -1).flatten(0, -2)


def _like(x: Tensor, rows: Tensor) -> Tensor:
    y = rows.unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)
    return torch.empty_like(x).copy_(y)
