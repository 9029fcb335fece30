"""LARS against the paper's formulas in plain numpy, Muon against torch's; the learning rate against its closed form."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr_dist.config import ModelConfig, OptimConfig
from simclr_dist.network.shape import shape_of_model
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer, parameter_order, unused_settings
from simclr_dist.optim.groups import describe_scales, parameter_groups
from simclr_dist.optim.lars import LARS
from simclr_dist.optim.muon import orthogonalised
from simclr_dist.optim.schedule import LearningRate, learning_rate, peak_learning_rate, set_learning_rate


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


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adam", "adamw", "muon"])
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
    # Of release 0.1: weights, then biases and norms. A checkpoint's names, and its state by them, stay where they were.
    assert [name for p in grouped for name, q in model.named_parameters() if p is q] == [
        *("0.weight", "2.weight"),
        *("0.bias", "1.weight", "1.bias", "2.bias"),
    ]
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    named = dict(model.named_parameters())
    assert [id(named[name]) for name in parameter_order(model, optimizer)] == [id(p) for p in grouped]
    assert sorted(parameter_order(model, optimizer)) == sorted(named)


class Mixed(nn.Module):
    """Matrices of three kinds, and what is none: a table, positions, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.wide = nn.Conv2d(8, 20, 1, bias=False)
        self.twin = nn.Conv2d(8, 20, 1, bias=False)  # of the same shape: computed together
        self.tall = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(4, 2)
        self.table = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.randn(1, 6, 4))
        self.norm = nn.LayerNorm(4)


MATRICES = ("conv.weight", "wide.weight", "twin.weight", "tall.weight", "attention.in_proj_weight")
MATRICES += ("attention.out_proj.weight",)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = Mixed().to(memory_format=layout)  # type: ignore[call-overload]
    config = OptimConfig(optimizer="muon", base_lr=0.05, muon_ns_steps=3, muon_momentum=0.6, weight_decay=0.1)
    ours = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    twins = {name: nn.Parameter(p.detach().clone().contiguous()) for name, p in model.named_parameters()}
    for name in MATRICES:
        twins[name] = nn.Parameter(twins[name].detach().flatten(1))
    matrices = torch.optim.Muon([twins[name] for name in MATRICES], lr=0.05, weight_decay=0.1, momentum=0.6, ns_steps=3)
    rest = [(name, p) for name, p in twins.items() if name not in MATRICES]
    others = torch.optim.AdamW(
        [
            {"params": [p for _, p in rest if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for _, p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    for step in range(4):
        lr = 0.05 / (step + 1)
        set_learning_rate(ours, lr)
        set_learning_rate(matrices, lr)
        set_learning_rate(others, lr * (config.adamw_base_lr / config.base_lr))
        for name, p in model.named_parameters():
            g = torch.randn(p.shape)
            p.grad = torch.empty_like(p).copy_(g)
            twins[name].grad = g.reshape(twins[name].shape)
        for optimizer in (ours, matrices, others):
            optimizer.step()
    for name, p in model.named_parameters():
        moved = (twins[name].reshape(p.shape) - before[name]).detach()
        error = (p - twins[name].reshape(p.shape)).abs().max() / moved.abs().max()
        # torch rounds to bfloat16 before it divides by the norm, we after: half a bit of 8.
        assert error < (0.03 if name in MATRICES else 1e-6), (name, error)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_muons_updates_are_the_iteration_in_float64_and_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(0)
    matrices = generator.normal(size=shape)
    found = orthogonalised(torch.tensor(matrices, dtype=torch.float32), 5).double().numpy()
    for matrix, update in zip(matrices, found, strict=True):
        u, s, v = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5  # what the iteration does to each singular value
        assert np.abs(update - u @ np.diag(s) @ v).max() < 1e-5  # float32; bfloat16 gave 0.03
        assert 0.5 < np.linalg.svd(update, compute_uv=False).min() < np.linalg.svd(update, compute_uv=False).max() < 1.4


def test_muon_of_nothing_is_nothing() -> None:
    """A parameter without a gradient stays, and a gradient of zero divides by no zero."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.0))
    model[0].weight.grad = torch.zeros(4, 3)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_nesterov_is_torchs() -> None:
    model, twin = nn.Linear(3, 4), nn.Linear(3, 4)
    twin.load_state_dict(model.state_dict())
    ours = build_optimizer(model, OptimConfig(optimizer="sgd", nesterov=True, weight_decay=0.0))
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(3):
        set_learning_rate(ours, 0.1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_setting_that_the_optimiser_does_not_look_at_is_named() -> None:
    assert unused_settings(OptimConfig()) == ""
    assert unused_settings(OptimConfig(optimizer="adam", betas=(0.8, 0.9), momentum=0.9)) == ""
    said = unused_settings(OptimConfig(optimizer="sgd", betas=(0.8, 0.9), muon_ns_steps=3))
    assert said.startswith("optim.optimizer=sgd: these settings change nothing with it: optim.betas (for adam and")
    assert "optim.muon_ns_steps (for muon)" in said


def rates(encoder: str, **settings: Any) -> dict[str, float]:
    """By parameter, as multiples of the schedule's."""
    model = shape_of_model(ModelConfig(encoder=encoder, image_size=32, width=8))
    groups = parameter_groups(model, OptimConfig(**settings))
    return {name: group.rule.lr_scale for group in groups for name in group.parameters}


@pytest.mark.parametrize(
    ("encoder", "first", "layers"),
    [
        ("resnet18", ["conv1.weight"], ["layer1.0.conv1.weight", "layer1.1.bn2.bias", "layer2.0.downsample.0.weight"]),
        (
            "resnet_small",
            ["conv1.weight", "bn1.bias"],
            ["layer1.conv1.weight", "layer2.conv1.weight", "layer3.bn2.bias"],
        ),
        (
            "vit_b_16",
            ["class_token", "conv_proj.weight", "encoder.pos_embedding"],
            [*(f"encoder.layers.encoder_layer_{i}.mlp.0.weight" for i in range(11)), "encoder.ln.weight"],
        ),
        ("convnext_tiny", ["features.0.0.weight"], ["features.1.0.layer_scale", "features.1.1.block.0.weight"]),
        ("swin_t", ["features.0.0.weight"], ["features.1.0.norm1.weight", "features.1.1.mlp.0.weight"]),
        ("vgg11_bn", ["features.0.weight", "features.1.bias"], ["features.4.weight", "features.8.weight"]),
        ("timm/resnet18", ["conv1.weight"], ["layer1.0.conv1.weight", "layer1.1.bn2.bias"]),
        (
            "timm/vit_tiny_patch16_224",
            ["cls_token", "pos_embed"],
            [f"blocks.{i}.mlp.fc1.weight" for i in range(12)],
        ),
    ],
)
def test_layers_learn_the_more_slowly_the_nearer_they_are_to_the_images(
    encoder: str, first: list[str], layers: list[str]
) -> None:
    """first: of the first layer; layers: one parameter of each of the next."""
    if encoder.startswith("timm/"):
        pytest.importorskip("timm")
    found = rates(encoder, layer_decay=0.5, encoder_lr_scale=0.1)
    head = {name: rate for name, rate in found.items() if name.startswith("projection_head.")}
    assert set(head.values()) == {1.0}
    encoder_rates = {name.removeprefix("encoder."): r for name, r in found.items() if name not in head}
    assert max(encoder_rates.values()) == pytest.approx(0.1 * 0.5)  # the layer below the head
    depth = len(set(encoder_rates.values()))
    for number, names in enumerate([first, *([name] for name in layers)]):
        for name in names:
            assert encoder_rates[name] == pytest.approx(0.1 * 0.5 ** (depth - number)), name


def test_rates_by_layer_are_the_steps_and_plain_groups_stay_as_they_were() -> None:
    model = shape_of_model(ModelConfig(encoder="resnet18", image_size=32))
    plain = parameter_groups(model, OptimConfig())
    assert [(g.rule.decays, g.rule.lr_scale) for g in plain] == [(True, 1.0), (False, 1.0)]
    assert set(rates("resnet18", encoder_lr_scale=0.1).values()) == {0.1, 1.0}
    config = OptimConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0, layer_decay=0.5)
    model = build_model(ModelConfig(encoder="resnet_small", image_size=32, width=8))
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_learning_rate(optimizer, 0.8)
    assert learning_rate(optimizer) == 0.8  # what is logged
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: float((before[name] - p).detach().mean()) for name, p in model.named_parameters()}
    assert moved["encoder.conv1.weight"] == pytest.approx(0.8 / 16, rel=1e-4)
    assert moved["encoder.layer3.conv1.weight"] == pytest.approx(0.8 / 2, rel=1e-4)
    assert moved["projection_head.linear1.weight"] == pytest.approx(0.8, rel=1e-4)
    # Muon's AdamW keeps its own rate, and both follow the layers.
    muon = rates("resnet_small", optimizer="muon", base_lr=0.05, adamw_base_lr=0.01, layer_decay=0.5)
    assert muon["encoder.conv1.weight"] == pytest.approx(1 / 16)
    assert muon["encoder.bn1.weight"] == pytest.approx(0.2 / 16)
    lines = describe_scales(model, config)
    assert lines[0] == "x 0.0625 from conv1.weight on (232 parameters)"
    assert lines[-1] == "x 1 for the projection head"
    assert describe_scales(model, OptimConfig()) == []


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
