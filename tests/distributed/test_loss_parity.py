"""The test to be proud of: W processes under DDP leave the gradients of one process that holds the whole batch.

The loss's value can be right to six digits while its gradient is too small by W, or points elsewhere. To try another
network, add it to MODELS: a function without arguments that returns a module from [n, 3, 6, 6] to z [n, K].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_dist.loss import NTXentLoss, SupConLoss, agreement, tiled
from simclr_dist.optim.micro_batch import backward_in_micro_batches
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))


def group_norm_conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "group_norm_conv_net": group_norm_conv_net}

# Several losses of the same two views; the gradients of their sum would hide a fault, so each has its own pass.
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {"implementation": "plain"},
    "tiled": {"implementation": "tiled"},
    "low temperature": {"temperature": 0.005},
    "three views": {"num_views": 3},
    "decoupled": {"decoupled": True},
    "learned temperature": {"learn_temperature": True},
    "duplicates": {"ids": True},
    "duplicates, plain": {"ids": True, "implementation": "plain"},
    "duplicates beyond int32": {"ids": True, "id_offset": 2**40},
    "supervised": {"ids": True, "supervised": True},
    "supervised, plain": {"ids": True, "supervised": True, "implementation": "plain"},
    "micro-batches": {"micro_batch_size": 2},
    "across": {"pairs": "across", "temperature": 0.1},
    "across, plain": {"pairs": "across", "implementation": "plain"},
    "across, temperature 0.01, learned, duplicates": {
        "pairs": "across",
        "temperature": 0.01,
        "learn_temperature": True,
        "ids": True,
    },
    "across, decoupled, groups beyond int32, learned temperature, micro-batches": {
        "pairs": "across",
        "decoupled": True,
        "ids": True,
        "id_offset": 2**40,
        "learn_temperature": True,
        "micro_batch_size": 2,
    },
    "across, groups, learned temperature, plain": {
        "pairs": "across",
        "ids": True,
        "learn_temperature": True,
        "implementation": "plain",
    },
    "four views, decoupled, learned temperature, micro-batches": {
        "num_views": 4,
        "decoupled": True,
        "learn_temperature": True,
        "micro_batch_size": 2,
    },
    "supervised, learned temperature": {"ids": True, "supervised": True, "learn_temperature": True},
    "supervised, learned temperature, plain": {
        "ids": True,
        "supervised": True,
        "learn_temperature": True,
        "implementation": "plain",
    },
    "learned temperature, plain": {"learn_temperature": True, "implementation": "plain"},
    "four views, partly labelled, learned temperature, micro-batches": {
        "num_views": 4,
        "ids": True,
        "id_offset": -1,
        "supervised": True,
        "learn_temperature": True,
        "micro_batch_size": 1,
    },
}
GLOBAL_BATCH = 12  # images: 3 a rank at W = 4, so odd and smaller than a tile; tiles of 4 do not divide 6 rows


class WithLoss(nn.Module):
    """The network and its loss's own parameters, so that DDP averages both."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.model(x)
        return z


def gradients(rank: int, world_size: int, model_name: str, loss_name: str) -> tuple[float, np.ndarray]:
    """The loss and all parameter gradients after one backward pass on this rank's share of the global batch."""
    options = {"temperature": 0.2, **LOSSES[loss_name]}
    with_ids, offset = options.pop("ids", False), options.pop("id_offset", 0)
    micro_batch_size = options.pop("micro_batch_size", None)
    loss_fn = (SupConLoss if options.pop("supervised", False) else NTXentLoss)(**options)
    torch.manual_seed(0)
    model = WithLoss(MODELS[model_name](), loss_fn).double()
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(options.get("num_views", 2), GLOBAL_BATCH, 3, 6, 6, dtype=torch.float64, generator=generator)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 1, 1, 10, 11]) + offset
    share = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    views, ids = views[:, share], ids[share]
    wrapped = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    arguments = (ids,) if with_ids else ()
    if micro_batch_size is None:
        loss = loss_fn(wrapped(views.flatten(0, 1)), *arguments)
        loss.backward()
    else:
        loss = backward_in_micro_batches(
            wrapped,
            views,
            lambda z: loss_fn(z, *arguments),
            micro_batch_size=micro_batch_size,
            loss_parameters=loss_fn.parameters(),
        )
    if with_ids and isinstance(loss_fn, NTXentLoss):
        assert int(loss_fn.masked_duplicates) == 3
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()


def all_gradients(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[tuple[float, np.ndarray]]:
    tiled._tile_size = lambda *_: 4  # type: ignore[assignment]
    early = [gradients(rank, world_size, *case) for case in cases]
    agreement._host_runs_ahead = lambda _: True  # type: ignore[assignment]  # as on a GPU
    for case, (value, expected) in zip(cases, early, strict=True):
        late = gradients(rank, world_size, *case)
        assert late[0] == value, case
        assert np.array_equal(late[1], expected), case
    return early


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_after_ddp_match_a_single_process(world_size: int) -> None:
    cases = list(itertools.product(MODELS, LOSSES))
    by_rank = run_ranks(world_size, all_gradients, cases, timeout_s=120)
    for at, case in enumerate(cases):
        expected_loss, expected = gradients(0, 1, *case)
        for rank in range(world_size):
            loss, found = by_rank[rank][at]
            assert loss == pytest.approx(expected_loss, rel=1e-12), f"{case}: the value on rank {rank}"
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            assert error < 1e-12, f"{case}: the gradient on rank {rank} is off by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------


def summed_gradients(rank: int, world_size: int) -> list[tuple[np.ndarray, float]]:
    """Of z and of the temperature's logarithm, by the tiles and by autograd."""
    z, found = torch.randn(2, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), []
    for implementation in ("tiled", "plain"):
        own = z[:, rank * 8 // world_size : (rank + 1) * 8 // world_size].flatten(0, 1).requires_grad_()
        loss = NTXentLoss(0.2, implementation, learn_temperature=True, grad_reduction="sum").double()
        loss(own).backward()
        assert own.grad is not None
        assert loss.log_temperature.grad is not None
        found.append((own.grad.unflatten(0, (2, -1)).numpy(), float(loss.log_temperature.grad)))
    return found


def test_grad_reduction_sum_leaves_each_rank_its_part_of_the_gradient() -> None:
    expected = summed_gradients(0, 1)
    for (z, temperature), *parts in zip(expected, *run_ranks(2, summed_gradients), strict=True):
        np.testing.assert_allclose(np.concatenate([part[0] for part in parts], axis=1), z, rtol=1e-12, atol=1e-15)
        assert sum(part[1] for part in parts) == pytest.approx(temperature, rel=1e-12)


def bfloat16_gather(rank: int, world_size: int) -> tuple[float, np.ndarray]:
    z = torch.randn(2, 8 * world_size, 16, generator=torch.Generator().manual_seed(2))
    own = z[:, rank * 8 : (rank + 1) * 8].flatten(0, 1).requires_grad_()
    loss = NTXentLoss(0.1, gather_dtype=torch.bfloat16)(own)
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad.unflatten(0, (2, 8)).numpy() / world_size


def test_bfloat16_gather_is_the_loss_of_the_rounded_rows() -> None:
    (loss, _), (same_loss, _) = results = run_ranks(2, bfloat16_gather)
    assert loss == same_loss
    found = np.concatenate([gradient for _, gradient in results], axis=1)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)).flatten(0, 1)
    rounded = nn.functional.normalize(x).bfloat16().double()
    # The definition again, on rows of not quite length one: nothing may normalise them a second time.
    s = (rounded @ rounded.T / 0.1).fill_diagonal_(-torch.inf)
    expected = torch.nn.functional.cross_entropy(s, torch.arange(32).roll(16))
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    exact = x.double().requires_grad_()
    NTXentLoss(0.1)(exact).backward()
    assert exact.grad is not None
    expected_gradient = exact.grad.unflatten(0, (2, 16)).numpy()
    error = np.linalg.norm(found - expected_gradient) / np.linalg.norm(expected_gradient)
    assert error < 1e-2


# ---------------------------------------------------------------------------------------------------------------------


def count_gradient_reductions(rank: int, world_size: int) -> tuple[int, int]:
    """How often DDP reduces its one bucket: in an ordinary step, and in one of four micro-batches."""
    counts = []
    for micro_batch_size in (8, 2):
        model = DistributedDataParallel(mlp())
        calls = 0

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and wants none or its own
            nonlocal calls
            calls += 1
            return (
                torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
            )

        model.register_comm_hook(None, hook)
        backward_in_micro_batches(model, torch.randn(2, 8, 3, 6, 6), NTXentLoss(), micro_batch_size=micro_batch_size)
        counts.append(calls)
    return counts[0], counts[1]


def test_micro_batches_let_ddp_reduce_once() -> None:
    assert run_ranks(2, count_gradient_reductions) == [(1, 1)] * 2
