"""Pretraining by the launcher, for the commands that continue with its result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def pretrain(config: Path, overrides: Sequence[str], num_processes: int | None) -> int:
    """Runs `python -m launcher local` and returns its exit code. None: a process for each GPU, or two on the CPU."""
    import torch

    num_processes = num_processes or torch.cuda.device_count() or 2
    command = [sys.executable, "-m", "launcher", "local", str(config), "--nproc", str(num_processes), *overrides]
    return subprocess.run(command, check=False).returncode
