"""Retrieval: does each query find its counterpart first, or among the first ten? And classification without labels.

Letters: n queries, m rows of a gallery, D their width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_dist.errors import DataError

Similarities = Callable[[slice, slice], Tensor]
"""Of these queries with those rows of the gallery, on any device."""

QUERIES, ROWS = 1024, 16_384  # compared at once: 64 MiB of similarities, and as much of what is computed from them


@dataclass(frozen=True)
class Recall:
    """Of one direction. Shares of the queries between 0 and 1."""

    at_1: float
    at_10: float
    median_rank: float
    """1: at least half of the queries find theirs first."""


def cosines(queries: Tensor, gallery: Tensor, device: torch.device | str = "cpu") -> Similarities:
    """Of queries [n, D] and gallery [m, D], computed on the device."""
    if queries.shape[1:] != gallery.shape[1:]:
        raise ValueError(f"queries [n, D] and gallery [m, D] differ: {tuple(queries.shape)}, {tuple(gallery.shape)}")
    return lambda rows, columns: _unit(queries[rows], device) @ _unit(gallery[columns], device).T


def recall(similarities: Similarities, query_groups: Tensor, gallery_groups: Tensor) -> Recall:
    """See `ranks_of_first_right`, whose arguments these are."""
    ranks = ranks_of_first_right(similarities, query_groups, gallery_groups)
    return Recall(
        at_1=float((ranks <= 1).double().mean()),
        at_10=float((ranks <= 10).double().mean()),
        median_rank=float(np.median(ranks.numpy())),
    )


@torch.no_grad()
def ranks_of_first_right(similarities: Similarities, query_groups: Tensor, gallery_groups: Tensor) -> Tensor:
    """int64 [n] on the CPU: the rank, from 1, of the first right row when each query sorts the gallery by similarity.

    Groups int64 [n], [m]: a row is right for a query of the same group, so that equal contents, and all texts of one
    image, count as right. A wrong row as similar as the best right one stands before it: features that tell nothing
    apart do not score by luck.

    Memory: 1,024 x 16,384 similarities a few times (300 MiB), beside the features; the gallery is read twice for each
    1,024 queries. Time: 4 n m D operations. Raises DataError for a query whose group the gallery does not have.
    """
    if missing := int((~torch.isin(query_groups, gallery_groups)).sum()):
        raise DataError(f"{missing:,} of {len(query_groups):,} queries have no right answer in the gallery")
    found = []
    for start in range(0, len(query_groups), QUERIES):
        rows = slice(start, min(start + QUERIES, len(query_groups)))

        def blocks(rows: slice = rows) -> Iterator[tuple[Tensor, Tensor]]:
            """Similarities of these queries with a block of the gallery, and which of them are right."""
            for begin in range(0, len(gallery_groups), ROWS):
                columns = slice(begin, min(begin + ROWS, len(gallery_groups)))
                found = similarities(rows, columns)
                yield found, (query_groups[rows, None] == gallery_groups[columns]).to(found.device)

        found.append(_ranks(blocks).cpu())
    return torch.cat(found)


def _ranks(blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Tensor:
    """The same products in both passes: what is equal there is equal here."""
    best = torch.stack([x.masked_fill(~right, -torch.inf).amax(dim=1) for x, right in blocks()]).amax(dim=0)
    return 1 + torch.stack([((x >= best[:, None]) & ~right).sum(dim=1) for x, right in blocks()]).sum(dim=0)


def _unit(rows: Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(rows.to(device, torch.float32), dim=1)


def recall_by_chance(query_groups: Tensor, gallery_groups: Tensor) -> float:
    """R@1 of a random order."""
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
