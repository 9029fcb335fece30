"""How many threads or workers a process should use."""

from __future__ import annotations

import os
import warnings


def default_num_threads(asked: int | None, local_size: int = 1) -> int:
    """Threads for decoding: `asked`, or the usable CPUs divided by the processes of this node."""
    available = len(os.sched_getaffinity(0))
    if asked is None:
        return max(1, available // local_size)
    if asked > available:
        warnings.warn(
            f"data.num_threads is {asked}, but this process may use {available} CPUs only (affinity, or SLURM's "
            f"--cpus-per-task); decoding with {available} threads",
            stacklevel=2,
        )
    return min(asked, available)
