"""The GPU's kernels of the augmentation: their arithmetic by triton's interpreter, what a step launches, what they need
on GPUs that are not here, the way back to torch's operations, and (with `-m gpu`) the real thing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_dist.config import AugmentConfig
from simclr_dist.data.batch import Batch
from simclr_dist.errors import ConfigError, FailedElsewhereError
from simclr_dist.parallel.agree import agree
from simclr_dist.views import implementations, torch_operations
from simclr_dist.views.augment import Augment
from tests.conftest import REPOSITORY
from tests.devices import needs_cuda
from tests.distributed.spawn import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _ask_anew() -> Iterator[None]:
    yield
    implementations.choose.cache_clear()
    implementations.obstacle.cache_clear()


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


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic

INTERPRETED = """
from dataclasses import replace
import numpy as np
import torch
from simclr_dist.views import implementations, torch_operations, triton_kernel
from simclr_dist.views.parameters import _ORDERS, draw_parameters
from simclr_dist.views.presets import blur_kernel_size, resolve_augmentation
from simclr_dist.config import AugmentConfig


def views(kernels, images, parameters, kernel_size):
    out = torch.full(images.shape, torch.nan)
    kernels.augment_views(images, out, parameters, kernel_size)
    return out


def check(preset, side, B, *, block=1024, tiles=((32, 32), (8, 128)), kernel_size=None, num_views=2, **changes):
    \"\"\"What takes the interpreter's time is the number of programs: large images are cut into few.\"\"\"
    triton_kernel._BLOCK, triton_kernel._COLUMN_TILE, triton_kernel._ROW_TILE = block, *tiles
    augmentation = resolve_augmentation(AugmentConfig(preset=preset))
    parameters = replace(draw_parameters(augmentation, 1, 0, np.arange(B), num_views=num_views), **changes)
    images = torch.randint(0, 256, (num_views * B, side, side, 3), dtype=torch.uint8)
    images[0, ..., :2] = images[0, ..., 1:]  # ties between channels
    images[-1] = images[-1, :1, :1]  # one colour
    before, kernel_size = images.clone(), kernel_size or blur_kernel_size(side)
    found = views(triton_kernel, images, parameters, kernel_size)
    torch.testing.assert_close(found, views(torch_operations, images, parameters, kernel_size), atol=2e-5, rtol=0)
    assert torch.equal(images, before)
    return images, parameters, found


yes, halves = np.ones(24, bool), np.arange(24) % 2 > 0
# every order of the jitter, with every hue
every = {"order": _ORDERS, "jitter": yes, "hue": np.linspace(-0.5, 0.5, 24), "solarize": halves}
check("simclr_imagenet", 12, 12, kernel_size=1, **every)
images, parameters, found = check("asymmetric", 32, 3)
check("asymmetric", 12, 2, num_views=3, kernel_size=3)
check("simclr_cifar", 33, 1)  # two blocks of pixels, the second hardly filled
of_both = {"blur": yes[:2], "solarize": halves[:2]}
check("simclr_imagenet", 97, 1, block=4096, tiles=((64, 256), (64, 256)), **of_both)  # the image does not fill these
check("asymmetric", 96, 1, block=16384, tiles=((128, 512), (64, 512)))
check("simclr_imagenet", 224, 1, block=32768, tiles=((256, 1024), (256, 1024)), blur=halves[:2])

triton_kernel._BLOCK, triton_kernel._COLUMN_TILE, triton_kernel._ROW_TILE = 1024, (32, 32), (8, 128)
half = replace(parameters, **{name: value[3:5] for name, value in vars(parameters).items()})
assert torch.equal(views(triton_kernel, images[3:5], half, 3), found[3:5])  # a view does not depend on its company

assert implementations.disagreement(triton_kernel.augment_views, torch.device("cpu"), 8) is None
print("agree")
"""


def test_the_kernels_views_are_those_of_torchs_operations_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert run_python(INTERPRETED, TRITON_INTERPRET="1").strip() == "agree"


# ---------------------------------------------------------------------------------------------------------------------
# What a step does on a GPU, on one that is not there


class Trace(TorchDispatchMode):
    """What is launched on the device, with the shapes that it reads and writes; what the host sends and reads.

    num_bytes: of all tensors of the kernels, as if every view were blurred.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, list[tuple[int, ...]]]] = []
        self.num_bytes = 0
        self.sent = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operations.add(name)
        self.sent += name in ("_to_copy", "copy_") and args[-1].device.type == "cpu"
        if not function.is_view and not name.startswith(("empty", "device", "lift_fresh")):
            self.launch(name, *tree_leaves((args, kwargs, out)))
        return out

    def launch(self, name: str, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if any(t.is_cuda for t in tensors):
            self.launches.append((name, [tuple(t.shape) for t in tensors]))
            self.num_bytes += sum(t.nbytes for t in tensors)


@contextmanager
def pretended_gpu() -> Iterator[Trace]:
    jit = pytest.importorskip("triton.runtime.jit")
    trace = Trace()

    def run(kernel: Any, *args: Any, **_: Any) -> None:
        trace.launch(kernel.__name__, *args)

    with (
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(Tensor, "pin_memory", lambda x: x),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(implementations, "obstacle", return_value=None),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield trace


def augment_on_gpu(preset: str, side: int, B: int, epoch: int, implementation: str = "auto") -> Trace:
    with pretended_gpu() as trace:
        ids = torch.empty(B, dtype=torch.int64, device=CUDA)
        views = torch.empty(2, B, side, side, 3, dtype=torch.uint8, device=CUDA)
        augment = Augment(AugmentConfig(preset=preset), 0, side, implementation)
        with trace:
            out = augment(Batch(views, ids, ids, epoch, np.arange(B)))
        assert (out.device, out.dtype, tuple(out.shape)) == (CUDA, torch.float32, (2, B, 3, side, side))
        assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    return trace


READS = {"_local_scalar_dense", "nonzero", "masked_select", "item"}


@pytest.mark.parametrize(
    ("preset", "side", "kernels"), [("simclr_cifar", 32, 2), ("simclr_imagenet", 224, 4), ("asymmetric", 97, 4)]
)
def test_on_a_gpu_a_step_is_a_few_launches_whatever_is_drawn(preset: str, side: int, kernels: int) -> None:
    """One copy of the table to the device, no read, and the same shapes at every draw: a CUDA graph could hold it."""
    trace = augment_on_gpu(preset, side, 64, epoch=0)
    assert trace.launches == augment_on_gpu(preset, side, 64, epoch=1).launches
    assert not trace.operations & READS
    assert trace.sent == 1
    assert len(trace.launches) == 1 + kernels, [name for name, _ in trace.launches]
    # docs/gpu.md: a value's byte is read twice and its float written once; each of the two passes of the blur adds 8.
    values = 2 * 64 * side * side * 3
    assert trace.num_bytes == pytest.approx(values * (6 if kernels == 2 else 22), rel=0.02)


def test_torchs_operations_never_make_the_host_wait_for_a_gpu() -> None:
    assert not augment_on_gpu("asymmetric", 32, 16, 0, "torch").operations & READS


# ---------------------------------------------------------------------------------------------------------------------
# Compilation for GPUs that are not there

COMPILED = """
import glob, json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from simclr_dist.views import triton_kernel as kernels

cuobjdump = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
pointers = {"images": "*u8", "table": "*fp32", "sums": "*fp32", "out": "*fp32", "source": "*fp32", "target": "*fp32"}
pixels = {"SIDE": 224, "BLOCK": kernels._BLOCK}
blur = {"SIDE": 224, "REACH": 11}
columns, rows = ({"ROWS": tile[0], "NUMBERS": tile[1]} for tile in (kernels._COLUMN_TILE, kernels._ROW_TILE))
for capability in (80, 90, 100):
    for kernel, constants in (
        (kernels._gray_sums_kernel, pixels),
        (kernels._colours_kernel, {**pixels, "BLOCKS_PADDED": 64, "BLURS": True}),
        (kernels._blur_kernel, {**blur, **columns, "DOWN": True}),
        (kernels._blur_kernel, {**blur, **rows, "DOWN": False}),
    ):
        names = [parameter.name for parameter in kernel.params]
        signature = {name: "constexpr" if name in constants else pointers[name] for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [cuobjdump, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall("(REG|STACK|LOCAL|SHARED):([0-9]+)", usage)}
        print(json.dumps({"kernel": kernel.__name__, "capability": capability, **found}))
"""


@pytest.mark.slow
def test_the_kernels_need_few_registers_and_no_stack_from_ampere_to_blackwell() -> None:
    pytest.importorskip("triton")
    lines = [json.loads(line) for line in run_python(COMPILED, TRITON_INTERPRET="0").splitlines()]
    assert len(lines) == 12
    for found in lines:
        assert found["STACK"] == found["LOCAL"] == 0, found
        assert found["REG"] <= 96, found  # 5 programs of 128 threads share the 65,536 of a multiprocessor
        assert found["SHARED"] <= 2048, found


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_auto_on_a_cpu_is_numba_without_a_word() -> None:
    pytest.importorskip("numba")
    assert implementations.best(CPU) == "numba"
    assert implementations.obstacle("numba", CPU, 32) is None
    assert implementations.best(CUDA) == "triton"


def test_kernels_that_cannot_run_give_way_to_torchs_operations_with_a_warning() -> None:
    """A device that is not there stands for a driver or compiler that fails."""
    missing = torch.device("cuda", 99)
    with pytest.warns(UserWarning, match=r"uses implementation 'torch' instead of 'triton': \w+: "):
        assert implementations.choose("auto", missing, 32) is torch_operations.augment_views
    images = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)
    with pytest.warns(UserWarning, match="instead of 'triton': it is for cuda, the images are on cpu"):
        found = Augment(AugmentConfig(implementation="triton"), 0, 8)(batch)
    torch.testing.assert_close(found, Augment(AugmentConfig(implementation="torch"), 0, 8)(batch))


def test_without_numba_a_cpu_says_that_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simclr_dist.views.cpu_kernel", None)  # importing it fails
    with pytest.warns(UserWarning, match="'torch' instead of 'numba': ModuleNotFoundError"):
        assert implementations.choose("auto", CPU, 33) is torch_operations.augment_views


def test_kernels_that_compute_something_else_are_not_used() -> None:
    def a_little_brighter(images: Tensor, out: Tensor, *arguments: Any) -> None:
        torch_operations.augment_views(images, out, *arguments)
        out += 1e-3

    def half_done(images: Tensor, out: Tensor, *arguments: Any) -> None:
        whole = torch.empty_like(out)
        torch_operations.augment_views(images, whole, *arguments)
        out[::2] = whole[::2]

    assert implementations.disagreement(torch_operations.augment_views, CPU, 20) is None
    assert implementations.disagreement(a_little_brighter, CPU, 20) == "its views are off by 1.0e-03"
    assert implementations.disagreement(half_done, CPU, 20) == "its views are off by nan"


def settle(wanted: str, obstacle: Callable[[str], str | None]) -> tuple[str, list[str]]:
    said: list[str] = []
    best = SimpleNamespace(best="triton", fallback="torch", obstacle=obstacle, device=CPU, warn=said.append)
    return agree("augment.implementation", wanted, **vars(best)), said


def _agreed(rank: int, world_size: int) -> tuple[tuple[str, list[str]], str]:
    def obstacle(name: str) -> str | None:
        return "no compiler" if rank == 1 and name == "triton" else None

    with pytest.raises((ConfigError, FailedElsewhereError)) as refused:
        settle("triton", obstacle)
    return settle("auto", obstacle), refused.type.__name__


@pytest.mark.distributed
def test_all_ranks_use_the_same_although_one_alone_cannot() -> None:
    said = ["augment.implementation: torch is used instead of triton, which does not work on rank 1: no compiler"]
    agreed, refused = zip(*run_ranks(2, _agreed), strict=True)
    assert agreed == (("torch", said),) * 2
    assert refused == ("FailedElsewhereError", "ConfigError")  # one rank tells


def test_what_was_asked_for_by_name_is_used_or_refused() -> None:
    assert settle("auto", lambda _: None) == ("triton", [])
    assert settle("torch", lambda name: None if name == "torch" else "no compiler") == ("torch", [])
    with pytest.raises(ConfigError, match=r"augment.implementation: triton does not work here: no GPU; `auto` takes"):
        settle("triton", lambda _: "no GPU")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("implementation", "tolerance"), [("auto", 1e-4), ("torch", 2e-3)])  # cuDNN blurs in TF32
@pytest.mark.parametrize(("preset", "side"), [("simclr_cifar", 32), ("simclr_imagenet", 224), ("asymmetric", 97)])
def test_on_a_gpu_views_are_the_cpus(
    device: str, implementation: str, tolerance: float, preset: str, side: int
) -> None:
    """A fall-back would warn, which is an error here."""
    shape = (2, 16, side, side, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(16)
    batch, config = Batch(images, ids, ids, 0), AugmentConfig(preset=preset)
    expected = Augment(config, 0, side)(batch)
    augment = Augment(config, 0, side, implementation)
    found = [augment(batch.to(device)) for _ in range(2)]
    torch.testing.assert_close(found[0].cpu(), expected, atol=tolerance, rtol=0)
    assert torch.equal(*found)  # no order of additions is left to chance
