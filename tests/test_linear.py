"""The linear probe against scikit-learn, and that it never learns from test images. pytest tests/test_linear.py"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_dist.errors import DataError
from simclr_dist.evaluation import linear
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.labels import split_by_class
from simclr_dist.evaluation.linear import _Curvature, _Fit, _Progress, _Rows, _standardisation, linear_probe
from tests.distributed.spawn import run_ranks


def teacher(n: int, seed: int, num_classes: int = 4, D: int = 24, noise: float = 1.0) -> Features:
    """Correlated features of very different scales; labels from one fixed linear teacher plus noise."""
    fixed = torch.Generator().manual_seed(11)
    mix = torch.randn(D, D, generator=fixed)
    to_logits = torch.randn(D, num_classes, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, D, generator=generator)
    labels = (z @ to_logits + noise * torch.randn(n, num_classes, generator=generator)).argmax(dim=1)
    return Features((z @ mix).relu() * torch.logspace(-2, 2, D) + 3, labels, torch.arange(n))


def standardised(train: Features, test: Features) -> tuple[torch.Tensor, torch.Tensor]:
    deviation, mean = torch.std_mean(train.h, dim=0, correction=0)
    return (train.h - mean) / deviation, (test.h - mean) / deviation


@pytest.mark.parametrize("weight_decay", [1.0, 1e-2, 1e-4])
def test_lbfgs_finds_the_minimum_that_scikit_learn_finds(weight_decay: float) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train = teacher(400, seed=0)
    x, _ = standardised(train, train)
    zeros = _Fit(torch.zeros(24, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    rows = _Rows(train, None, *_standardisation(train.h, "cpu"), 4, "cpu", shared=True)
    fit = _Curvature(rows).fit(rows, weight_decay, zeros, linear.FINAL_TOLERANCE, _Progress(None))

    reference = sklearn.LogisticRegression(C=1 / (len(train) * weight_decay), tol=1e-10, max_iter=20_000)
    reference.fit(x.double().numpy(), train.labels.numpy())
    weight = torch.from_numpy(reference.coef_.T)
    bias = torch.from_numpy(reference.intercept_)

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> float:
        data_loss = F.cross_entropy(x.double() @ weight + bias, train.labels)
        return float(data_loss + weight_decay / 2 * weight.square().sum())

    assert objective(fit.weight, fit.bias) == pytest.approx(objective(weight, bias), rel=1e-6)
    torch.testing.assert_close(fit.weight, weight, atol=2e-3, rtol=2e-3)


def test_accuracy_equals_scikit_learn_at_the_chosen_weight_decay() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test = teacher(600, seed=0), teacher(400, seed=1)
    result = linear_probe(train, test, num_classes=4)
    x, x_test = standardised(train, test)
    reference = sklearn.LogisticRegression(C=1 / (len(train) * result.weight_decay), tol=1e-8, max_iter=20_000)
    reference.fit(x.double().numpy(), train.labels.numpy())
    assert result.top1 == pytest.approx(reference.score(x_test.double().numpy(), test.labels.numpy()), abs=0.0051)
    assert result.top5 == 1.0  # four classes
    assert 0.6 < result.top1 < 1


def test_sgd_comes_close_to_lbfgs() -> None:
    train, test = teacher(600, seed=0), teacher(400, seed=1)
    exact = linear_probe(train, test, num_classes=4)
    assert linear_probe(train, test, num_classes=4, method="sgd").top1 == pytest.approx(exact.top1, abs=0.03)


@pytest.mark.parametrize("method", ["lbfgs", "sgd"])
def test_test_images_do_not_touch_the_classifier(method: Literal["lbfgs", "sgd"]) -> None:
    train, test = teacher(200, seed=0), teacher(100, seed=1)
    other = Features(test.h * -5, test.labels.flip(0), test.sample_ids)
    first = linear_probe(train, test, num_classes=4, method=method)
    second = linear_probe(train, other, num_classes=4, method=method)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.weight_decay == second.weight_decay


def test_same_seed_same_result_and_reported_accuracy_is_that_of_predict() -> None:
    train, test = teacher(200, seed=0), teacher(100, seed=1)
    first, second = (linear_probe(train, test, num_classes=4, seed=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert (first.predict(test.h).argmax(dim=1) == test.labels).double().mean().item() == first.top1


def test_weight_decay_is_strong_where_features_say_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = Features(torch.randn(200, 64, generator=generator), torch.arange(200) % 4, torch.arange(200))
    told = teacher(600, seed=0, noise=0.0)
    assert linear_probe(noise, noise, num_classes=4).weight_decay > 0.05
    assert linear_probe(told, told, num_classes=4).weight_decay < 0.05


def test_constant_features_are_harmless() -> None:
    train, test = teacher(200, seed=0), teacher(100, seed=1)
    padded = [
        Features(torch.cat([f.h, torch.full((len(f), 2), 7.0)], dim=1), f.labels, f.sample_ids) for f in (train, test)
    ]
    result = linear_probe(*padded, num_classes=4)
    assert result.top1 == pytest.approx(linear_probe(train, test, num_classes=4).top1, abs=0.021)
    assert torch.isfinite(result.weight).all()


def test_more_rows_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = teacher(200, seed=0), teacher(100, seed=1)
    whole = linear_probe(train, test, num_classes=4)
    monkeypatch.setattr(linear, "CHUNK_BYTES", 33 * 4 * 24)
    torch.testing.assert_close(linear_probe(train, test, num_classes=4).weight, whole.weight, atol=1e-3, rtol=1e-3)


def test_a_sweep_on_a_sample_chooses_as_one_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = teacher(4000, seed=0), teacher(1000, seed=1)
    whole = linear_probe(train, test, num_classes=4)
    monkeypatch.setattr(linear, "SWEEP_WORK", 900 * 24 * 4)  # a quarter of the images
    sampled = linear_probe(train, test, num_classes=4)
    assert sampled.weight_decay != whole.weight_decay
    assert 0.1 < sampled.weight_decay / whole.weight_decay < 10
    assert sampled.top1 == pytest.approx(whole.top1, abs=0.005)


def _probe_of_rank(rank: int, world_size: int) -> tuple[bytes, float, list[float]]:
    linear.SWEEP_WORK, linear.CHUNK_BYTES = 900 * 24 * 4, 100 * 4 * 24
    result = linear_probe(teacher(1501, seed=0), teacher(100, seed=1), num_classes=4)
    return result.weight.numpy().tobytes(), result.weight_decay, [result.top1, *result.weight.flatten().tolist()]


def _standardise_on_rank(rank: int, world_size: int, n: int) -> tuple[int, bytes, Any]:
    """Rows that were read, and the result as bytes and as numbers."""
    linear.CHUNK_BYTES = 100 * 8 * 3
    h, read = hard_to_standardise(n), [0]
    original = linear._moments

    def counted(part: torch.Tensor, device: Any) -> torch.Tensor:
        read[0] += len(part)
        return original(part, device)

    linear._moments = counted
    found = torch.stack(_standardisation(h, "cpu"))
    return read[0], found.numpy().tobytes(), found.numpy()


def hard_to_standardise(n: int) -> torch.Tensor:
    """Means far above the deviations, and a column that does not vary."""
    h = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01, 0.0])
    return h + torch.tensor([1e4, -3.0, 7.0])


@pytest.mark.distributed
def test_ranks_share_the_reading_of_mean_and_deviation() -> None:
    for n, parts in ((2000, [667, 667, 666]), (2, [1, 1, 0])):
        h = hard_to_standardise(n).double()
        ranks = run_ranks(3, _standardise_on_rank, n)
        assert [rows for rows, *_ in ranks] == parts
        assert len({exact for _, exact, _ in ranks}) == 1
        mean, scale = ranks[0][2]
        np.testing.assert_allclose(mean, h.mean(dim=0).numpy(), rtol=1e-7)
        np.testing.assert_allclose(scale[:2], 1 / h.std(dim=0, correction=0).numpy()[:2], rtol=1e-6)
        assert scale[2] == 0


def test_ranks_share_the_rows_and_find_what_one_process_finds() -> None:
    alone = _probe_of_rank(0, 1)
    ranks = run_ranks(3, _probe_of_rank)
    assert len({(weight, decay) for weight, decay, _ in ranks}) == 1
    assert ranks[0][1] == alone[1]
    assert ranks[0][2] == pytest.approx(alone[2], abs=1e-4)


def test_features_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision features in a file are read a chunk at a time: no tensor of their size is ever made."""
    train, test = teacher(3000, seed=0), teacher(100, seed=1)
    np.save(tmp_path / "h.npy", train.h.half().numpy())
    mapped = replace(train, h=torch.from_numpy(np.load(tmp_path / "h.npy", mmap_mode="c")))
    monkeypatch.setattr(linear, "CHUNK_BYTES", 100 * 4 * 24)
    monkeypatch.setattr(linear, "HELD_BYTES", 0)
    with LargestTensor() as made:
        result = linear_probe(mapped, test, num_classes=4)
    assert made.largest <= 8 * 3000  # labels, and the numbers of rows
    expected = linear_probe(replace(train, h=train.h.half().float()), test, num_classes=4)
    torch.testing.assert_close(result.weight, expected.weight, atol=1e-3, rtol=1e-3)


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def test_it_says_how_long_it_takes_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SAY_FROM_S", 0)
    said: list[str] = []
    linear_probe(teacher(400, seed=0), teacher(100, seed=1), num_classes=4, say=said.append)
    assert said[0].startswith("linear probe of 400 x 24 features, 4 classes: about ")
    assert any(line.startswith("weight decay 1: top-1 of the held-out images") for line in said)
    assert any("pass" in line and "over 400 images, loss" in line for line in said)


def test_one_image_a_class_cannot_be_probed() -> None:
    train = Features(torch.randn(4, 24), torch.arange(4), torch.arange(4))
    with pytest.raises(DataError, match="single training image"):
        linear_probe(train, teacher(20, seed=1), num_classes=4)


def test_split_keeps_the_share_of_every_class_and_its_last_image() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [3])
    first, second = split_by_class(labels, 0.1, seed=5)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(74))
    assert torch.bincount(labels[second], minlength=4).tolist() == [5, 2, 1, 0]
    assert torch.equal(second, split_by_class(labels, 0.1, seed=5)[1])
    assert not torch.equal(second, split_by_class(labels, 0.1, seed=6)[1])
