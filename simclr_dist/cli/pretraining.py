"""Pretraining by the launcher, for the commands that continue with its result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def pretrain(config: Path, overrides: Sequence[str], num_processes: int | None) -> int:
    """Runs `python -m launcher local` and returns its exit code. None: a process for each GPU, or two on the CPU."""
    import torch

    num_processes = num_processes or torch.cuda.device_count() or 2
    command = [sys.executable, "-m", "launcher", "local", str(config), "--nproc", str(num_processes), *overrides]
    return subprocess.run(command, check=False).returncode


def score(method: str, run_dir: Path) -> dict[str, Any] | None:
    """What `simclr-dist evaluate METHOD RUN --baselines` finds, by features; None where it has said why it cannot."""
    command = [sys.executable, "-m", "simclr_dist.cli", "evaluate", method, str(run_dir), "--baselines", "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else json.loads(done.stdout)["scores"]
