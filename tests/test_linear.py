"""The linear probe against scikit-learn, and that it never learns from test images. pytest tests/test_linear.py"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from simclr_dist.errors import DataError
from simclr_dist.evaluation import linear
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.labels import split_by_class
from simclr_dist.evaluation.linear import _Curvature, _Fit, linear_probe


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
    fit = _Curvature(x).fit(x, train.labels, weight_decay, zeros, linear.FINAL_TOLERANCE)

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
def test_test_images_do_not_touch_the_classifier(method: str) -> None:
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
    monkeypatch.setattr(linear, "CHUNK_ROWS", 33)
    torch.testing.assert_close(linear_probe(train, test, num_classes=4).weight, whole.weight, atol=1e-3, rtol=1e-3)


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
