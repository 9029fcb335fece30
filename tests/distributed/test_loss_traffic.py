"""What the loss sends: one all-gather of z and a little more in the forward pass, nothing in the backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.traffic import CountTraffic
from simclr_dist.loss import NTXentLoss
from simclr_dist.loss.enumeration import PAIRS, Pairs
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed

ROWS, K = 1024, 128
LIMITS = {torch.float32: 1.025, torch.bfloat16: 0.535}  # of one all-gather of z in float32


def traffic(rank: int, world_size: int) -> dict[tuple[torch.dtype, Pairs], tuple[list, list]]:
    found = {}
    for gather_dtype, pairs in itertools.product(LIMITS, PAIRS):
        z = torch.randn(ROWS, K, requires_grad=True)
        ids = torch.arange(ROWS // 2) + rank * ROWS
        with CountTraffic(world_size) as forward:
            loss = NTXentLoss(implementation="tiled", gather_dtype=gather_dtype, pairs=pairs)(z, ids)
        with CountTraffic(world_size) as backward:
            loss.backward()
        found[gather_dtype, pairs] = forward.collectives, backward.collectives
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sends_little_more_than_one_all_gather_of_z(world_size: int) -> None:
    one_all_gather = (world_size - 1) * ROWS * K * 4
    for found in run_ranks(world_size, traffic):
        for (gather_dtype, _), (forward, backward) in found.items():
            assert backward == []
            # What every rank brings, the ids, z; the sums.
            assert [name for name, _ in forward] == ["_allgather_base_"] * 3 + ["allreduce_"]
            assert sum(sent for _, sent in forward) <= LIMITS[gather_dtype] * one_all_gather
