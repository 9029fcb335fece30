"""The GPU kernels without a GPU: their arithmetic by triton's interpreter, and the choice between them and the tiles.

Several ranks: tests/distributed/test_loss_kernels.py. Compilation: test_loss_compiled.py. On a GPU: test_gpu_loss.py.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from simclr_dist.config import load_config
from simclr_dist.loss import NTXentLoss, implementations, nt_xent
from simclr_dist.loss.batch import GlobalBatch
from simclr_dist.loss.enumeration import Pairs
from simclr_dist.loss.implementations import Choice, choose
from simclr_dist.loss.tiled import Tiles
from simclr_dist.parallel.distributed import World
from simclr_dist.training import parts
from tests.conftest import REPOSITORY
from tests.distributed.spawn import run_ranks
from tests.interpreter import use_interpreter

pytest.importorskip("triton")
CPU = torch.device("cpu")
KERNEL = {"dtype": torch.float32, "width": 128, "temperature": 0.1, "num_all_rows": 64, "row_dtype": torch.float32}


def unit_rows(n: int, K: int, row_dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    rows = torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1).to(row_dtype).float()


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic

# B, V, K, whether there are duplicates, row dtype, what is hidden, pairs: less than a block and more, padded widths and
# whole ones, the width whose blocks are the smallest; one image, which is one key for all rows
BATCHES = [
    (1, 2, 3, False, torch.float32, "image", "within"),
    (5, 3, 16, True, torch.float32, "image", "within"),
    (5, 3, 16, True, torch.float32, "self", "within"),
    (33, 2, 24, True, torch.bfloat16, "image", "within"),
    (24, 2, 200, False, torch.float32, "image", "within"),
    (1, 2, 3, False, torch.float32, "image", "across"),
    (70, 2, 24, True, torch.float32, "image", "across"),
]


def errors_in_the_interpreter(rank: int, world_size: int) -> list[tuple[float, float]]:
    """Of the sums and of the gradient, for each batch: against float64 on the same rows."""
    use_interpreter()
    from simclr_dist.loss.triton_kernels import Kernels

    found = []
    for B, V, K, duplicates, row_dtype, hide, pairs in BATCHES:
        z = unit_rows(V * B, K, row_dtype)
        ids = torch.arange(B) // (2 if duplicates else 1) + 2**40
        kernels = Kernels(GlobalBatch(z, lambda z=z: z, ids, 0.2, V, row_dtype=row_dtype, pairs=pairs), hide)
        keys = ids.repeat(V) if hide == "image" else torch.arange(V * B)
        e = (z.double() @ z.double().T / 0.2).exp() * (keys[:, None] != keys)
        if pairs == "across":
            view = torch.arange(V).repeat_interleave(B)
            e = e * (view[:, None] != view)
        sums = kernels.sums()
        a = 1 / e.sum(1).clamp(min=1e-30) * (e.sum(1) > 0)
        gradient = kernels.gradient_rows(a.float())
        expected = (e * (a[:, None] + a)) @ z.double()
        found.append((_error(sums, e.sum(1)), _error(gradient, expected)))
    return found


def _error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm().clamp(min=1e-30))


def test_kernels_are_as_exact_as_float32_in_the_interpreter() -> None:
    [found] = run_ranks(1, errors_in_the_interpreter, timeout_s=120)
    for errors, batch in zip(found, BATCHES, strict=True):
        assert max(errors) < 1e-6, batch


def counted_products(rank: int, world_size: int, parts: int, pairs: Pairs) -> dict[str, int]:
    """Floating-point operations of the matrix products, by kernel, for four tiles of 64 x 64."""
    use_interpreter()
    from triton.runtime.interpreter import interpreter_builder

    from simclr_dist.loss.triton_kernels import Kernels

    counted: Counter[str] = Counter()
    create_dot = interpreter_builder.create_dot

    def count(a: Any, b: Any, *args: Any) -> Any:
        counted[kernel] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(a, b, *args)

    z, row_dtype = unit_rows(128, 16), torch.float32 if parts == 2 else torch.bfloat16
    kernels = Kernels(GlobalBatch(z, lambda: z, None, 0.2, 2, row_dtype=row_dtype, pairs=pairs), "image")
    with mock.patch.object(interpreter_builder, "create_dot", count):
        kernel = "sums"
        sums = kernels.sums()
        kernel = "gradient"
        kernels.gradient_rows(1 / sums)
    return dict(counted)


@pytest.mark.parametrize(("parts", "sums", "gradient"), [(2, 3, 6), (1, 1, 3)])
def test_rows_of_16_bits_need_4_products_instead_of_9(parts: int, sums: int, gradient: int) -> None:
    """At N = 65,536 and K = 128: 4.4 TFLOP instead of 9.9."""
    product = 4 * 2 * 64 * 64 * 16
    found = run_ranks(1, counted_products, parts, "within")
    assert found == [{"sums": sums * product, "gradient": gradient * product}]
    assert run_ranks(1, counted_products, parts, "across") == [{name: n // 2 for name, n in found[0].items()}]
    of_n_65536 = 2 * 65536**2 * 128 * (sums + gradient) / 1e12
    assert of_n_65536 == pytest.approx({2: 9.9, 1: 4.4}[parts], abs=0.05)


@pytest.mark.parametrize(("B", "V", "W"), [(1, 2, 1), (1, 3, 1), (1, 2, 2), (5, 2, 1)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_what_kernels_read_lies_in_memory_as_they_read_it(B: int, V: int, W: int, with_ids: bool) -> None:
    """One image on one process was one key with a stride of 0: the kernel read past its end."""
    from simclr_dist.loss.triton_kernels import Kernels

    z = unit_rows(V * B, 4)
    batch = GlobalBatch(z, lambda: z.repeat(W, 1), torch.arange(B * W) if with_ids else None, 0.2, V, 0, W)
    keys = Kernels(batch, "image").keys
    assert keys.is_contiguous()
    assert keys.dtype == torch.int32
    assert keys.tolist() == (torch.arange(B * W).view(W, 1, B).expand(W, V, B)).flatten().tolist()


def test_columns_are_cut_so_that_no_multiprocessor_waits() -> None:
    from simclr_dist.loss.triton_kernels import num_chunks

    assert num_chunks(8, 8, 132) == 8  # N = 1,024: no more chunks than blocks of columns
    assert num_chunks(512, 512, 132) == 1  # N = 65,536: 3.88 rounds, of which 97 % is work
    assert (
        num_chunks(160, 160, 132) == 4
    )  # 160 programs in two rounds would leave 104 multiprocessors out of the second
    for row_blocks in range(1, 300):
        chunks = num_chunks(row_blocks, 1000, 132)
        assert row_blocks * chunks / (132 * -(-row_blocks * chunks // 132)) > 0.85


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    implementations.obstacle_to_triton.cache_clear()


def test_auto_is_tiled_on_a_cpu_without_a_word() -> None:
    assert choose("auto", CPU, **KERNEL) == Choice("tiled")
    loss = NTXentLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.randn(8, 4))
    assert str(loss.choice) == "tiled"


def test_triton_without_cuda_falls_back_to_tiled_and_says_so() -> None:
    z, loss = torch.randn(8, 4), NTXentLoss(0.1, "triton")
    why = "tiled instead of triton: the kernels are for CUDA, z is on cpu"
    with pytest.warns(UserWarning, match=f"the loss uses {why}"):
        value = loss(z)
    assert torch.equal(value, nt_xent(z, implementation="tiled"))
    assert str(loss.choice) == why


def test_kernels_that_do_not_compile_fall_back_to_tiled() -> None:
    """A device that is not there stands for a driver or compiler that fails."""
    choice = choose("auto", torch.device("cuda", 99), **KERNEL)
    assert choice.code == "tiled"
    assert ": " in choice.reason


def test_kernels_that_compute_something_else_are_not_used() -> None:
    z = unit_rows(20, 4)
    batch, warmer = (GlobalBatch(z, lambda: z, None, temperature, 2) for temperature in (0.2, 0.2001))
    assert implementations.disagreement(Tiles(batch, "image"), Tiles(batch, "image")) is None
    assert "its sums are off by" in str(implementations.disagreement(Tiles(warmer, "image"), Tiles(batch, "image")))


@pytest.mark.parametrize(
    ("problem", "code", "reason"),
    [
        ({}, "triton", ""),
        ({"row_dtype": torch.bfloat16}, "triton", ""),
        ({"dtype": torch.float64}, "tiled", "z is float64, the kernels are for float32"),
        ({"width": 300}, "tiled", "z has the width 300, the kernels end at 256"),
        ({"temperature": 0.01}, "tiled in float64", r"exp(1/temperature) at temperature 0.01 exceeds float32"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_what_the_kernels_cannot_do_is_tiled_for_a_reason(
    name: str, problem: dict, code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementations, "obstacle_to_triton", lambda *_: None)
    choice = choose(name, torch.device("cuda"), **{**KERNEL, **problem})
    assert (choice.code, choice.reason) == (code, reason)


def test_rows_that_were_rounded_are_part_of_what_is_said() -> None:
    assert str(Choice("triton", torch.bfloat16)) == "triton on bfloat16 rows"
    assert str(Choice("tiled", reason="no driver")) == "tiled instead of triton: no driver"
    loss = NTXentLoss(row_dtype=torch.float16)
    loss(torch.randn(8, 4))
    assert str(loss.choice) == "tiled on float16 rows"


def test_a_training_that_asks_for_what_is_not_there_says_what_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["loss.implementation=triton", "loss.row_dtype=bfloat16"]
    config = load_config(REPOSITORY / "configs" / "smoke.yaml", overrides)
    nt_xent, name = parts._build_loss(config, World(), CPU)
    assert name == "tiled on bfloat16 rows"
    why = "tiled on bfloat16 rows instead of triton: the kernels are for CUDA, z is on cpu"
    assert capsys.readouterr().err == f"warning: loss.implementation: {why}\n"
    nt_xent(torch.randn(8, 4))  # which says nothing more
    assert str(nt_xent.choice) == why
