"""The GPU kernels: their arithmetic by triton's interpreter, their compilation for GPUs that are not here, the way
back to the tiles, and (with `-m gpu`) the real thing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from simclr_dist.loss import NTXentLoss, implementations, nt_xent
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.tiled import Tiles

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def run_python(code: str, **environment: str) -> str:
    """Triton decides on import whether it interprets, so each mode has its own process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERPRETED = """
import torch
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.implementations import disagreement
from simclr_dist.loss.tiled import Tiles
from simclr_dist.loss.triton_kernels import Kernels

# rows, width: less than a block and one row more, padded and whole widths, several chunks of columns
for B, V, K, ids in [(1, 2, 3, None), (5, 3, 16, None), (65, 2, 24, None), (100, 2, 32, torch.arange(100) // 3)]:
    z = torch.nn.functional.normalize(torch.randn(V * B, K, generator=torch.Generator().manual_seed(B)), dim=1)
    batch = GlobalBatch(z, lambda: z, ids, torch.ones((), dtype=torch.int64), 0.2, V, 0, 1)
    if B > 1:
        assert disagreement(Kernels(batch, "image"), Tiles(batch, "image")) is None, (B, "image")
    assert disagreement(Kernels(batch, "self"), Tiles(batch, "self")) is None, (B, "self")

# the rows of the second of three ranks
z = torch.nn.functional.normalize(torch.randn(3 * 40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
own = GlobalBatch(z[40:80], lambda: z, None, torch.zeros((), dtype=torch.int64), 0.2, 2, 1, 3)
kernels = Kernels(own, "image")
found = kernels.sums()  # without a process group: of the own rows only
image = torch.arange(120) // 40 * 20 + torch.arange(120) % 20
e = (z @ z.T / 0.2).exp() * (image[:, None] != image)
a = torch.rand(120)
for x, y in ((found, e.sum(1)[40:80]), (kernels.gradient_rows(a), ((e * (a[:, None] + a)) @ z)[40:80])):
    assert (x - y).norm() < 1e-5 * y.norm(), (x, y)
print("agree")
"""


def test_kernels_agree_with_the_tiles_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert run_python(INTERPRETED, TRITON_INTERPRET="1").strip() == "agree"


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from simclr_dist.loss import triton_kernels as kernels

shared = {"own": "*fp32", "all_rows": "*fp32", "own_keys": "*i64", "all_keys": "*i64", "n": "i32", "N": "i32",
          "exp2_scale": "fp32"}
sums = {**shared, "sums": "*fp32", "chunk": "i32"}
gradient = {**shared, "a": "*fp32", "gradient": "*fp32", "chunk": "i32", "own_start": "i32"}
for K, capability in ((128, 90), (200, 80)):
    padded, block = kernels.padded_width_and_block(K)
    constants = {"K": K, "K_PADDED": padded, "BLOCK": block}
    for kernel, signature in ((kernels._sums_kernel, sums), (kernels._gradient_kernel, gradient)):
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=kernels.WARPS_AND_STAGES)
        print(kernel.__name__, K, capability, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper_and_fit_into_their_shared_memory() -> None:
    pytest.importorskip("triton")
    lines = run_python(COMPILED, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 4
    for line in lines:
        _, _, capability, shared_bytes = line.split()
        assert int(shared_bytes) <= {"80": 163 * 1024, "90": 227 * 1024}[capability], line


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    implementations.obstacle_to_triton.cache_clear()


def test_auto_is_tiled_on_a_cpu_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementations.choose("auto", CPU) == "tiled"


def test_triton_without_cuda_falls_back_to_tiled_and_says_so() -> None:
    z = torch.randn(8, 4)
    with pytest.warns(UserWarning, match="uses implementation 'tiled' instead of 'triton': the kernels are for CUDA"):
        loss = nt_xent(z, implementation="triton")
    assert torch.equal(loss, nt_xent(z, implementation="tiled"))


def test_kernels_that_do_not_compile_fall_back_to_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not there stands for a driver or compiler that fails."""
    missing = torch.device("cuda", 99)
    with pytest.warns(UserWarning, match=r"instead of 'triton': \w+: ") as caught:
        assert implementations.choose("auto", missing) == "tiled"
    assert len(caught) == 1


def test_kernels_that_compute_something_else_are_not_used() -> None:
    z = torch.nn.functional.normalize(torch.randn(20, 4), dim=1)
    batch = GlobalBatch(z, lambda: z, None, torch.zeros((), dtype=torch.int64), 0.2, 2, 0, 1)
    warmer = GlobalBatch(z, lambda: z, None, torch.zeros((), dtype=torch.int64), 0.2001, 2, 0, 1)
    assert implementations.disagreement(Tiles(batch, "image"), Tiles(batch, "image")) is None
    assert "its sums are off by" in str(implementations.disagreement(Tiles(warmer, "image"), Tiles(batch, "image")))


def test_what_the_kernels_cannot_do_is_tiled() -> None:
    for dtype, K, temperature in ((torch.float64, 8, 0.1), (torch.float32, 300, 0.1), (torch.float32, 8, 0.01)):
        z = torch.zeros(4, K, dtype=dtype)
        batch = GlobalBatch(z, lambda z=z: z, None, torch.zeros((), dtype=torch.int64), temperature, 2, 0, 1)
        assert isinstance(implementations.exponentials(batch, "image", "triton"), Tiles)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize(("B", "K"), [(1, 128), (37, 100), (2048, 128), (500, 256)])
def test_on_a_gpu_value_and_gradient_are_those_of_float64(implementation: str, B: int, K: int) -> None:
    x = torch.randn(2 * B, K, generator=torch.Generator().manual_seed(B)).cuda()
    ids = torch.arange(B, device="cuda") // 2 * 2
    results = []
    for name, rows in (("plain", x.double()), (implementation, x)):
        rows = rows.clone().requires_grad_()
        loss = NTXentLoss(0.1, name)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fall-back would be a failure here
            value = loss(rows, ids)
        value.backward()
        assert int(loss.masked_duplicates) == B // 2
        assert rows.grad is not None
        results.append((value.detach().double(), rows.grad.double()))
    (expected, expected_gradient), (found, gradient) = results
    assert abs(float(found - expected)) <= 1e-6 * max(1.0, abs(float(expected)))
    assert float((gradient - expected_gradient).norm()) <= 1e-5 * float(expected_gradient.norm())
