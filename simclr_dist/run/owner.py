"""One run directory, one training: `RUN/owner.json` names the training that may write here.

A second training is refused while the owner is alive. The owner counts as dead if its process has ended; where that
cannot be seen (another machine), if it has not touched the file for STALE_S. A later attempt of the same job takes over
at once, because its scheduler has ended the earlier one. If processes of that one are left (on a node that lost its
network), they find another owner in the file before they write again, and stop.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from simclr_dist.bounded_json import parse_json
from simclr_dist.errors import OwnershipError
from simclr_dist.run.layout import RunDir, write_record
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
    """The right to write into `run_dir`; made by `claim`."""

    def __init__(self, run_dir: Path, session: str) -> None:
        self.run_dir = run_dir
        self.session = session
        """The name of this start of the run: twelve random hexadecimal digits."""
        self._file = RunDir(run_dir).owner

    def check(self) -> None:
        """Raises OwnershipError if another training has taken over, OSError if the file cannot be read."""
        entry = _parse(self._file.read_text(encoding="utf-8", errors="replace"))
        if entry is None or entry.session != self.session:
            raise OwnershipError(
                f"{self.run_dir}: taken over by {entry or 'another training'}; this training stops and writes no more"
            )

    def touch(self) -> None:
        """Shows that this training is alive; called every TOUCH_EVERY_S. Raises as `check` does."""
        self.check()
        os.utime(self._file)

    def release(self) -> None:
        """Ends the ownership. No error if the directory is gone or belongs to another training."""
        with suppress(OSError, OwnershipError), _locked(self.run_dir):
            self.check()
            self._file.unlink()


def claim(run_dir: Path) -> Ownership:
    """Makes this process the owner of `run_dir`, which must exist. Raises OwnershipError if it has a living owner."""
    with _locked(run_dir):
        refuse_if_owned(run_dir)
        entry = _Entry(secrets.token_hex(6), attempt_name(), time.strftime("%Y-%m-%d %H:%M:%S"), Process.this())
        write_record(RunDir(run_dir).owner, asdict(entry))
    return Ownership(run_dir, entry.session)


def refuse_if_owned(run_dir: Path) -> None:
    """Raises OwnershipError if `run_dir` has a living owner that this start does not follow."""
    file = RunDir(run_dir).owner
    holder = _read(file)
    if holder is not None and not _has_ended(file, holder) and not _follows(attempt_name(), holder.attempt):
        raise OwnershipError(
            f"{run_dir}: already being trained by {holder}. Stop that one first (touch STOP in its run directory), or "
            f"give this run another name=…. If {run_dir} is a copy of that directory, delete the copied "
            f"{RunDir(run_dir).owner.name}"
        )


def abandon(run_dir: Path) -> None:
    """Ends whatever ownership this process has; for a training that has failed while the process lives on."""
    file = RunDir(run_dir).owner
    with suppress(OSError), _locked(run_dir):
        holder = _read(file)
        if holder is not None and holder.process == Process.this():
            file.unlink()


def has_living_owner(run_dir: Path) -> bool:
    """Whether a training runs there, as far as can be seen. Raises OSError where that cannot be looked up."""
    file = RunDir(run_dir).owner
    holder = _read(file)
    return holder is not None and not _has_ended(file, holder)


def _has_ended(file: Path, holder: _Entry) -> bool:
    state = holder.process.state()
    if state == "unknown":
        return file_system_time(file.parent) - file.stat().st_mtime > STALE_S
    return state == "dead"


def _follows(attempt: str, other: str) -> bool:
    """Whether both are attempts (JOB.RESTART-NONCE) of one job, and `attempt` is the later one."""
    mine, theirs = (re.fullmatch(r"(.+)\.(\d+)-[0-9a-f]+", name) for name in (attempt, other))
    return mine is not None and theirs is not None and mine[1] == theirs[1] and int(mine[2]) > int(theirs[2])


def file_system_time(folder: Path) -> float:
    """Now, by the clock that dates files in `folder`: the clocks of machines differ."""
    probe = folder / f".time.{os.getpid()}.{secrets.token_hex(3)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Orders simultaneous claims. On a file system without locks they may overlap; the last writer is the owner."""
    with RunDir(run_dir).owner_lock.open("a", encoding="utf-8") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> _Entry | None:
    """None where there is no file or no entry in it. Raises OSError where there is one that cannot be read."""
    try:
        return _parse(file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None


def _parse(text: str) -> _Entry | None:
    try:
        values = parse_json(text)
        process = values["process"]
        return _Entry(
            str(values["session"]),
            str(values["attempt"]),
            str(values["since"]),
            Process(str(process["host"]), str(process["machine"]), int(process["pid"]), str(process["start"])),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
