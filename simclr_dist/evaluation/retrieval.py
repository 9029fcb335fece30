"""Retrieval: does each query find its counterpart first, or among the first ten? And classification without labels.

Letters: n queries, m rows of a gallery, D their width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.errors import DataError

QUERIES, ROWS = 1024, 16_384  # compared at once: 64 MiB of similarities, and as much of what is computed from them


@dataclass(frozen=True)
class Recall:
    """Of one direction. Shares of the queries between 0 and 1."""

    at_1: float
    at_10: float
    median_rank: float
    """1: at least half of the queries find theirs first."""
    chance_at_1: float
    """What a random order reaches."""


def recall(
    queries: Tensor, gallery: Tensor, query_groups: Tensor, gallery_groups: Tensor, device: torch.device | str = "cpu"
) -> Recall:
    """See `ranks_of_first_right`, whose arguments these are."""
    ranks = ranks_of_first_right(queries, gallery, query_groups, gallery_groups, device)
    return Recall(
        at_1=float((ranks <= 1).double().mean()),
        at_10=float((ranks <= 10).double().mean()),
        median_rank=float(np.median(ranks.numpy())),
        chance_at_1=_share_of_right(query_groups, gallery_groups),
    )


@torch.no_grad()
def ranks_of_first_right(
    queries: Tensor, gallery: Tensor, query_groups: Tensor, gallery_groups: Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 [n] on the CPU: the rank, from 1, of the first right row when each query sorts the gallery by cosine.

    queries [n, D], gallery [m, D]. Groups int64 [n], [m]: a row is right for a query of the same group, so that equal
    contents, and all captions of one image, count as right. A wrong row as similar as the best right one stands before
    it: features that tell nothing apart do not score by luck.

    Memory: 1,024 x 16,384 similarities a few times (300 MiB), beside the features; the gallery is read twice for each
    1,024 queries. Time: 4 n m D operations. Raises DataError for a query whose group the gallery does not have.
    """
    if queries.shape[1:] != gallery.shape[1:]:
        raise ValueError(f"queries [n, D] and gallery [m, D] differ: {tuple(queries.shape)}, {tuple(gallery.shape)}")
    if missing := int((~torch.isin(query_groups, gallery_groups)).sum()):
        raise DataError(f"{missing:,} of {len(queries):,} queries have no right answer in the gallery")
    found = []
    for start in range(0, len(queries), QUERIES):
        part = slice(start, start + QUERIES)
        found.append(_ranks(_unit(queries[part], device), query_groups[part].to(device), gallery, gallery_groups))
    return torch.cat(found).cpu()


def _ranks(unit: Tensor, groups: Tensor, gallery: Tensor, gallery_groups: Tensor) -> Tensor:
    """The same products in both passes: what is equal there is equal here."""
    best = unit.new_full((len(unit),), -torch.inf)
    for similarity, right in _blocks(unit, groups, gallery, gallery_groups):
        best = torch.maximum(best, similarity.masked_fill_(~right, -torch.inf).amax(dim=1))
    rank = torch.ones(len(unit), dtype=torch.int64, device=unit.device)
    for similarity, right in _blocks(unit, groups, gallery, gallery_groups):
        rank += ((similarity >= best[:, None]) & ~right).sum(dim=1)
    return rank


def _blocks(unit: Tensor, groups: Tensor, gallery: Tensor, gallery_groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities of all queries with a block of the gallery, and which of them are right."""
    for start in range(0, len(gallery), ROWS):
        block = slice(start, start + ROWS)
        similarity = unit @ _unit(gallery[block], unit.device).T
        yield similarity, groups[:, None] == gallery_groups[block].to(unit.device)


def _unit(rows: Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(rows.to(device, torch.float32), dim=1)


def _share_of_right(query_groups: Tensor, gallery_groups: Tensor) -> float:
    groups, counts = gallery_groups.unique(return_counts=True)
    right = counts[torch.searchsorted(groups, query_groups)]
    return float(right.double().mean()) / len(gallery_groups)


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification


@torch.no_grad()
def class_rows(prompts: Tensor, num_classes: int) -> Tensor:
    """Unit rows [C, D]: of each class the mean of the unit rows of its prompts.

    prompts: [C * T, D], the T prompts of class 0 first. Radford et al. 2021 (CLIP), section 3.1.4.
    """
    if not num_classes or len(prompts) % num_classes:
        raise ValueError(f"{len(prompts)} prompts are not equally many for each of {num_classes} classes")
    return F.normalize(F.normalize(prompts.float(), dim=1).unflatten(0, (num_classes, -1)).mean(dim=1), dim=1)


@dataclass(frozen=True)
class ZeroShot:
    """Shares of the samples between 0 and 1 whose class was the most similar, or among the five most similar."""

    top1: float
    top5: float


@torch.no_grad()
def classify(samples: Tensor, classes: Tensor, labels: Tensor) -> ZeroShot:
    """samples [n, D], classes [C, D], labels int64 [n]. A class as similar as the right one stands before it."""
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise DataError(f"zero-shot classification needs samples of {len(classes)} classes, each with its label")
    top1 = top5 = 0
    for start in range(0, len(samples), QUERIES):
        part = slice(start, start + QUERIES)
        similarity = _unit(samples[part], "cpu") @ _unit(classes, "cpu").T
        right = similarity.gather(1, labels[part, None])
        before = (similarity >= right).sum(dim=1) - 1  # without the right one itself
        top1, top5 = top1 + int((before < 1).sum()), top5 + int((before < 5).sum())
    return ZeroShot(top1 / len(samples), top5 / len(samples))
