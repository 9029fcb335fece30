"""The Triton kernels on 1, 2 and 3 ranks, by triton's interpreter: float64's values and gradients, and no fall-back."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from simclr_dist.loss import NTXentLoss, SupConLoss, agreement, implementations
from tests.distributed.spawn import run_ranks
from tests.interpreter import use_interpreter

pytest.importorskip("triton")
pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "two blocks of columns": {"B": 36},  # 72 rows in all, of which a block holds 64
    "duplicates": {"ids": [0, 1, 2, 0, 2**40, 0]},
    "three views, decoupled": {"num_views": 3, "decoupled": True},
    "supervised": {"ids": [0, 1, -1, 0, -1, 1], "supervised": True},
    "across": {"B": 36, "pairs": "across"},
    "across, groups, decoupled": {"ids": [0, 1, 2, 0, -(2**40), 0], "pairs": "across", "decoupled": True},
    "bfloat16 rows": {"row_dtype": torch.bfloat16},
}
# Rows of 16 bits change the result: docs/loss.md. On these few rows, with a temperature of 0.2.
TOLERANCES = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (4e-3, 2e-2)}


def value_and_gradient(
    rank: int, world_size: int, implementation: str, dtype: torch.dtype, case: dict[str, Any]
) -> tuple[float, Tensor]:
    """The loss of this rank's part of the batch, and the gradient of its rows [V, B/W, K] of the mean over all."""
    options = dict(case)
    B, ids, V = options.pop("B", 6), options.pop("ids", None), options.get("num_views", 2)
    rows = torch.randn(V, B, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(B))
    share = slice(rank * B // world_size, (rank + 1) * B // world_size)
    z = rows[:, share].to(dtype).flatten(0, 1).requires_grad_()
    kind = SupConLoss if options.pop("supervised", False) else NTXentLoss
    loss = kind(0.2, implementation, **options)
    value = loss(z) if ids is None else loss(z, torch.tensor(ids)[share])
    value.backward()
    assert loss.choice is not None
    assert loss.choice.code == implementation
    assert z.grad is not None
    return float(value.detach()), z.grad.unflatten(0, (V, -1)) / world_size


def by_the_kernels(rank: int, world_size: int) -> dict[str, tuple[float, Tensor]]:
    use_interpreter()
    warnings.simplefilter("error")  # a fall-back is a failure
    found = {}
    for name, case in CASES.items():
        found[name] = value_and_gradient(rank, world_size, "triton", torch.float32, case)
    if world_size > 1:
        for name, case in CASES.items():
            with mock.patch.object(agreement, "_host_runs_ahead", return_value=True):  # as on a GPU
                again = value_and_gradient(rank, world_size, "triton", torch.float32, case)
            assert again[0] == found[name][0], name
            assert torch.equal(again[1], found[name][1]), name
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_kernels_are_used_on_every_rank_and_have_the_gradient_of_float64(world_size: int) -> None:
    ranks = run_ranks(world_size, by_the_kernels, timeout_s=120)
    for name, case in CASES.items():
        exact = {**case, "row_dtype": torch.float32}
        expected, gradient = value_and_gradient(0, 1, "plain", torch.float64, exact)
        of_value, of_gradient = TOLERANCES[case.get("row_dtype", torch.float32)]
        for rank in ranks:
            assert rank[name][0] == pytest.approx(expected, rel=of_value), name
        found = torch.cat([rank[name][1] for rank in ranks], dim=1).double()
        error = float((found - gradient).norm() / gradient.norm())
        assert error <= of_gradient, f"{name}: the gradient is off by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------


def with_a_rank_that_cannot(rank: int, world_size: int) -> list[tuple[str, str, str, str]]:
    use_interpreter()
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        implementations.obstacle_to_triton = lambda *_: "there is no compiler"  # type: ignore[assignment]
    found = []
    for ahead in (False, True, True):
        loss = NTXentLoss(0.2, "triton")
        with (
            mock.patch.object(agreement, "_host_runs_ahead", return_value=ahead),
            pytest.warns(UserWarning, match="the loss uses tiled instead of triton") as caught,
        ):
            value = loss(z)
        assert loss.choice is not None
        assert torch.equal(value, NTXentLoss(0.2, "tiled")(z))
        settled = NTXentLoss(0.2, "triton")
        settled.settle(torch.device("cpu"), num_rows=8, width=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(settled(z), value)
        found.append((loss.choice.code, str(caught[0].message), settled.choice.code, settled.choice.reason))  # type: ignore[union-attr]
    return found


def test_what_one_rank_cannot_use_none_uses_and_each_says_so() -> None:
    for rank, found in enumerate(run_ranks(2, with_a_rank_that_cannot, timeout_s=120)):
        for code, warning, settled, reason in found:
            assert code == settled == "tiled"
            assert ("there is no compiler" if rank == 1 else "another rank cannot use the kernels") in warning
            assert reason == "rank 1: there is no compiler"
