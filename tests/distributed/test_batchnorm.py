"""Global BatchNorm: W ranks with n rows each behave as one process with all W*n rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed


def _input(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100  # a mean far from 0 tests stability


def _module(channels: int, dims: int) -> nn.Module:
    norm = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(channels).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def _run(norm: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def _on_rank(rank: int, world_size: int, shape: tuple[int, ...]) -> list[Tensor]:
    norm = convert_to_global_batch_norm(nn.Sequential(_module(shape[1], len(shape))), torch.device("cpu"))[0]
    x, weights = _input(shape), torch.cos(torch.arange(_input(shape).numel(), dtype=torch.float64)).view(shape)
    part = slice(rank * shape[0] // world_size, (rank + 1) * shape[0] // world_size)
    return [t.detach() for t in _run(norm, x[part], weights[part])]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [(12, 5), (6, 4, 3, 5)])
def test_several_ranks_equal_one_process(world_size: int, shape: tuple[int, ...]) -> None:
    weights = torch.cos(torch.arange(_input(shape).numel(), dtype=torch.float64)).view(shape)
    y, dx, dweight, dbias, mean, var = _run(_module(shape[1], len(shape)), _input(shape), weights)
    ranks = run_ranks(world_size, _on_rank, shape)
    tolerance = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y, **tolerance)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), dx, **tolerance)
    torch.testing.assert_close(sum(r[2] for r in ranks), dweight, **tolerance)
    torch.testing.assert_close(sum(r[3] for r in ranks), dbias, **tolerance)
    for r in ranks:
        torch.testing.assert_close(r[4], mean, **tolerance)
        torch.testing.assert_close(r[5], var, **tolerance)


def test_names_and_evaluation_are_torchs_own() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(plain.state_dict())
    converted = convert_to_global_batch_norm(plain, torch.device("cpu"))
    assert list(converted.state_dict()) == list(before)
