"""LARS against the paper's formulas in plain numpy; the learning rate against its closed form."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from simclr_dist.config import OptimConfig
from simclr_dist.optim.build import build_optimizer, parameter_order
from simclr_dist.optim.lars import LARS
from simclr_dist.optim.schedule import LearningRate, peak_learning_rate, set_learning_rate


def lars_by_hand(w, g, v, lr, momentum, decay, trust, adapt):  # type: ignore[no-untyped-def]
    g = g + decay * w
    ratio = 1.0
    if adapt and np.linalg.norm(w) > 0 and np.linalg.norm(g) > 0:
        ratio = trust * np.linalg.norm(w) / np.linalg.norm(g)
    v = momentum * v + lr * ratio * g
    return w - v, v


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_lars_equals_its_formula(start: float) -> None:
    generator = np.random.default_rng(0)
    weights = [start * generator.normal(size=shape) for shape in ((3, 4), (5,))]
    params = [torch.tensor(w, requires_grad=True) for w in weights]
    velocities = [np.zeros_like(w) for w in weights]
    groups = [
        {"params": params[:1], "weight_decay": 0.1, "adapt": True},
        {"params": params[1:], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, momentum=0.9, trust_coefficient=0.01)
    for step in range(5):
        lr = 0.5 / (step + 1)  # a changing rate shows where it sits relative to the momentum
        set_learning_rate(optimizer, lr)
        for i, p in enumerate(params):
            g = generator.normal(size=p.shape)
            p.grad = torch.tensor(g)
            decay, adapt = ((0.1, True), (0.0, False))[i]
            weights[i], velocities[i] = lars_by_hand(weights[i], g, velocities[i], lr, 0.9, decay, 0.01, adapt)
        optimizer.step()
    for p, w in zip(params, weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12)


def test_lars_twice_is_the_same_and_lowers_a_loss() -> None:
    def train() -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(64, 4)
        y = x.sum(1, keepdim=True)
        optimizer = build_optimizer(model, OptimConfig(trust_coefficient=0.02))
        set_learning_rate(optimizer, 1.0)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    (losses, end), (_, again) = train(), train()
    assert torch.equal(end, again)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_biases_and_norms_do_not_decay(optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    built = build_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.5, momentum=0.0))
    set_learning_rate(built, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    built.step()
    assert torch.equal(model[0].bias, before["0.bias"])
    assert torch.equal(model[1].weight, before["1.weight"])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_lars_adapts_the_rate_of_weights_but_not_of_biases_and_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OptimConfig(optimizer="lars", weight_decay=0.0, momentum=0.0))
    set_learning_rate(optimizer, 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = model.state_dict()
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name] - 0.1), name
    assert 0 < (after["0.weight"] - before["0.weight"]).abs().max() < 0.01  # trust_coefficient x |w| / |g| is small


def test_parameter_order_is_the_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    grouped = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert [id(dict(model.named_parameters())[name]) for name in parameter_order(model)] == [id(p) for p in grouped]


def test_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    schedule = LearningRate(peak=2.0, warmup_samples=100, total_samples=1100)
    assert [schedule(s) for s in (0, 50, 100)] == [0.0, 1.0, 2.0]
    assert schedule(600) == pytest.approx(1.0)
    assert schedule(350) == pytest.approx(1 + math.cos(math.pi / 4))
    assert schedule(1100) == pytest.approx(0.0)
    assert schedule(5000) == pytest.approx(0.0)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 4.8), ("sqrt", 0.3 * 64), ("none", 0.3)])
def test_learning_rate_scales_with_the_global_batch(scaling: str, expected: float) -> None:
    assert peak_learning_rate(OptimConfig(base_lr=0.3, lr_scaling=scaling), 4096) == pytest.approx(expected)


def test_the_papers_two_rules_agree_at_4096() -> None:
    linear = peak_learning_rate(OptimConfig(base_lr=0.3, lr_scaling="linear"), 4096)
    assert peak_learning_rate(OptimConfig(base_lr=0.075, lr_scaling="sqrt"), 4096) == pytest.approx(linear)
