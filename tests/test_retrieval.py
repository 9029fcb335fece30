"""Similarity, retrieval and zero-shot classification are what independent references say they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from simclr_dist.errors import DataError
from simclr_dist.evaluation import retrieval
from simclr_dist.evaluation.retrieval import (
    class_rows,
    classify,
    cosines,
    ranks_of_first_right,
    recall,
    recall_by_chance,
)
from simclr_dist.evaluation.similarity import similarity_correlation, spearman


@pytest.mark.parametrize("levels", [2, 6, 1000])
def test_spearman_is_that_of_scipy_also_where_scores_are_equal(levels: int) -> None:
    generator = np.random.default_rng(levels)
    for n in (2, 3, 10, 501):
        x, y = generator.integers(0, levels, (2, n)).astype(np.float64)
        x[:2], y[:2] = (0, 1), (1, 0)  # not all alike
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert spearman(x, x) == pytest.approx(1)
        assert spearman(x, -x) == pytest.approx(-1)


def test_similarity_is_by_cosine_and_nothing_told_apart_scores_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, 8, generator=generator)
    scores = np.random.default_rng(0).normal(size=50)
    cosines = [float(torch.dot(x, y) / x.norm() / y.norm()) for x, y in zip(a, b, strict=True)]
    assert similarity_correlation(3 * a, b, scores) == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-9)
    assert similarity_correlation(a, a.clone(), scores) == pytest.approx(0, abs=0.3)
    assert similarity_correlation(torch.ones(50, 2), torch.ones(50, 2), scores) == 0
    for wrong in (np.full(50, 2.0), np.append(scores[:49], np.nan)):
        with pytest.raises(DataError):
            similarity_correlation(a, b, wrong)


def slow_ranks(queries: np.ndarray, gallery: np.ndarray, of: np.ndarray, among: np.ndarray) -> list[int]:
    """By sorting, a right row behind the wrong ones that are as similar."""
    ranks = []
    for query, group in zip(queries, of, strict=True):
        order = sorted(range(len(gallery)), key=lambda j: (-float(query @ gallery[j]), among[j] == group))
        ranks.append([among[j] == group for j in order].index(True) + 1)
    return ranks


def test_ranks_are_those_of_sorting_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    # Of +-1 in four dimensions: products are exact, and many are equal.
    queries, gallery = (generator.choice([-1.0, 1.0], (n, 4)) for n in (37, 53))
    among = generator.integers(0, 12, 53)
    of = generator.choice(among, 37)
    want = slow_ranks(queries / 2, gallery / 2, of, among)
    similarities = cosines(*(torch.from_numpy(x).float() for x in (5 * queries, gallery)))
    groups = [torch.from_numpy(x) for x in (of, among)]
    for size in (1, 7, 64):
        monkeypatch.setattr(retrieval, "QUERIES", size)
        monkeypatch.setattr(retrieval, "ROWS", size + 2)
        assert ranks_of_first_right(similarities, *groups).tolist() == want
    found = recall(similarities, *groups)
    assert found.at_1 == np.mean(np.array(want) <= 1)
    assert found.at_10 == np.mean(np.array(want) <= 10)
    assert found.median_rank == np.median(want)
    assert recall_by_chance(*groups) == pytest.approx(np.mean([(among == group).mean() for group in of]))


def test_equal_contents_are_right_and_collapsed_features_are_last() -> None:
    rows = torch.eye(4)
    groups = torch.tensor([0, 1, 2, 2])
    swapped = rows[[0, 1, 3, 2]]  # the third finds the fourth, which says the same
    assert recall(cosines(rows, swapped), groups, groups).at_1 == 1
    assert recall(cosines(rows, swapped), torch.arange(4), torch.arange(4)).at_1 == 0.5
    collapsed = torch.ones(30, 4)
    ids = torch.arange(30)
    assert ranks_of_first_right(cosines(collapsed, collapsed), ids, ids).tolist() == [30] * 30
    with pytest.raises(DataError, match="1 of 4 queries have no right answer"):
        recall(cosines(rows, rows), torch.tensor([0, 1, 2, 9]), groups)


def test_zero_shot_means_the_prompts_of_a_class_and_takes_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts, samples = torch.randn(3, 2, 8, generator=generator), torch.randn(40, 8, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    want = []
    for c in range(3):
        first, second = (p / p.norm() for p in prompts[c])
        mean = (first + second) / 2
        want.append(mean / mean.norm())
    classes = class_rows(prompts.flatten(0, 1), 3)
    torch.testing.assert_close(classes, torch.stack(want))
    guesses = torch.stack([torch.stack([sample @ c for c in want]).argmax() for sample in samples])
    found = classify(samples, classes, labels)
    assert found.top1 == float((guesses == labels).float().mean())
    assert found.top5 == 1
    assert classify(torch.ones(4, 8), torch.ones(6, 8), torch.zeros(4, dtype=torch.int64)).top5 == 0
    with pytest.raises(DataError, match="each with its label"):
        classify(samples, classes, labels - 1)
    with pytest.raises(ValueError, match="not equally many"):
        class_rows(prompts.flatten(0, 1), 4)
