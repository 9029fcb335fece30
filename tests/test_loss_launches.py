"""What the loss asks of a GPU, on tensors that only pretend to be there: launches, collectives, one wait at its end.

docs/gpu.md predicts from these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.rehearsal import DEVICE, Launch, Wait, pretended_gpu
from simclr_dist.loss import NTXentLoss, agreement, implementations
from simclr_dist.loss.enumeration import PAIRS, Pairs
from tests.test_gpu_rehearsal import fake_ranks

pytest.importorskip("triton")

# Of a forward and backward. The tiles make more with more rows or ranks: 13,835 on 1,024 ranks (docs/gpu.md).
LAUNCHES = {1: 70, 8: 78}
# Beside, of pairs across on several ranks: rows, keys and a in the order of the views.
RESTORED = {1: 0, 8: 3}
COLLECTIVES = ["_allgather_base_"] * 4  # headers, ids, z, sums


def gather_equal_headers(own: agreement.Header, lengths: Tensor) -> Callable[[], list]:
    """As if every rank had brought what this one did: collectives of fake ranks leave nothing in memory."""
    read = _gather_headers(own, lengths)

    def wait() -> list[agreement.Header]:
        return [own] * len(read())

    return wait


_gather_headers = agreement._gather_headers


def steps_of_the_loss(
    world_size: int, rows: int, row_dtype: torch.dtype, pairs: Pairs
) -> tuple[list[Launch | Wait], list[Launch]]:
    """Of the forward and of the backward, in the second step."""
    ranks: AbstractContextManager = fake_ranks(world_size) if world_size > 1 else nullcontext()
    with (
        ranks,
        mock.patch.object(implementations, "obstacle_to_triton", return_value=None),
        mock.patch.object(agreement, "_gather_headers", gather_equal_headers),
        pretended_gpu() as trace,
    ):
        loss = NTXentLoss(0.1, row_dtype=row_dtype, pairs=pairs)
        z = torch.empty(rows, 128, device=DEVICE).requires_grad_()
        ids = torch.empty(rows // 2, dtype=torch.int64, device=DEVICE)
        loss(z, ids)
        trace.records.clear()
        value = loss(z, ids)
        forward = len(trace.records)
        value.backward()
    assert loss.choice is not None
    assert (loss.choice.code, loss.choice.reason) == ("triton", "")
    return trace.records[:forward], trace.records[forward:]  # type: ignore[return-value]


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("pairs", PAIRS)
def test_the_loss_waits_once_when_all_of_it_is_queued_and_launches_little(
    world_size: int, row_dtype: torch.dtype, pairs: Pairs
) -> None:
    forward, backward = steps_of_the_loss(world_size, 512, row_dtype, pairs)
    assert [type(record) for record in forward[-1:]] == [Wait]
    assert not any(isinstance(record, Wait) for record in [*forward[:-1], *backward])
    launches = [record for record in [*forward, *backward] if isinstance(record, Launch)]
    assert not any(launch.is_mixed for launch in launches)
    names = [launch.name for launch in launches]
    assert names.count("_sums_kernel") == names.count("_gradient_kernel") == 1
    assert len(names) <= LAUNCHES[world_size] + (RESTORED[world_size] if pairs == "across" else 0)
    assert [name for name in names if "all" in name] == (COLLECTIVES if world_size > 1 else [])
    assert not any("all" in launch.name for launch in backward if isinstance(launch, Launch))
    more_rows, _ = steps_of_the_loss(world_size, 8192, row_dtype, pairs)
    assert len(more_rows) == len(forward)
