"""Global BatchNorm: W ranks with n rows each behave as one process with all W*n rows."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from tests.distributed import gpu_batch_norm
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed


def _input(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100  # a mean far from 0 tests stability


def _module(channels: int, dims: int, **settings: Any) -> nn.Module:
    norm = (nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d)(channels, **settings).double()
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, channels))
            norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def _weights(shape: tuple[int, ...]) -> Tensor:
    return torch.cos(torch.arange(_input(shape).numel(), dtype=torch.float64)).view(shape)


def _run(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two steps on different rows, so that running statistics have moved twice."""
    for scale in (0.5, 1.0):
        norm.zero_grad()
        leaf = (scale * x).requires_grad_()
        y = norm(leaf)
        (y * weights).sum().backward()
    found = {"y": y, "dx": leaf.grad} | {f"d{name}": p.grad for name, p in norm.named_parameters()}
    return {name: t.detach() for name, t in (found | dict(norm.named_buffers())).items() if t is not None}


class Case(NamedTuple):
    shape: tuple[int, ...] = (12, 4, 3, 5)
    kernels: str = "any device"
    """Of "any device", "gpu": ours for CUDA, or "torch": SyncBatchNorm, which needs dy in the layout of x."""
    settings: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False


def _on_rank(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    for kernel in gpu_batch_norm.ALL:
        setattr(torch, kernel.__name__, kernel)
    found = []
    for case in cases:
        plain = nn.Sequential(_module(case.shape[1], len(case.shape), **dict(case.settings)))
        norm = convert_to_global_batch_norm(plain)[0]
        if case.kernels == "gpu":
            norm._on_any_device = norm._on_gpu
        if case.kernels == "torch":
            norm = _TorchsOwn(plain[0])
        n = case.shape[0]
        part = slice(rank * n // world_size, (rank + 1) * n // world_size)
        x, weights = _input(case.shape)[part], _weights(case.shape)[part]
        if case.channels_last:
            x = x.to(memory_format=torch.channels_last)
            weights = weights.to(memory_format=torch.channels_last) if case.kernels == "torch" else weights
        found.append(_run(norm, x, weights))
    return found


class _TorchsOwn(nn.Module):
    """nn.SyncBatchNorm without its check for CUDA."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        for name, parameter in plain.named_parameters():
            self.register_parameter(name, parameter)
        for name, buffer in plain.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, 1e-5, 0.1
        group = torch.distributed.group.WORLD
        return SyncBatchNorm.apply(x, self.weight, self.bias, *statistics, group, group.size())


CASES = [
    Case(shape, kernels, channels_last=channels_last)
    for kernels in ("any device", "gpu")
    for shape, channels_last in (((12, 5), False), ((6, 4, 3, 5), False), ((8, 4, 3, 5), True), ((6, 3, 7), False))
]
CASES += [
    Case(kernels=kernels, settings=settings)
    for kernels in ("any device", "gpu")
    for settings in (
        (("momentum", None),),
        (("affine", False),),
        (("track_running_stats", False),),
        (("momentum", 1), ("eps", 0.1)),
    )
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_equal_one_process(world_size: int) -> None:
    """Also where the ranks have unequally many rows, in any layout, and for every setting of BatchNorm."""
    ranks = run_ranks(world_size, _on_rank, CASES)
    for i, case in enumerate(CASES):
        found = [rank[i] for rank in ranks]
        whole = _module(case.shape[1], len(case.shape), **dict(case.settings))
        expected = _run(whole, _input(case.shape), _weights(case.shape))
        assert found[0].keys() == expected.keys(), case
        for name, value in expected.items():
            of_ranks = [rank[name] for rank in found]
            joined = {"y": torch.cat, "dx": torch.cat, "dweight": sum, "dbias": sum}.get(name)
            for one in [joined(of_ranks)] if joined else of_ranks:
                assert torch.allclose(one, value, rtol=1e-9, atol=1e-9), (case, name)


def test_on_a_gpu_it_is_torchs_sync_batch_norm() -> None:
    """With the same kernels: values, gradients, running statistics and layouts."""
    cases = [Case(shape, kernels, channels_last=last) for kernels in ("gpu", "torch") for shape, last in _LAYOUTS]
    for rank in run_ranks(2, _on_rank, cases):
        for ours, theirs in zip(rank[: len(_LAYOUTS)], rank[len(_LAYOUTS) :], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
                assert ours[name].stride() == value.stride(), name


_LAYOUTS = (((8, 4, 3, 5), False), ((8, 4, 3, 5), True), ((8, 5), False))


def _in_bfloat16(rank: int, world_size: int) -> dict[str, Tensor]:
    norm = convert_to_global_batch_norm(nn.Sequential(nn.BatchNorm2d(_OF_BFLOAT16[1])))[0]
    n = _OF_BFLOAT16[0] // world_size
    part = slice(rank * n, (rank + 1) * n)
    x = (_input(_OF_BFLOAT16) - 99).bfloat16()[part].contiguous(memory_format=torch.channels_last)
    found = _run(norm, x, _weights(_OF_BFLOAT16).bfloat16()[part])
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert found["dx"].is_contiguous(memory_format=torch.channels_last)
    return found


_OF_BFLOAT16 = (64, 4, 3, 5)


def test_in_bfloat16_it_rounds_and_no_more() -> None:
    """Rows rounded to 8 bits; statistics and sums are float32."""
    ranks = run_ranks(2, _in_bfloat16)
    x, weights = ((_input(_OF_BFLOAT16) - 99).bfloat16().double(), _weights(_OF_BFLOAT16).bfloat16().double())
    for name, value in _run(nn.BatchNorm2d(_OF_BFLOAT16[1]).double(), x, weights).items():
        of_ranks = [rank[name].double() for rank in ranks]
        joined = {"y": torch.cat, "dx": torch.cat, "dweight": sum, "dbias": sum}.get(name)
        one = joined(of_ranks) if joined else of_ranks[0]
        error = (one - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < (0.012 if joined else 1e-5), name  # three roundings of half of 2**-7


def test_names_and_evaluation_are_torchs_own() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(plain.state_dict())
    converted = convert_to_global_batch_norm(plain)
    assert list(converted.state_dict()) == list(before)
