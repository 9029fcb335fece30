"""What glibc does with large blocks of memory that were freed."""

from __future__ import annotations

import ctypes

# malloc.h: the option, and its default.
_TRIM_THRESHOLD, _MMAP_MAX = (-1, 128 * 2**10), (-4, 65536)


def keep_freed_memory() -> None:
    """From now on freed blocks stay with this process for its next ones, however large they are.

    A step on the CPU needs the blocks of the step before. By default glibc gives large ones back to Linux, which clears
    each page again at its next use: a fifth of the demo's step on two cores (benchmarks/cpu_step.py). So the process
    keeps the most that it ever held. With another libc this does nothing.
    """
    _set(trim_threshold=-1, mmap_max=0)


def free_as_usual() -> None:
    """Takes `keep_freed_memory` back, and returns what was kept."""
    _set(_TRIM_THRESHOLD[1], _MMAP_MAX[1])
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _set(trim_threshold: int, mmap_max: int) -> None:
    if (libc := _glibc()) is not None:
        libc.mallopt(_TRIM_THRESHOLD[0], trim_threshold)
        libc.mallopt(_MMAP_MAX[0], mmap_max)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
