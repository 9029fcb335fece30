"""The loss on a GPU: float64's value and gradient for every implementation and dtype, the same every time.

The reference is the definition, in float64 on the CPU. Inputs are drawn afresh in every run; a failure shows the seed.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_dist.loss import NTXentLoss
from simclr_dist.loss.enumeration import PAIRS, Pairs
from simclr_dist.parallel import distributed
from tests.devices import CUDA, needs_cuda, on_every_device, unwritten_memory_is_nan
from tests.distributed.spawn import run_ranks

# of the value, and of the gradient (relative, by norm): gradients are rounded to their input's type, values are not
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (2e-6, 5e-3),
    torch.float16: (2e-6, 1e-3),
}
SCALE = 4096.0  # as a GradScaler's: small gradients stay in float16's range
ROUNDED = {torch.bfloat16: (2e-3, 6e-3), torch.float16: (2e-4, 8e-4)}  # as TOLERANCES, by row_dtype: docs/loss.md
WAYS = [
    *((device, implementation) for device in ("cpu", "cuda") for implementation in ("plain", "tiled")),
    ("cuda", "triton"),
]
ways = pytest.mark.parametrize(
    ("device", "implementation"),
    [pytest.param(*way, marks=needs_cuda if way[0] == "cuda" else []) for way in WAYS],
)


@pytest.fixture
def generator() -> torch.Generator:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def definition(z: Tensor, ids: Tensor, temperature: float, pairs: Pairs = "within") -> tuple[Tensor, Tensor]:
    """Value and gradient of the mean of log(1 + Q_i / P_i), in float64 on the CPU."""
    z = z.detach().cpu().double().requires_grad_()
    unit, B = F.normalize(z, dim=1), len(ids)
    s = unit @ unit.T / temperature
    of_row = ids.cpu().repeat(2)
    hidden = of_row[:, None] == of_row
    if pairs == "across":
        view = torch.arange(2 * B) // B
        hidden |= view[:, None] == view
    q = s.masked_fill(hidden, -torch.inf).logsumexp(1)
    positive = s[torch.arange(2 * B), torch.arange(2 * B).roll(B)]
    loss = F.softplus(q - positive).mean()
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


def assert_it_ran(loss: NTXentLoss, implementation: str) -> None:
    """And nothing else."""
    assert loss.choice is not None
    assert (loss.choice.code, loss.choice.reason) == (implementation, "")


@ways
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("B", "K", "temperature"), [(1, 128, 0.5), (37, 100, 0.1), (160, 128, 0.5), (70, 256, 0.07)])
def test_value_and_gradient_are_those_of_float64(
    device: str,
    implementation: str,
    dtype: torch.dtype,
    B: int,
    K: int,
    temperature: float,
    pairs: Pairs,
    generator: torch.Generator,
) -> None:
    z = torch.randn(2 * B, K, generator=generator).to(device, dtype).requires_grad_()
    ids = torch.randint(0, 2 * B, (B,), generator=generator)
    if B > 1:
        ids[1] = ids[0]  # at least one duplicate
    expected, expected_gradient = definition(z, ids, temperature, pairs)
    if dtype == torch.float64 and implementation == "triton":
        pytest.skip("the kernels are for float32")
    loss = NTXentLoss(temperature, implementation, pairs=pairs)  # type: ignore[arg-type]
    with warnings.catch_warnings(), unwritten_memory_is_nan():
        warnings.simplefilter("error")  # a fall-back would be a failure here
        value = loss(z, ids.to(device))
        (value * SCALE).backward()
    assert z.grad is not None
    assert_it_ran(loss, implementation)
    of_value, of_gradient = TOLERANCES[dtype]
    assert abs(float(value.detach()) - float(expected)) <= of_value * max(1.0, float(expected))
    if B == 1:  # no negatives: nothing to learn
        assert not z.grad.any()
    else:
        assert distance(z.grad / SCALE, expected_gradient) <= of_gradient
    assert int(loss.masked_duplicates) == B - len(ids.unique())


@ways
def test_the_same_rows_give_the_same_bytes(device: str, implementation: str, generator: torch.Generator) -> None:
    """An error that moves from run to run would be a race."""
    z = torch.randn(300, 128, generator=generator).to(device)
    results = set()
    for _ in range(4):
        rows = z.clone().requires_grad_()
        value = NTXentLoss(0.1, implementation)(rows)  # type: ignore[arg-type]
        value.backward()
        assert rows.grad is not None
        results.add(value.detach().cpu().numpy().tobytes() + rows.grad.cpu().numpy().tobytes())
    assert len(results) == 1


@ways
@pytest.mark.parametrize("row_dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("K", [128, 256])
def test_rows_of_16_bits_cost_what_is_documented_and_no_more(
    device: str, implementation: str, row_dtype: torch.dtype, K: int, generator: torch.Generator
) -> None:
    x = torch.randn(150, K, generator=generator)
    x = torch.cat([x, x + 0.7 * torch.randn(150, K, generator=generator)])
    ids = torch.arange(150)
    exact, exact_gradient = definition(x, ids, 0.1)
    z = x.clone().to(device).requires_grad_()
    loss = NTXentLoss(0.1, implementation, row_dtype=row_dtype)  # type: ignore[arg-type]
    value = loss(z)
    value.backward()
    assert_it_ran(loss, implementation)
    assert z.grad is not None
    of_value, of_gradient = ROUNDED[row_dtype]
    assert abs(float(value.detach()) - float(exact)) <= of_value * float(exact)
    assert distance(z.grad, exact_gradient) <= of_gradient

    # On the rounded rows themselves, all that is left is float32's own error, of logits that are up to 10.
    reference = torch.nn.functional.normalize(x, dim=1).to(row_dtype).double()
    s = (reference @ reference.T / 0.1).masked_fill(ids.repeat(2)[:, None] == ids.repeat(2), -torch.inf)
    positive = (reference * reference.roll(150, dims=0)).sum(1) / 0.1
    expected = F.softplus(s.logsumexp(1) - positive).mean()
    assert abs(float(value.detach()) - float(expected)) <= 2e-6 * max(1.0, float(expected))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("device", [CUDA])
def test_a_large_batch_fits_and_agrees_with_float64(
    device: str, implementation: str, pairs: Pairs, generator: torch.Generator
) -> None:
    """16,384 rows: several tiles, every multiprocessor busy; all similarities are 1 GiB, a tile 256 MiB."""
    z = torch.randn(16384, 128, generator=generator).to(device).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = NTXentLoss(0.1, implementation, pairs=pairs)  # type: ignore[arg-type]
    value = loss(z)
    value.backward()
    assert_it_ran(loss, implementation)
    assert torch.cuda.max_memory_allocated() - before < {"tiled": 300 * 2**20, "triton": 2**26}[implementation]
    exact = z.detach().double().requires_grad_()
    expected = NTXentLoss(0.1, "tiled", pairs=pairs)(exact)
    expected.backward()
    assert z.grad is not None
    assert exact.grad is not None
    assert abs(float(value.detach()) - float(expected.detach())) <= 2e-6 * float(expected.detach())
    assert distance(z.grad, exact.grad.cpu()) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Two processes share the device (gloo)


def _loss_on_rank(rank: int, world_size: int, device: str, z: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    B = len(ids) // world_size
    part = slice(rank * B, (rank + 1) * B)
    own = z.unflatten(0, (2, -1))[:, part].flatten(0, 1).to(device).requires_grad_()
    loss = NTXentLoss(0.1, grad_reduction="sum")
    value = loss(own, ids[part].to(device))
    value.backward()
    assert_it_ran(loss, "triton" if device == "cuda" else "tiled")
    assert own.grad is not None
    return float(value.detach()), own.grad.cpu()


@pytest.mark.distributed
@on_every_device
def test_two_processes_on_one_device_have_the_gradient_of_one(device: str, generator: torch.Generator) -> None:
    z, ids = torch.randn(48, 32, generator=generator), torch.arange(24) // 3 * 3
    expected, gradient = definition(z, ids, 0.1)
    answers = run_ranks(2, _loss_on_rank, device, z, ids, timeout_s=120)
    for value, _ in answers:
        assert value == pytest.approx(float(expected), rel=2e-6)
    found = torch.cat([own.unflatten(0, (2, -1)) for _, own in answers], dim=1).flatten(0, 1)
    assert distance(found, gradient) <= 1e-5


def _agree_on_rank(rank: int, world_size: int, device: str) -> list[int]:
    waits = [distributed.agree_on_max(value, torch.device(device)) for value in (rank, 3 - 2 * rank, 0)]
    return [wait() for wait in waits]


@pytest.mark.distributed
@on_every_device
def test_ranks_agree_on_the_strongest_wish(device: str) -> None:
    assert run_ranks(2, _agree_on_rank, device, timeout_s=120) == [[1, 3, 0], [1, 3, 0]]
    assert distributed.agree_on_max(2, torch.device(device))() == 2
