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
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_dist.atomic import new_file_beside
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


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces a file by one JSON object, as a whole. It is not flushed to disk. Raises OSError."""
    temporary = new_file_beside(path)
    try:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON. A single write to a file opened for appending stays whole beside other writers'.

    A line that a killed process left unfinished does not spoil it. Raises OSError.
    """
    line = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. Lines that a killed process left unfinished are passed over.

    An absent or unreadable file has none.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [value for line in text.splitlines() if isinstance(value := _parsed(line), dict)]


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no readable one."""
    try:
        value = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return value if isinstance(value, dict) else None


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
