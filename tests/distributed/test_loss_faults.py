"""A fault on one rank is an error in the same words on every rank, nobody waits, and the next batch works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simclr_dist.loss import NTXentLoss, nt_xent
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed


def ones(rank: int) -> Tensor:
    return torch.ones(8, 4)


def poisoned(rank: int) -> Tensor:
    z = ones(rank)
    if rank:
        z[3 + rank] = torch.nan
    return z


# What rank 0 and the others bring, and words of the error.
FAULTS: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "uneven": (
        lambda rank: nt_xent(torch.ones(6 if rank == 2 else 8, 4)),
        "the ranks disagree about the rows of z: 8 on rank 0, 6 on rank 2. All ranks need batches of the same "
        "shape and the same settings; drop an incomplete last batch.",
    ),
    "width": (lambda rank: nt_xent(torch.ones(8, 4 + rank)), "disagree about the width of z: 4 on rank 0, 5 on rank 1"),
    "odd": (lambda rank: nt_xent(torch.ones(7 if rank == 1 else 8, 4)), "rank 1: z has the shape [7, 4]"),
    "empty": (lambda rank: nt_xent(torch.ones(0 if rank == 1 else 8, 4)), "rank 1: z has the shape [0, 4]"),
    "shape": (lambda rank: nt_xent(torch.ones(8, 4)[rank == 0]), "rank 0: z has 3 dimensions"),
    "dtype": (
        lambda rank: nt_xent(ones(rank).to(torch.bfloat16 if rank else torch.float32)),
        "disagree about the dtype of z: torch.float32 on rank 0, torch.bfloat16 on rank 1",
    ),
    "no float": (lambda rank: nt_xent(ones(rank).long() if rank else ones(rank)), "rank 1: z must be float16"),
    "ids on one rank": (
        lambda rank: nt_xent(ones(rank), 0.1, torch.arange(4) if rank else None),
        "disagree about the number of sample ids or labels (-1: none): -1 on rank 0, 4 on rank 1",
    ),
    "number of ids": (
        lambda rank: nt_xent(ones(rank), 0.1, torch.arange(4 + rank)),
        "rank 1: 5 sample ids (or labels) for 4 images\n  rank 2: 6",
    ),
    "temperature": (
        lambda rank: nt_xent(ones(rank), 0.1 + rank / 10),
        "disagree about the temperature: 0.1 on rank 0, 0.2 on rank 1",
    ),
    "implementation": (
        lambda rank: nt_xent(ones(rank), implementation="plain" if rank else "tiled"),
        "disagree about the implementation",
    ),
    "too cold": (lambda rank: nt_xent(ones(rank), 0.001), "too low for exp() in float64"),
    "not finite": (
        lambda rank: nt_xent(poisoned(rank)),
        "NonFiniteError: z is NaN or infinite (rank 1: 1 of 8 rows, first row 4; rank 2: 1 of 8 rows, first row 5)",
    ),
}


def messages(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    for name, (call, _) in FAULTS.items():
        try:
            call(rank)
            found[name] = "no error"
        except ValueError as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert NTXentLoss()(torch.eye(8, 4)).isfinite(), f"after {name}"
    return found


def test_a_fault_on_any_rank_is_told_on_every_rank() -> None:
    for rank, found in enumerate(run_ranks(3, messages)):
        for name, (_, words) in FAULTS.items():
            assert words in found[name], f"{name}, rank {rank}: {found[name]}"
