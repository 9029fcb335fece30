"""Has a training made given weights better or worse? What h is like at the start, and what has become of it.

With labelled test images, by kNN. Always also by figures that need no labels, on the same images every time: the
effective rank of h, its uniformity, and how many of the nearest neighbours at the start are neighbours still.

Letters: n images, k neighbours, D width of h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_dist.config import Precision
from simclr_dist.evaluation.features import extract_features_distributed
from simclr_dist.evaluation.knn import nearest
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.health.figures import Alarm, rankme, uniformity
from simclr_dist.kinds import Kind
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks

IMAGES, QUERIES, NEIGHBOURS = 1000, 200, 10
SMALLEST = 20  # of fewer images no figure means anything
LOST_RANK = 0.5
REMEDY = (
    "Usual causes where weights were good already: a learning rate too high for them (optim.base_lr), too long a "
    "training on too few images, augmentations that hide what matters; model.freeze keeps layers as they are"
)


@dataclass(frozen=True)
class Likeness:
    """What h is like on the chosen images; `neighbours` [q, k]: the numbers of the nearest images of some of them."""

    images: str
    """Their fingerprint."""
    rankme: float
    uniformity: float
    neighbours: tuple[tuple[int, ...], ...]
    image_size: int | None = None
    """Side in pixels; None: not written down, by release 0.1."""

    def to_record(self) -> dict[str, Any]:
        rows = [" ".join(map(str, row)) for row in self.neighbours]
        return {
            "images": self.images,
            "rankme": self.rankme,
            "uniformity": self.uniformity,
            "neighbours": rows,
            "image_size": self.image_size,
        }

    @classmethod
    def from_record(cls, record: Any) -> Likeness | None:
        try:
            rows = tuple(tuple(map(int, row.split())) for row in record["neighbours"][:QUERIES])
            size = record.get("image_size")
            found = cls(str(record["images"]), float(record["rankme"]), float(record["uniformity"]), rows, size)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if math.isfinite(found.rankme) and math.isfinite(found.uniformity) else None


def likeness(
    encoder: nn.Module, kind: Kind, *, batch_size: int, precision: Precision, device: torch.device
) -> Likeness | None:
    """Of IMAGES images of data.test (or data.train), evenly spread. All ranks together. None: too few images."""
    source = kind.data.test or kind.data.train
    info = run_on_all_ranks(lambda: kind.describe(source), device, catch=Exception)
    n = min(IMAGES, info.num_samples)
    ids = np.arange(n, dtype=np.int64) * info.num_samples // n
    load = ReadableImages(kind, source, batch_size)
    features = extract_features_distributed(
        encoder, load, ids, device=device, precision=precision, normalize=kind.to_input
    )
    if len(features) < SMALLEST:
        return None
    return Likeness(
        info.content_fingerprint,
        float(rankme(features.h)),
        float(uniformity(features.h[None].double())),
        tuple(_neighbours(features.h, features.sample_ids)),
        kind.data.image_size,
    )


def _neighbours(h: Tensor, sample_ids: Tensor) -> list[tuple[int, ...]]:
    """Of QUERIES images, evenly spread: the query, then the numbers of its neighbours."""
    queries = torch.arange(min(QUERIES, len(h))) * len(h) // min(QUERIES, len(h))
    _, rows = nearest(h[queries], h, min(NEIGHBOURS + 1, len(h)))
    found = []
    for query, row in zip(queries.tolist(), rows.tolist(), strict=True):
        others = [i for i in row if i != query][:NEIGHBOURS]
        found.append(tuple(int(sample_ids[i]) for i in (query, *others)))
    return found


def neighbours_kept(start: Likeness, now: Likeness) -> float | None:
    """The share of neighbours at the start that are neighbours still; None where no query is in both."""
    then = {row[0]: set(row[1:]) for row in start.neighbours if len(row) > 1}
    shares = [len(then[row[0]] & set(row[1:])) / len(then[row[0]]) for row in now.neighbours if row[0] in then]
    return sum(shares) / len(shares) if shares else None


class DriftGuard:
    """Compares with the start, which it keeps in `origin` (TrainState.started_from): with it in every checkpoint."""

    def __init__(self, origin: dict[str, Any]) -> None:
        self._origin = origin
        self._knn, self._rank = Alarm(1), Alarm(1)

    def begin(self, found: Likeness | None) -> dict[str, float]:
        """Figures by TensorBoard tag."""
        if found is None:
            return {}
        self._origin["likeness"] = found.to_record()
        return {"drift/h_rankme": found.rankme, "drift/h_uniformity": found.uniformity, "drift/neighbours_kept": 1.0}

    def compare(self, now: Likeness | None) -> tuple[dict[str, float], str]:
        """Figures by TensorBoard tag, and a warning; empty where there is nothing to say."""
        start = Likeness.from_record(self._origin.get("likeness"))
        if now is None:
            return {}, ""
        figures = {"drift/h_rankme": now.rankme, "drift/h_uniformity": now.uniformity}
        if start is None or start.images != now.images or start.image_size not in (None, now.image_size):
            return figures, ""
        if (kept := neighbours_kept(start, now)) is not None:
            figures["drift/neighbours_kept"] = kept
        if not self._rank.rings(now.rankme < LOST_RANK * start.rankme):
            return figures, ""
        kept_text = "" if kept is None else f"; {kept:.0%} of nearest neighbours are those of the start"
        return figures, (
            f"h has become poorer than that of the weights that the run began with: it uses {now.rankme:.1f} "
            f"dimensions (effective rank), at the start {start.rankme:.1f}{kept_text}. {REMEDY}"
        )

    def begin_knn(self, top1: float) -> None:
        self._origin["knn_top1"] = top1

    def compare_knn(self, top1: float, record: Mapping[str, Any]) -> str:
        """A warning where kNN is worse than at the start by more than chance; record: of this evaluation."""
        start, images = self._origin.get("knn_top1"), record.get("test_images")
        if not isinstance(start, int | float) or not isinstance(images, int):
            return ""
        chance = 2 * math.sqrt(max(start * (1 - start), 0.0) / max(images, 1))  # two standard errors
        if not self._knn.rings(top1 < start - chance):
            return ""
        return (
            f"kNN top-1 is {top1:.2%}, worse than the {start:.2%} of the weights that the run began with, by "
            f"{100 * (start - top1):.2f} points. {REMEDY}"
        )
