"""benchmarks/scaling.py: its designs are the same loss and send what it says; its fit finds what is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.loss_designs import FULL, GATHERED, OURS, Design
from benchmarks.scaling import A100, SYSTEMS, measured_config, projected_config
from benchmarks.scaling_measure import whole_step
from benchmarks.scaling_model import (
    Device,
    Network,
    TimedCollective,
    TimedLoss,
    collectives_of,
    fit,
    fit_line,
    fit_loss,
    fit_network,
    step,
)
from benchmarks.traffic import CountTraffic
from simclr_dist.plan.traffic import Collective
from tests.distributed.spawn import run_ranks

DESIGNS = {design.name: design for design in (OURS, GATHERED, FULL)}
GLOO = Network("gloo", 1 << 30, 30e-6, 20e-6, 2e9, 20e-6, 2e9)


def timed_collectives(network: Network) -> list[TimedCollective]:
    return [
        TimedCollective(operation, size, W, network.seconds(Collective("", operation, size), W))  # type: ignore[arg-type]
        for operation in ("all_gather", "all_reduce")
        for size in (256, 2**16, 2**22)
        for W in (2, 4)
    ]


def test_fit_finds_latency_and_bandwidth() -> None:
    found = fit_network(timed_collectives(GLOO), "gloo")
    assert found.start_s == pytest.approx(GLOO.start_s, rel=1e-6)
    assert found.local_hop_s == pytest.approx(GLOO.local_hop_s, rel=1e-6)
    assert found.local_bytes_per_s == pytest.approx(GLOO.local_bytes_per_s, rel=1e-6)


def test_fit_stands_noise_and_knows_no_negative_times() -> None:
    noisy = [
        TimedCollective(t.operation, t.num_bytes, t.W, t.seconds * (1.05 if i % 2 else 0.95))
        for i, t in enumerate(timed_collectives(GLOO))
    ]
    found = fit_network(noisy, "gloo")
    for t in timed_collectives(GLOO):
        assert found.seconds(t.as_collective(), t.W) == pytest.approx(t.seconds, rel=0.15)
    assert fit([(1, 10), (1, 100), (1, 1000)], [0.5, 9.5, 99.5]) == [0.0, pytest.approx(0.0934, abs=0.05)]


def test_fit_finds_the_devices_constants() -> None:
    device = Device("", 5e-3, 2e-3, 1e-4, 3e-5, 4e-4, 8e10, 6e9)
    assert fit_line({B: device.network(B) for B in (32, 64, 128)}) == pytest.approx((5e-3, 2e-3))
    timed = [
        TimedLoss(design, n, W, 128, device.loss(design, n, W, 128))
        for design in DESIGNS.values()
        for n in (1024, 4096)
        for W in (1, 2, 4)
    ]
    assert fit_loss(timed) == pytest.approx((4e-4, 8e10, 6e9), rel=1e-6)


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
    """float64 rows are twice as wide as the predicted float32; the agreement's header stays."""
    return sum(c.sent(W) * (1 if c.what == "loss: agreement" else 2) for c in design.collectives(24, W, 16))


def sent_in_a_step(rank: int, W: int) -> float:
    return whole_step(measured_config(W, 8), 1)[2]


@pytest.mark.distributed
def test_a_step_sends_what_the_model_reckons_with() -> None:
    planned = sum(c.sent(2) for c in collectives_of(measured_config(2, 8), 2))
    assert run_ranks(2, sent_in_a_step) == [pytest.approx(planned)] * 2


def test_more_bandwidth_is_never_slower_and_one_device_sends_nothing() -> None:
    (_, ndr), (_, hdr), (_, ethernet), (_, slow) = SYSTEMS
    config = projected_config(64, 64 * 128)
    times = [step(config, 64, A100, network).seconds for network in (ndr, hdr, ethernet, slow)]
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
