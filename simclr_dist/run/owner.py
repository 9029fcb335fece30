"""One run directory, one training: `RUN/owner.json` says whose it is.

Whoever comes second is refused while the owner lives. It has died if its process is gone, or, where that cannot be seen
from here, if it has not touched the file for STALE_S. A later attempt of the same job does not wait: its scheduler has
given the earlier one up. What is left of that one (a node that was only cut off) finds another name in the file before
its next write and stops.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from simclr_dist.errors import OwnershipError
from simclr_dist.run.process import Process
from simclr_dist.run.status import attempt_name

STALE_S = 60.0
TOUCH_EVERY_S = 10.0


@dataclass(frozen=True)
class _Entry:
    session: str
    attempt: str
    since: str
    process: Process

    def __str__(self) -> str:
        return f"{self.process}, attempt {self.attempt}, since {self.since}"


class Ownership:
    """What `claim` gives: the right to write into `run_dir`."""

    def __init__(self, run_dir: Path, session: str) -> None:
        self.run_dir = run_dir
        self.session = session
        """Names this start of the run, at random: twelve hexadecimal digits."""

    def check(self) -> None:
        """Raises OwnershipError if another training has taken over, OSError if the file cannot be read."""
        entry = _parse((self.run_dir / "owner.json").read_text(encoding="utf-8"))
        if entry is None or entry.session != self.session:
            raise OwnershipError(
                f"{self.run_dir}: taken over by {entry or 'somebody unknown'}; this training stops and writes no more"
            )

    def touch(self) -> None:
        """A sign of life, to be given every TOUCH_EVERY_S. Raises as `check` does."""
        self.check()
        os.utime(self.run_dir / "owner.json")

    def release(self) -> None:
        """Lets the next one in. No error if the directory is gone or somebody else's."""
        with suppress(OSError, OwnershipError), _taking_turns(self.run_dir):
            self.check()
            (self.run_dir / "owner.json").unlink()


def claim(run_dir: Path) -> Ownership:
    """Makes this process the owner of `run_dir`, which exists. Raises OwnershipError that names a living owner."""
    with _taking_turns(run_dir):
        holder = _read(run_dir)
        if holder is not None and not _has_ended(run_dir, holder) and not _follows(attempt_name(), holder.attempt):
            raise OwnershipError(
                f"{run_dir}: already being trained by {holder}. Stop that one first (touch {run_dir}/STOP), or give "
                f"this run another name=…"
            )
        entry = _Entry(secrets.token_hex(6), attempt_name(), time.strftime("%Y-%m-%d %H:%M:%S"), Process.this())
        temporary = run_dir / f".owner.{entry.session}.tmp"
        temporary.write_text(json.dumps(asdict(entry), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, run_dir / "owner.json")
    return Ownership(run_dir, entry.session)


def _has_ended(run_dir: Path, holder: _Entry) -> bool:
    fate = holder.process.fate()
    if fate == "unknown":
        return _file_system_time(run_dir) - (run_dir / "owner.json").stat().st_mtime > STALE_S
    return fate == "dead"


def _follows(attempt: str, other: str) -> bool:
    """Are both attempts JOB.RESTART-NONCE of one job, and `attempt` the later one?"""
    mine, theirs = (re.fullmatch(r"(.+)\.(\d+)-[0-9a-f]+", name) for name in (attempt, other))
    return mine is not None and theirs is not None and mine[1] == theirs[1] and int(mine[2]) > int(theirs[2])


def _file_system_time(folder: Path) -> float:
    """Now, by the clock that dates files in `folder`: machines' own clocks differ, and jump."""
    probe = folder / f".time.{os.getpid()}.{secrets.token_hex(3)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _taking_turns(run_dir: Path) -> Iterator[None]:
    """Two that come at the same moment come one after the other; where the file system has no locks, the later wins."""
    with (run_dir / ".owner.lock").open("a", encoding="utf-8") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(run_dir: Path) -> _Entry | None:
    try:
        return _parse((run_dir / "owner.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _parse(text: str) -> _Entry | None:
    try:
        values = json.loads(text)
        return _Entry(
            str(values["session"]), str(values["attempt"]), str(values["since"]), Process(**values["process"])
        )
    except (ValueError, KeyError, TypeError):
        return None
