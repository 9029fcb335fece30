"""The gradient of the whole network, after DDP's averaging, is that of one process with the whole batch.

A ResNet with global BatchNorm, in float64: the loss, the statistics and DDP each have a factor or a term that can go
wrong while the printed loss stays right.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.encoders import SmallResNet
from simclr_dist.network.simclr import SimCLR, build_projection_head
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed
G = 12


def _model() -> SimCLR:
    torch.manual_seed(0)
    encoder = SmallResNet(4, stride=1)
    head = build_projection_head(encoder.feature_dim, 16, 8, layers=2, batch_norm="all")
    return SimCLR(encoder, head, encoder.feature_dim).double()


def _views() -> Tensor:
    return torch.randn(2, G, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradients(model: torch.nn.Module, views: Tensor, implementation: str) -> tuple[float, dict[str, Tensor]]:
    _, z = model(views.flatten(0, 1))
    loss = NTXentLoss(0.2, implementation)(z)
    loss.backward()
    named = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return loss.item(), named


def _on_rank(rank: int, world_size: int, implementation: str) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    model = convert_to_global_batch_norm(_model())
    part = slice(rank * G // world_size, (rank + 1) * G // world_size)
    loss, gradients = _gradients(DistributedDataParallel(model), _views()[:, part], implementation)
    return loss, gradients, {name: b for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize(("world_size", "implementation"), [(2, "tiled"), (4, "tiled"), (2, "plain")])
def test_resnet_gradient_matches_single_process(world_size: int, implementation: str) -> None:
    alone = _model()
    loss, gradients = _gradients(alone, _views(), "plain")
    for rank_loss, rank_gradients, buffers in run_ranks(world_size, _on_rank, implementation):
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        assert rank_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp_min(1e-8)  # some are zero but for rounding: weights before a BatchNorm
            assert (rank_gradients[name] - gradient).abs().max() <= 1e-9 * scale, name
        for name, value in buffers.items():
            torch.testing.assert_close(value, alone.get_buffer(name), rtol=1e-12, atol=1e-12)
