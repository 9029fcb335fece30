"""`status.json`: how a run stands, for people and launchers. Exit codes cannot tell them: accelerate and torchrun turn
every code of a worker into 1.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from simclr_dist.errors import Reason
from simclr_dist.run.layout import RunDir, is_a, read_record, write_record
from simclr_dist.safe_text import mask

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
    reason: Reason | Literal["preflight", "unfit"] | None = None,
    message: str = "",
    attempt: str | None = None,
) -> None:
    """Replaces the file as a whole. A file that cannot be written is no error.

    reason: `preflight`: the launcher found nodes that cannot train together; `unfit`: for a reason that all of them
    share. attempt: None: this process's own.
    """
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status = Status(state, reason or "", step, attempt or attempt_name(), mask(message), written)
    with suppress(OSError):
        write_record(RunDir(run_dir).status, {**asdict(status), "reason": reason})


def read_status(run_dir: Path) -> Status | None:
    """None where there is no readable status yet."""
    values = read_record(RunDir(run_dir).status) or {}
    step = values.get("step")
    if not is_a(values.get("state"), str) or not is_a(step, int | None):
        return None
    texts = {key: str(values.get(key) or "") for key in ("reason", "attempt", "message", "time")}
    return Status(state=values["state"], step=step or 0, **texts)


def has_failed(run_dir: Path) -> bool:
    """Whether some rank has already reported why this start of the run fails."""
    status = read_status(run_dir)
    return status is not None and status.state == "failed"


def attempt_name() -> str:
    """The name of this start of the run: the launcher's, or one made from the process number."""
    return os.environ.get("SIMCLR_ATTEMPT") or f"pid{os.getpid()}"
