"""benchmarks/scaling.py: its designs compute the same loss, and send and hold what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loss_designs import FULL, GATHERED, OURS, Design
from benchmarks.scaling import A100, SYSTEMS, projected_config
from benchmarks.scaling_model import Network, collectives_of, step
from benchmarks.traffic import CountTraffic
from simclr_dist.config import Config, load_config
from simclr_dist.data import Batch
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.batchnorm import convert_to_global_batch_norm
from simclr_dist.network.simclr import build_model
from simclr_dist.plan.memory import LiveBytes
from simclr_dist.run.stop_requests import Requests
from simclr_dist.views.augment import Augment
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks

DESIGNS = {design.name: design for design in (OURS, GATHERED, FULL)}
CPU = torch.device("cpu")


def gradients_and_bytes(rank: int, W: int) -> dict[str, tuple[Any, float]]:
    """Of every design for the same rows."""
    torch.manual_seed(0)
    rows = torch.randn(W, 24, 16, dtype=torch.float64)
    found = {}
    for name, design in DESIGNS.items():
        z = rows[rank].clone().requires_grad_()
        with CountTraffic(W) as traffic:
            design.loss(z).backward()
        assert z.grad is not None
        found[name] = z.grad.tolist(), traffic.sent
    return found


@pytest.mark.distributed
def test_the_designs_are_the_same_loss_and_send_what_is_predicted() -> None:
    W = 2
    for found in run_ranks(W, gradients_and_bytes):
        ours = torch.tensor(found["ours"][0])
        for name, (gradient, sent) in found.items():
            torch.testing.assert_close(torch.tensor(gradient), ours, rtol=1e-9, atol=1e-12)
            assert sent == predicted_bytes(DESIGNS[name], W), name


def predicted_bytes(design: Design, W: int) -> float:
    """float64 rows are twice as wide as the predicted float32; the header of the check stays."""
    return sum(c.sent(W) * (1 if c.what == "loss: agreement" else 2) for c in design.collectives(24, W, 16))


@pytest.mark.parametrize("design", [GATHERED, FULL], ids=lambda design: design.name)
def test_an_autograd_design_holds_what_is_predicted(design: Design) -> None:
    n, K = 1024, 128
    z = torch.randn(n, K, requires_grad=True)
    with LiveBytes() as live:
        design.loss(z).backward()
    assert live.peak == pytest.approx(design.held_bytes(n, 1, K), rel=0.1)


def small_config() -> Config:
    overrides = ["train.global_batch_size=16", "data.train=synthetic", "data.test=null"]
    overrides += ["evaluation.knn_every_epochs=null"]
    return load_config(REPOSITORY / "configs" / "cifar10_demo.yaml", overrides, world_size=2)


def sent_in_a_step(rank: int, W: int) -> float:
    """A step made of the trainer's parts: the third, since in the second DDP sends the order of its buckets."""
    config = small_config()
    B, S = config.train.global_batch_size // W, config.data.image_size
    ids = torch.arange(B) + rank * B
    batch = Batch(torch.randint(0, 256, (2, B, S, S, 3), dtype=torch.uint8), ids, ids, 0)
    augment, nt_xent = Augment(config.augment, config.seed, S), NTXentLoss(config.loss.temperature)
    network = convert_to_global_batch_norm(build_model(config.model))
    model = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    requests = Requests(Path("nowhere"), CPU)

    def run() -> None:
        requests.announce()
        model.zero_grad(set_to_none=True)
        nt_xent(model(augment(batch).flatten(0, 1))[1], batch.sample_ids).backward()
        requests.agreed()

    run()
    run()
    with CountTraffic(W) as traffic:
        run()
    return traffic.sent


@pytest.mark.distributed
def test_a_step_sends_what_the_model_counts() -> None:
    planned = sum(c.sent(2) for c in collectives_of(small_config(), 2))
    assert run_ranks(2, sent_in_a_step) == [pytest.approx(planned)] * 2


def test_more_bandwidth_is_never_slower_and_one_device_sends_nothing() -> None:
    (_, ndr), (_, hdr), (_, ethernet), (_, slow) = SYSTEMS
    config = projected_config(64, 64 * 128)
    times = [sum(step(config, 64, A100, network).parts.values()) for network in (ndr, hdr, ethernet, slow)]
    assert times == sorted(times)
    alone = step(projected_config(1, 128), 1, A100, hdr).parts
    assert sum(alone[name] for name in ("loss: sending", "BatchNorm", "gradients, not hidden", "stop requests")) == 0


def test_a_ring_is_as_long_as_its_hops_and_a_tree_as_its_depth() -> None:
    network = Network("", 8, 0.0, 1.0, 1e30, 10.0, 1e30, tree_hop_s=20.0)
    assert network.latency("all_gather", 8) == 7
    assert network.latency("all_gather", 32) == 28 + 3 * 10
    assert network.latency("all_reduce", 8) == 14
    assert network.latency("all_reduce", 1024) == 2 * (7 + 7 * 20)
    assert network.latency("all_reduce", 32) == 2 * min(58, 7 + 2 * 20)
