"""How many threads or workers a process should use."""

from __future__ import annotations

import os
import warnings


def default_num_threads(asked: int | None, local_size: int = 1, setting: str = "data.num_threads") -> int:
    """Threads or processes: as many as `setting` asks for, or the usable CPUs divided by the processes of this node."""
    available = len(os.sched_getaffinity(0))
    if asked is None:
        return max(1, available // local_size)
    if asked > available:
        warnings.warn(
            f"{setting} is {asked}, but this process may use {available} CPUs only (affinity, or SLURM's "
            f"--cpus-per-task); decoding with {available}",
            stacklevel=2,
        )
    return min(asked, available)
