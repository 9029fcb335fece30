"""Compiles a function with numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cfunc, njit


def compiled(signature: Any, **options: Any) -> Callable[[Callable], Callable]:
    """Compiles for one signature when the module is imported, or loads the machine code from disk.

    Without a signature numba would compile again for each array layout (contiguous or strided) that it first meets.
    The code runs without the GIL.
    """
    return _compiled(njit, signature, nogil=True, error_model="numpy", **options)


def compiled_for_c(signature: Any) -> Callable[[Callable], Any]:
    """Compiles a function that C calls at the result's `address`."""
    return _compiled(cfunc, signature)


def _compiled(compiler: Any, signature: Any, **options: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Callable:
        try:
            return compiler(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder to keep machine code in: compile in every process
            return compiler(signature, **options)(function)

    return decorate
