"""Weighted kNN against slow, obvious loops; odd chunk sizes; ranks. pytest tests/test_knn.py"""

from __future__ import annotations

import math

import pytest
import torch

from simclr_dist.errors import DataError
from simclr_dist.evaluation import knn
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.knn import KnnResult, knn_top1
from tests.distributed.spawn import run_ranks


def clusters(n: int, num_classes: int, seed: int, spread: float = 1.2) -> Features:
    """Overlapping clouds around the same centres for every seed."""
    centres = torch.randn(num_classes, 12, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % num_classes
    return Features(centres[labels] + spread * torch.randn(n, 12, generator=generator), labels, torch.arange(n))


def by_hand(train: Features, test: Features, k: int, temperature: float, num_classes: int) -> tuple[float, float]:
    """Wu et al. 2018, section 3.4, one image and one neighbour at a time."""
    top1 = top5 = 0
    for query, label in zip(test.h.double(), test.labels.tolist(), strict=True):
        neighbours = sorted(
            (
                (float(query @ h / (query.norm() * h.norm())), int(y))
                for h, y in zip(train.h.double(), train.labels, strict=True)
            ),
            reverse=True,
        )[:k]
        votes = dict.fromkeys(range(num_classes), 0.0)
        for similarity, y in neighbours:
            votes[y] += math.exp(similarity / temperature)
        ranking = sorted((c for c in votes if votes[c] > 0), key=lambda c: -votes[c])
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    return top1 / len(test), top5 / len(test)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.1), (20, 10.0), (60, 0.01)])
def test_equals_the_paper_by_hand(k: int, temperature: float) -> None:
    train, test = clusters(60, 7, seed=0), clusters(40, 7, seed=1)
    result = knn_top1(train, test, k=k, temperature=temperature, num_classes=7)
    assert (result.top1, result.top5) == pytest.approx(by_hand(train, test, k, temperature, 7))
    assert 0.3 < result.top1 < 1  # neither trivial nor hopeless


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
def test_chunks_do_not_change_the_result(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(60, 7, seed=0), clusters(40, 7, seed=1)
    whole = knn_top1(train, test, k=20, temperature=0.1, num_classes=7)
    monkeypatch.setattr(knn, "BANK_ROWS", 9)  # fewer than k
    assert knn_top1(train, test, k=20, temperature=0.1, num_classes=7, chunk_size=chunk_size) == whole


def test_length_of_h_does_not_matter() -> None:
    train, test = clusters(60, 7, seed=0), clusters(40, 7, seed=1)
    longer = Features(train.h * torch.logspace(-3, 3, 60)[:, None], train.labels, train.sample_ids)
    assert knn_top1(longer, test, k=9, num_classes=7) == knn_top1(train, test, k=9, num_classes=7)


def test_tiny_temperature_does_not_overflow() -> None:
    train = clusters(60, 7, seed=0)
    assert knn_top1(train, train, k=10, temperature=1e-4, num_classes=7).top1 == 1.0


def test_a_class_without_votes_is_no_guess() -> None:
    """With one neighbour there is one guess: top-5 may not be filled up with classes nobody voted for."""
    train, test = clusters(60, 7, seed=0), clusters(40, 7, seed=1)
    result = knn_top1(train, test, k=1, num_classes=7)
    assert result.top5 == result.top1


def _knn_on_rank(rank: int, world_size: int, n: int) -> KnnResult:
    return knn_top1(clusters(60, 7, seed=0), clusters(n, 7, seed=1), k=20, num_classes=7, chunk_size=5)


@pytest.mark.distributed
@pytest.mark.parametrize("n", [40, 7])
def test_ranks_agree_with_one_process(n: int) -> None:
    alone = knn_top1(clusters(60, 7, seed=0), clusters(n, 7, seed=1), k=20, num_classes=7)
    assert run_ranks(4, _knn_on_rank, n) == [alone] * 4


def test_fewer_images_than_k_is_refused() -> None:
    with pytest.raises(DataError, match="k=200 needs at least 200 training images, there are 60; use a smaller k"):
        knn_top1(clusters(60, 7, seed=0), clusters(40, 7, seed=1), num_classes=7)


def relabelled(features: Features, labels: torch.Tensor) -> Features:
    return Features(features.h, labels, features.sample_ids)


def test_labels_that_do_not_fit_are_refused() -> None:
    train, test = clusters(60, 7, seed=0), clusters(40, 7, seed=1)
    with pytest.raises(DataError, match=r"test images have label 6, but there are 5 classes"):
        knn_top1(relabelled(train, train.labels % 5), test, k=5, num_classes=5)
    with pytest.raises(DataError, match=r"60 of 60 training images have no label"):
        knn_top1(relabelled(train, torch.full((60,), -1)), test, k=5, num_classes=7)
    with pytest.raises(DataError, match=r"classes without any training image: 5, 6"):
        knn_top1(relabelled(train, train.labels % 5), test, k=5, num_classes=7)
    with pytest.raises(DataError, match=r"at least 2 classes"):
        knn_top1(relabelled(train, train.labels * 0), relabelled(test, test.labels * 0), k=5, num_classes=1)
    narrow = Features(test.h[:, :5], test.labels, test.sample_ids)
    with pytest.raises(DataError, match=r"width 12, test features 5"):
        knn_top1(train, narrow, k=5, num_classes=7)
