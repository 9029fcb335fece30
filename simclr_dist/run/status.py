"""`status.json`: how a run stands, for people, launchers and schedulers. Exit codes cannot carry it: accelerate and
torchrun turn each of them into 1.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from simclr_dist.errors import Reason
from simclr_dist.run.layout import RunDir, read_record

State = Literal["running", "finished", "preempted", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """The content of status.json. `reason` and `message` say why a failed run failed."""

    state: str
    reason: str = ""
    step: int = 0
    attempt: str = ""
    message: str = ""
    time: str = ""


def write_status(
    run_dir: Path,
    state: State,
    *,
    step: int,
    reason: Reason | Literal["preflight"] | None = None,
    message: str = "",
    attempt: str | None = None,
) -> None:
    """Replaces the file as a whole; a run directory that has vanished is no further error.

    attempt: None means this process's own (`attempt_name`).
    """
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status = Status(state, reason or "", step, attempt or attempt_name(), message, written)
    temporary = run_dir / f".status.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps({**asdict(status), "reason": reason}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, RunDir(run_dir).status)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_status(run_dir: Path) -> Status | None:
    """None where there is no readable status yet."""
    values = read_record(RunDir(run_dir).status)
    if values is None or "state" not in values:
        return None
    try:
        return Status(
            state=str(values["state"]),
            reason=str(values.get("reason") or ""),
            step=int(values.get("step") or 0),
            attempt=str(values.get("attempt") or ""),
            message=str(values.get("message") or ""),
            time=str(values.get("time") or ""),
        )
    except (ValueError, TypeError):
        return None


def has_failed(run_dir: Path) -> bool:
    """Has some rank said already why this start of the run fails?"""
    status = read_status(run_dir)
    return status is not None and status.state == "failed"


def attempt_name() -> str:
    """Names this start of the run; a launcher may give it."""
    return os.environ.get("SIMCLR_ATTEMPT") or f"pid{os.getpid()}"
