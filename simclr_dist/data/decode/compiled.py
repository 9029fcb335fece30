"""Compiles a function with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(signature: Any, **options: Any) -> Callable[[Callable], Callable]:
    """Compiles for one signature when the module is imported, or loads the machine code from disk.

    Without a signature numba would compile again for each array layout (contiguous or strided) that it first meets.
    The code runs without the GIL.
    """
    jit: Any = njit

    def decorate(function: Callable) -> Callable:
        try:
            return jit(signature, nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no folder to keep machine code in: compile in every process
            return jit(signature, nogil=True, error_model="numpy", **options)(function)

    return decorate
