"""A run directory: the name of every file in it, and how records are read and written. Imports no torch.

runs/NAME/
    config.yaml              the settings of the newest start that trained, complete
    environment.jsonl        a line for each start: commit, versions, seed
    status.json              how the run stands (run/status.py)
    owner.json               which training may write here (run/owner.py)
    log.jsonl, tensorboard/  what was measured
    checkpoints/             step_00012500/ and so on (checkpoint/files.py)
    lineage.jsonl            a line for each start, with its settings, and for each rewind
    evaluations.jsonl        a line for each evaluation
    features/                cached h of evaluations
    export/ finetune/ recipe/    results
    plan.json                the launch plan; attempts.jsonl and logs/: what came of it (launcher)
    logs/ATTEMPT/            rank_00007.log and so on: what each rank has printed (run/output.py)
    code/                    program and configuration as they were when a job was submitted (launcher/snapshot.py)
    heartbeat/               rank_00003.json and so on: where each rank stands (run/heartbeat.py)
    STOP, SAVE, STOP_REQUEST.*   requests to a running training (run/stop_requests.py)
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard, get_args

from simclr_dist.atomic import new_file_beside, replaces
from simclr_dist.bounded_json import parse_json


@dataclass(frozen=True)
class RunDir:
    """The places in one run directory. Nothing is created by naming it."""

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunDir:
        """The run that `checkpoint`, RUN/checkpoints/step_…, belongs to."""
        return cls(checkpoint.parent.parent)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def owner(self) -> Path:
        return self.path / "owner.json"

    @property
    def owner_lock(self) -> Path:
        return self.path / ".owner.lock"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def kept_by_release_0_1(self) -> Path:
        return self.checkpoints / "kept.json"

    @property
    def lineage(self) -> Path:
        """A line for each start and each rewind (run/history.py)."""
        return self.path / "lineage.jsonl"

    @staticmethod
    def state_of(checkpoint: Path) -> Path:
        """How far the training had come, and with which settings."""
        return checkpoint / "state.json"

    @staticmethod
    def milestone_mark(checkpoint: Path) -> Path:
        return checkpoint / "milestone"

    @staticmethod
    def best_mark(checkpoint: Path) -> Path:
        return checkpoint / "best.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def list_checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first. Found by name: no file is opened."""
        return sorted(filter(is_checkpoint, self.checkpoints.glob("step_*")), key=step_of)

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def finetune(self) -> Path:
        return self.path / "finetune"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe"

    @property
    def launch_plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def logs_of(self, attempt: str) -> Path:
        return self.logs / attempt

    def rank_log(self, attempt: str, rank: int) -> Path:
        """What a rank has printed (run/output.py)."""
        return self.logs_of(attempt) / f"rank_{rank:05d}.log"

    def rank_failure(self, attempt: str, rank: int) -> Path:
        """How a rank ended that was the first to fail on its node."""
        return self.logs_of(attempt) / f"rank_{rank:05d}.failed.json"

    @property
    def code(self) -> Path:
        """A folder for each program that a job of this run was submitted with, named by its content."""
        return self.path / "code"

    @staticmethod
    def record_of_code(code: Path) -> Path:
        """Which commit a folder of `code` is."""
        return code / "snapshot.json"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeat"

    def heartbeat(self, session: str, rank: int) -> Path:
        """session: the start of the run that the rank belongs to (run/owner.py)."""
        return self.heartbeats / session / f"rank_{rank:05d}.json"

    def started(self, attempt: str) -> Path:
        """Made by the nodes of an attempt when they start: a scheduler may accept a job and start nothing."""
        return self.path / f".started.{attempt}"

    @property
    def launcher_lock(self) -> Path:
        """Locked by the launcher that runs this training; says which process that is."""
        return self.path / ".launcher.lock"

    @property
    def stop(self) -> Path:
        """A person asks the run to save and end."""
        return self.path / "STOP"

    @property
    def save(self) -> Path:
        """A person asks for a checkpoint."""
        return self.path / "SAVE"

    def stop_request(self, attempt: str) -> Path:
        """A batch script asks this attempt to save and end; the job will go on later."""
        return self.path / f"STOP_REQUEST.{attempt}"

    def stop_requests(self) -> list[Path]:
        return list(self.path.glob("STOP_REQUEST.*"))

    def non_finite(self, step: int, rank: int) -> Path:
        """The sample ids of a batch whose loss or gradient was NaN or infinite."""
        return self.path / f"non_finite_step_{step:08d}_rank_{rank}.json"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has the name of a committed checkpoint; unfinished and damaged ones have a suffix."""
    return re.fullmatch(r"step_\d{8,}", path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, by name; 0 if there is none."""
    return max(map(step_of, RunDir(run_dir).list_checkpoints()), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# Records: JSON objects, one a file or one a line. A run's folder may come from anybody, so a reader passes over what is
# no record, and counts it.

LARGEST_RECORD_BYTES = 16 << 20
LARGEST_LINE_BYTES = 1 << 20
NUMBER = int | float


class Records(list[dict[str, Any]]):
    """The records of a file, in its order, without the lines that are none."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.damaged_lines: list[int] = []
        """Their numbers, counted from 1."""

    @property
    def remark(self) -> str | None:
        """A sentence about what was left out; None where nothing was."""
        if not self.damaged_lines:
            return None
        first = ", ".join(map(str, self.damaged_lines[:5])) + (", …" if len(self.damaged_lines) > 5 else "")
        one = len(self.damaged_lines) == 1
        return (
            f"{self.path}: {len(self.damaged_lines):,} damaged line{' is' if one else 's are'} left out "
            f"({'line' if one else 'lines'} {first})"
        )


def read_records(path: Path, **entries: Any) -> Records:
    """The records of a file with one a line; an absent or unreadable file has none.

    entries: types that these entries must have, e.g. attempt=str, step=NUMBER; with `| None` they may be absent. Left
    out are lines that were not finished, are no JSON object, are longer than LARGEST_LINE_BYTES, are nested too deep
    (bounded_json.py), or have an entry of another type.
    """
    found = Records(path)
    try:
        with _open_plain(path) as file:
            number = 0
            while line := file.readline(LARGEST_LINE_BYTES + 1):
                number += 1
                record = _parsed(line) if len(line) <= LARGEST_LINE_BYTES else None
                rest = line
                while len(rest) >= LARGEST_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(LARGEST_LINE_BYTES)
                if record is not None and all(is_a(record.get(key), kind) for key, kind in entries.items()):
                    found.append(record)
                elif line.strip():
                    found.damaged_lines.append(number)
    except OSError:
        pass
    return found


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no readable one, or one beyond LARGEST_RECORD_BYTES."""
    try:
        with _open_plain(path) as file:
            content = file.read(LARGEST_RECORD_BYTES + 1)
    except OSError:
        return None
    return _parsed(content) if len(content) <= LARGEST_RECORD_BYTES else None


def is_a(value: Any, kind: Any) -> TypeGuard[Any]:
    """isinstance, but True is no number, and neither is one that is not finite or that no float can hold."""
    if isinstance(value, NUMBER) and not isinstance(value, bool):
        return isinstance(value, kind) and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
    if isinstance(value, bool):
        return bool in (kind, *get_args(kind))
    return isinstance(value, kind)


def is_share(value: Any) -> TypeGuard[float]:
    """Such as an accuracy."""
    return is_a(value, NUMBER) and 0 <= value <= 1


_LARGEST_NUMBER = sys.float_info.max


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces a file by one JSON object, as a whole. It is not flushed to disk. Raises OSError."""
    temporary = new_file_beside(path)
    try:
        temporary.write_text(_as_json(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RecordFile:
    """Appends records to a file, a line each. It stays open between them."""

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        """mode: of a new file, less what the umask takes away. Raises OSError, also where `path` is a link."""
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, mode)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise OSError(errno.EINVAL, "is no plain file", str(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """A single write to a file opened for appending stays whole beside other writers'.

        A line that a killed process or a full disk left unfinished does not spoil it. Raises OSError.
        """
        line = (_as_json(record) + "\n").encode()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        if end and os.pread(self._descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Twice is no error."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def append_record(path: Path, record: Mapping[str, Any], mode: int = 0o666) -> None:
    """Adds one line, as `RecordFile` does. Raises OSError."""
    with RecordFile(path, mode) as file:
        file.append(record)


def rewrite_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> str | None:
    """Replaces a file by those of its records that `keep` wants. What cannot be read goes too: the remark says it.

    Raises OSError.
    """
    records = read_records(path)
    kept = [record for record in records if keep(record)]
    if len(kept) < len(records) or records.damaged_lines:
        with replaces(path) as temporary:
            temporary.write_text("".join(_as_json(record) + "\n" for record in kept), encoding="utf-8")
    return records.remark


def _open_plain(path: Path) -> IO[bytes]:
    """Only a plain file: a pipe would be waited for, and a device may have no end. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return os.fdopen(descriptor, "rb")


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _as_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON has no NaN and no infinity: they are written as null."""
    try:
        return json.dumps(record, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(record), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list | tuple) else value
