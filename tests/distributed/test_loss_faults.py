"""A fault on one rank is an error in the same words on every rank, nobody waits, and the next batch works.

Both where the host reads the headers first, and where it queues the loss first, under the terms of the last time, as
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from simclr_dist.loss import NTXentLoss, SupConLoss, agreement, nt_xent, tiled
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
    "pairs": (
        lambda rank: nt_xent(ones(rank), pairs="across" if rank else "within"),
        "disagree about pairs: within on rank 0, across on rank 1",
    ),
    "decoupled": (
        lambda rank: nt_xent(ones(rank), decoupled=rank > 0),
        "disagree about decoupled: False on rank 0, True on rank 1",
    ),
    "too cold": (lambda rank: nt_xent(ones(rank), 0.001), "too low for exp() in float64"),
    "not finite": (
        lambda rank: nt_xent(poisoned(rank)),
        "NonFiniteError: z is NaN or infinite (rank 1: 1 of 8 rows, first row 4; rank 2: 1 of 8 rows, first row 5)",
    ),
}


def messages(rank: int, world_size: int, ahead: bool) -> dict[str, str]:
    found = {}
    with mock.patch.object(agreement, "_host_runs_ahead", return_value=ahead):
        for name, (call, _) in FAULTS.items():
            try:
                call(rank)
                found[name] = "no error"
            except ValueError as error:
                found[name] = f"{type(error).__name__}: {error}"
            assert NTXentLoss()(torch.eye(8, 4)).isfinite(), f"after {name}"
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_a_fault_on_any_rank_is_told_on_every_rank(ahead: bool) -> None:
    for rank, found in enumerate(run_ranks(3, messages, ahead)):
        for name, (_, words) in FAULTS.items():
            assert words in found[name], f"{name}, rank {rank}: {found[name]}"


# ---------------------------------------------------------------------------------------------------------------------


def losses_of_changing_batches(rank: int, world_size: int, ahead: bool) -> tuple[list[float], list[list[str]]]:
    """Values, and what happened in which order in each step."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.tensor([0, 2**40, 5, 5])
    steps = [
        lambda z: nt_xent(z, 0.2),
        lambda z: nt_xent(z, 0.1),  # a temperature may change from step to step
        lambda z: nt_xent(z[:6], 0.1),  # a shape may, on all ranks at once
        lambda z: nt_xent(z, 0.1, ids + rank),
        lambda z: nt_xent(z, 0.1, (ids % 7 + rank).int()),  # now of another type on every rank
        lambda z: SupConLoss()(z, [0, 1, 1, rank]),
        lambda z: nt_xent(z, 0.1, (ids % 7 + rank).int()),
        lambda z: nt_xent(z, 0.01),  # in float64
        lambda z: nt_xent(z, 0.1),
        lambda z: nt_xent(z, 0.1, pairs="across"),  # other tiles, the same collectives
    ]
    happened: list[str] = []

    def told(what: str, function: Callable) -> Callable:
        def call(*args: object) -> object:
            happened.append(what)
            return function(*args)

        return call

    def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
        return told("wait", lambda: x)

    values, orders = [], []
    with (
        mock.patch.object(agreement, "_host_runs_ahead", return_value=ahead),
        mock.patch.object(agreement, "copy_to_host", copy_to_host),
        mock.patch.object(tiled.Tiles, "sums", told("sums", tiled.Tiles.sums)),
        mock.patch.object(tiled.Tiles, "gradient_rows", told("gradient", tiled.Tiles.gradient_rows)),
    ):
        for step in steps:
            z = torch.randn(8, 4, generator=generator).requires_grad_()
            value = step(z)
            value.backward()
            assert z.grad is not None
            values += [float(value.detach()), float(z.grad.norm())]
            orders.append(happened.copy())
            happened.clear()
    return values, orders


LOSS = ["sums", "gradient"]


def test_the_host_waits_once_a_step_and_after_the_loss_was_queued() -> None:
    _, orders = losses_of_changing_batches(0, 1, False)
    assert orders == [[*LOSS, "wait"]] * 10

    expected = [values for values, _ in run_ranks(3, losses_of_changing_batches, False)]
    for rank, (values, orders) in enumerate(run_ranks(3, losses_of_changing_batches, True)):
        assert values == expected[rank]
        # What no rank could foresee is computed again. A rank that has other rows takes part without a gradient.
        assert orders[0] == ["wait", *LOSS]
        assert orders[1] == [*LOSS, "wait"]
        for order in orders[2:4]:
            assert order == ["sums", "wait", *LOSS]
        assert orders[4] == [*LOSS, "wait", *LOSS]  # ids as int64, then as int32
        assert orders[5] == ["wait", *LOSS]
        assert orders[6] == [*LOSS, "wait"]
        assert orders[7][-3:] == ["wait", *LOSS]
        assert orders[9] == [*LOSS, "wait"]


def losses_that_are_checked_late(rank: int, world_size: int) -> list[str]:
    """What each step raises."""
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))
    broken = z.clone()
    broken[3] = torch.nan if rank == 1 else 1.0
    steps = [(z, 0.1), (z, 0.2), (broken, 0.1), (z, 0.1), (z, 0.1 if rank else 0.2), (z[:6], 0.1), (z, 0.1)]
    steps += [(z[:4] if rank else z, 0.1)]
    raised = []
    with mock.patch.object(agreement, "_host_runs_ahead", return_value=True):
        for rows, temperature in steps:
            rows, when = rows.clone().requires_grad_(), "before"
            try:
                with agreement.checked_after_the_backward():
                    value = nt_xent(rows, temperature)
                    when = "after"
                    value.backward()
                raised.append("nothing")
            except ValueError as error:
                raised.append(f"{when}: {type(error).__name__}: {error}")
    return raised


def test_checked_after_the_backward_every_fault_is_raised_on_all_ranks() -> None:
    """Only a rank whose batch has another form than before checks it before the backward."""
    first, second = run_ranks(2, losses_that_are_checked_late)
    assert [x == "nothing" for x in first] == [True, True, False, True, False, True, True, False]
    assert first[:-1] == second[:-1]
    assert first[2].startswith("after: NonFiniteError: z is NaN or infinite (rank 1: 1 of 8 rows, first row 3)")
    assert first[4].startswith("after: ValueError: contrastive loss: the ranks disagree about the temperature")
    told = "ValueError: contrastive loss: the ranks disagree about the rows of z: 8 on rank 0, 4 on rank 1"
    assert first[7].startswith(f"after: {told}")
    assert second[7].startswith(f"before: {told}")
