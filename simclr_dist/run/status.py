"""`status.json`: how a run stands, for people, launchers and schedulers. Exit codes cannot carry it: accelerate and
torchrun turn each of them into 1.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

from simclr_dist.errors import Reason

State = Literal["running", "finished", "preempted", "stopped", "failed"]


def write_status(run_dir: Path, state: State, *, step: int, reason: Reason | None = None, message: str = "") -> None:
    """Replaces the file as a whole; a run directory that has vanished is no further error."""
    content = {
        "state": state,
        "reason": reason,
        "step": step,
        "message": message,
        "attempt": attempt_name(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    temporary = run_dir / f".status.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, run_dir / "status.json")
    except OSError:
        temporary.unlink(missing_ok=True)


def has_failed(run_dir: Path) -> bool:
    """Has some rank said already why this start of the run fails?"""
    try:
        return bool(json.loads((run_dir / "status.json").read_text())["state"] == "failed")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def attempt_name() -> str:
    """Names this start of the run; a launcher may give it."""
    return os.environ.get("SIMCLR_ATTEMPT") or f"pid{os.getpid()}"
