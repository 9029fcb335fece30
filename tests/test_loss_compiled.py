"""The kernels of the loss, compiled for GPUs that are not here: what a program needs there, and which products it uses.

A program whose numbers do not fit into its registers keeps them in memory ("stack"), and is several times slower;
one that needs more shared memory than there is does not start.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from simclr_dist.loss import triton_kernels  # noqa: E402
from simclr_dist.loss.triton_kernels import ACCUMULATES_IN_PLACE, choose_tile, constants  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cuobjdump comes with triton's wheel for Linux")

SHARED_KIB = {80: 163, 90: 227, 100: 227}
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma" if ACCUMULATES_IN_PLACE else "mma.sync"}
KERNELS = {"sums": triton_kernels._sums_kernel, "gradient": triton_kernels._gradient_kernel}


def compiled(name: str, *, capability: int, K: int, parts: int) -> triton.compiler.CompiledKernel:
    """As it is compiled at the first call: pointers to the start of a tensor, numbers that may be anything."""
    kernel, tile = KERNELS[name], choose_tile(K, parts, capability // 10)
    tensors = {"rows": "*fp16", "keys": "*i32", "sums": "*fp32", "a": "*fp32", "gradient": "*fp32"}
    fixed = constants(K, parts, tile)
    types = {**dict.fromkeys(fixed, "constexpr"), **tensors, "exp2_scale": "fp32"}
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in tensors}
    source = triton.compiler.ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tile.options())


def stack_bytes(program: triton.compiler.CompiledKernel) -> int:
    [tool] = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("cuobjdump*")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(program.asm["cubin"])
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    [found] = re.findall(r"STACK:(\d+)", report)
    return int(found)


def check(name: str, *, capability: int, K: int, parts: int) -> None:
    program, what = compiled(name, capability=capability, K=K, parts=parts), f"{name} K={K} parts={parts}"
    assert PRODUCTS[capability] in program.asm["ptx"], what
    assert stack_bytes(program) == 0, what
    assert program.metadata.shared <= 1024 * SHARED_KIB[capability], what
    assert getattr(program.metadata, "tmem_size", 0) <= 512, what


@pytest.mark.parametrize("parts", [1, 2])
def test_on_hopper_the_kernels_use_its_own_products_and_keep_numbers_in_registers(parts: int) -> None:
    check("gradient", capability=90, K=128, parts=parts)


@pytest.mark.slow
@pytest.mark.parametrize("K", [16, 64, 128, 256])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_on_every_gpu_the_kernels_keep_their_numbers_in_registers(capability: int, K: int) -> None:
    for name in KERNELS:
        for parts in (1, 2):
            check(name, capability=capability, K=K, parts=parts)
