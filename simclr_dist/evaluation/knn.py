"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4: a test image's
k nearest training images by cosine similarity s vote for their class with weight exp(s / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.errors import DataError
from simclr_dist.evaluation.features import Features, part_of_rank
from simclr_dist.evaluation.labels import check_labels
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

BANK_ROWS = 16_384  # training rows compared at once


@dataclass(frozen=True)
class KnnResult:
    """Shares of the test images between 0 and 1 whose class was first, or among the five first, in the vote."""

    top1: float
    top5: float


def knn_top1(
    train: Features,
    test: Features,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    chunk_size: int = 1024,
    device: torch.device | str = "cpu",
) -> KnnResult:
    """Exact weighted kNN. Memory: `chunk_size` x 16,384 similarities, as many rows of the bank, and the queries.

    With several ranks each classifies its part of the test rows; all return the same result, and all raise if one of
    them fails. Raises DataError: fewer training images than k, labels that do not fit, different widths of h.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, not {k} and {temperature}")

    def count_own() -> Tensor:
        check_labels(train, test, num_classes)
        check_k(k, len(train))
        rows = torch.from_numpy(part_of_rank(len(test), distributed.rank(), distributed.world_size()))
        labels, bank_labels = test.labels[rows].to(device), train.labels.to(device)
        similarity, neighbours = nearest(test.h[rows], train.h, k, chunk_size=chunk_size, device=device)
        correct = torch.zeros(2, dtype=torch.int64, device=device)
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            votes = _votes(similarity[part], bank_labels[neighbours[part]], temperature, num_classes)
            correct += _count_correct(votes, labels[part])
        return correct

    correct = run_on_all_ranks(count_own, device, catch=Exception)
    top1, top5 = (distributed.all_reduce_sum_(correct).double() / len(test)).tolist()
    return KnnResult(top1, top5)


def check_k(k: int, num_images: int) -> None:
    """Raises DataError unless there are k training images."""
    if num_images < k:
        raise DataError(
            f"kNN with k={k} needs at least {k} training images, there are {num_images}; use a smaller k: --k "
            f"{num_images} at most, or evaluation.knn_k in a configuration"
        )


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, chunk_size: int = 1024, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [n, D] most similar to each row of `queries` [m, D] by cosine; k at most n.

    Returns similarity [m, k], falling, and rows int64 [m, k], on the device. The bank is read once, a block at a time.
    """
    unit = F.normalize(queries.to(device, torch.float32), dim=1)
    best = unit.new_empty((len(unit), 0))
    rows = torch.empty((len(unit), 0), dtype=torch.int64, device=device)
    for start in range(0, len(bank), BANK_ROWS):
        block = F.normalize(bank[start : start + BANK_ROWS].to(device, torch.float32), dim=1)
        found = [(chunk @ block.T).topk(min(k, len(block)), dim=1) for chunk in unit.split(chunk_size)]
        best = torch.cat([best, torch.cat([values for values, _ in found])], dim=1)
        rows = torch.cat([rows, torch.cat([indices for _, indices in found]) + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows


def _votes(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """The weight each class gathers, [m, C], up to a factor per row that keeps exp from overflowing."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros((len(weights), num_classes)).scatter_add_(1, labels, weights)


def _count_correct(votes: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first and among the first five, int64 [2]. A class without a vote is no guess."""
    best, classes = votes.topk(min(5, votes.shape[1]), dim=1)
    hits = (classes == labels[:, None]) & (best > 0)
    return torch.stack([hits[:, 0].sum(), hits.sum()])
