"""The same test on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

NO_CUDA = "no CUDA device: `pytest -m gpu` on a machine with one runs this"
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)]
CUDA = pytest.param("cuda", marks=needs_cuda)
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


@contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fresh tensors hold NaN instead of what happens to be there: a kernel that leaves an element out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
