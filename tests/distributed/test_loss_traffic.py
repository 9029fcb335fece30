"""What the loss sends: one all-gather of z and a little more in the forward pass, nothing in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_dist.loss import NTXentLoss
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed

ROWS, K = 1024, 128
LIMITS = {torch.float32: 1.02, torch.bfloat16: 0.52}  # of one all-gather of z in float32


class CountTraffic(TorchDispatchMode):
    """Notes every collective with the bytes that a rank sends for it in a ring."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.collectives: list[tuple[str, float]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name, others = function._opname, self.world_size - 1
            if name == "_allgather_base_":
                sent = others * args[1].nbytes
            elif name == "allreduce_":
                sent = 2 * others / self.world_size * sum(x.nbytes for x in args[0])
            else:
                raise AssertionError(f"an unexpected collective: {name}")
            self.collectives.append((name, sent))
        return function(*args, **(kwargs or {}))


def traffic(rank: int, world_size: int) -> dict[torch.dtype, tuple[list, list]]:
    found = {}
    for gather_dtype in LIMITS:
        z = torch.randn(ROWS, K, requires_grad=True)
        ids = torch.arange(ROWS // 2) + rank * ROWS
        with CountTraffic(world_size) as forward:
            loss = NTXentLoss(implementation="tiled", gather_dtype=gather_dtype)(z, ids)
        with CountTraffic(world_size) as backward:
            loss.backward()
        found[gather_dtype] = forward.collectives, backward.collectives
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sends_little_more_than_one_all_gather_of_z(world_size: int) -> None:
    one_all_gather = (world_size - 1) * ROWS * K * 4
    for found in run_ranks(world_size, traffic):
        for gather_dtype, (forward, backward) in found.items():
            assert backward == []
            # What every rank brings, the ids, z; the sums.
            assert [name for name, _ in forward] == ["_allgather_base_"] * 3 + ["allreduce_"]
            assert sum(sent for _, sent in forward) <= LIMITS[gather_dtype] * one_all_gather
