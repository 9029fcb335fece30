"""Micro-batches: the gradient of the whole batch from pieces of it, with dropout, BatchNorm, autocast and scaling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.loss import NTXentLoss, nt_xent
from simclr_dist.optim.micro_batch import backward_in_micro_batches


class TwoOutputs(nn.Module):
    """(h, z), as SimCLR returns them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, self.head(h)


def build(*layers: nn.Module, x: Tensor) -> TwoOutputs:
    torch.manual_seed(1)
    model = TwoOutputs(*layers).to(x.dtype)
    with torch.no_grad():
        model.eval()(x[:1])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.train()


def views(batch_size: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, batch_size, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 6, 9])
def test_gradient_of_a_network_without_batch_statistics_is_the_full_batchs(micro_batch_size: int) -> None:
    x = views()
    full = build(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), x=x.flatten(0, 1))
    cut = copy.deepcopy(full)
    expected_loss = nt_xent(full(x.flatten(0, 1))[1])
    expected_loss.backward()
    loss = backward_in_micro_batches(cut, x, nt_xent, micro_batch_size=micro_batch_size)
    assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-13)
    assert not loss.requires_grad
    assert relative_error(gradients(cut), gradients(full)) < 1e-12


def with_statistics_per_micro_batch(model: nn.Module, x: Tensor, micro_batch_size: int) -> Tensor:
    """What the documentation promises for BatchNorm, with the whole graph in memory."""
    z = [model(part.flatten(0, 1))[1].unflatten(0, (2, -1)) for part in x.split(micro_batch_size, dim=1)]
    return nt_xent(torch.cat(z, dim=1).flatten(0, 1))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_is_that_of_each_micro_batch_and_its_running_statistics_move_once(momentum: float | None) -> None:
    x = views()
    norm = nn.BatchNorm2d(4, momentum=momentum)
    model = build(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), x=x.flatten(0, 1))
    norm = model.encoder[1]
    norm.running_mean.normal_()
    norm.num_batches_tracked.fill_(7)
    reference = copy.deepcopy(model)
    mean_before, var_before = norm.running_mean.clone(), norm.running_var.clone()
    with_statistics_per_micro_batch(reference, x, 2).backward()
    backward_in_micro_batches(model, x, nt_xent, micro_batch_size=2)
    assert relative_error(gradients(model), gradients(reference)) < 1e-12

    inputs = [model.encoder[0](part.flatten(0, 1)).detach() for part in x.split(2, dim=1)]
    step = 1 / 8 if momentum is None else momentum
    mean = torch.stack([y.mean((0, 2, 3)) for y in inputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in inputs]).mean(0)
    assert torch.allclose(norm.running_mean, (1 - step) * mean_before + step * mean, rtol=1e-12)
    assert torch.allclose(norm.running_var, (1 - step) * var_before + step * var, rtol=1e-12)
    assert int(norm.num_batches_tracked) == 8
    assert norm.momentum == momentum
    assert norm.track_running_stats


def test_one_micro_batch_with_batch_norm_equals_an_ordinary_step() -> None:
    x = views()
    full = build(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), x=x.flatten(0, 1))
    cut = copy.deepcopy(full)
    nt_xent(full(x.flatten(0, 1))[1]).backward()
    backward_in_micro_batches(cut, x, nt_xent, micro_batch_size=6)
    assert relative_error(gradients(cut), gradients(full)) < 1e-12
    for (name, found), expected in zip(cut.named_buffers(), full.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12), name


def test_dropout_draws_the_same_in_both_passes_and_the_generator_goes_on() -> None:
    x = views()
    model = build(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 7), nn.Dropout(0.5), x=x.flatten(0, 1))
    reference = copy.deepcopy(model)
    torch.manual_seed(3)
    with_statistics_per_micro_batch(reference, x, 2).backward()
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    backward_in_micro_batches(model, x, nt_xent, micro_batch_size=2)
    assert torch.equal(torch.rand(1), expected_next)
    assert relative_error(gradients(model), gradients(reference)) < 1e-12


def test_gradients_are_added_and_a_learned_temperature_receives_its_own() -> None:
    x = views()
    full = build(nn.Flatten(), x=x.flatten(0, 1))
    cut = copy.deepcopy(full)
    losses = [NTXentLoss(0.3, learn_temperature=True).double() for _ in range(2)]
    for _ in range(2):
        losses[0](full(x.flatten(0, 1))[1]).backward()
        backward_in_micro_batches(cut, x, losses[1], micro_batch_size=2)
    assert relative_error(gradients(cut), gradients(full)) < 1e-12
    expected, found = (loss.log_temperature.grad for loss in losses)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("whole_call_in_autocast", [True, False])
def test_mixed_precision_gives_the_gradient_of_an_ordinary_mixed_precision_step(whole_call_in_autocast: bool) -> None:
    x = views(dtype=torch.float32)
    full = build(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), x=x.flatten(0, 1))
    cut = copy.deepcopy(full)
    with torch.autocast("cpu", torch.bfloat16):
        z = full(x.flatten(0, 1))[1]
    assert z.dtype == torch.bfloat16
    nt_xent(z).backward()
    forward: Callable = cut.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=whole_call_in_autocast):
        if not whole_call_in_autocast:  # as Accelerate does
            cut.forward = torch.autocast("cpu", torch.bfloat16)(forward)  # type: ignore[method-assign]
        backward_in_micro_batches(cut, x, nt_xent, micro_batch_size=2)
    assert relative_error(gradients(cut), gradients(full)) < 1e-2  # bfloat16 sums in another order


def test_loss_scale_reaches_the_parameters_once() -> None:
    x = views()
    full = build(nn.Flatten(), x=x.flatten(0, 1))
    cut = copy.deepcopy(full)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    nt_xent(full(x.flatten(0, 1))[1]).backward()
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.1)
    backward_in_micro_batches(cut, x, nt_xent, micro_batch_size=4, backward=lambda loss: scaler.scale(loss).backward())
    assert relative_error(gradients(cut), 1024 * gradients(full)) < 1e-12
    scaler.unscale_(optimizer)
    assert relative_error(gradients(cut), gradients(full)) < 1e-12


def test_a_micro_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, found 0"):
        backward_in_micro_batches(nn.Flatten(), views(), nt_xent, micro_batch_size=0)
