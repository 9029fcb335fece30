"""Heartbeats: RUN/heartbeat/SESSION/rank_00003.json says where rank 3 is, and is rewritten every few seconds.

They are files because files can still be read when the process group hangs: by the other ranks, by people, and
afterwards. The interval grows with world_size, so that all ranks together write at most about 20 files a second.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from simclr_dist.run.layout import RunDir, is_a, read_record, write_record

INTERVAL_S = 10.0
WRITES_PER_S = 20.0
SILENT_INTERVALS = 3


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    host: str
    pid: int
    step: int
    doing: str
    where: str
    """The line of this package that the rank's main thread was executing."""


class Heartbeats:
    """The heartbeats of all ranks of one start of the run (`session`); this process is `rank`."""

    def __init__(self, run_dir: Path, session: str, rank: int, world_size: int, limit_s: float) -> None:
        """limit_s: how long a rank may be silent before that is an error."""
        self.rank = rank
        self.world_size = world_size
        self.interval_s = max(min(INTERVAL_S, limit_s / 4), world_size / WRITES_PER_S)
        self._files = [RunDir(run_dir).heartbeat(session, other) for other in range(world_size)]
        self._own = self._files[rank]

    def write(self, step: int, doing: str, where: str) -> None:
        """Says where this rank is. Raises OSError."""
        self._own.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_record(self._own, asdict(Heartbeat(self.rank, socket.gethostname(), os.getpid(), step, doing, where)))

    def remove_earlier_starts(self) -> None:
        session = self._own.parent
        for folder in session.parent.glob("*"):
            if folder != session:
                shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> None:
        """After a normal end of this rank. The last rank to end removes the folder."""
        with suppress(OSError):
            self._own.unlink(missing_ok=True)
            self._own.parent.rmdir()
            self._own.parent.parent.rmdir()

    def describe_ranks(self) -> str:
        """Where every rank is: first a line for each silent one, then one for each place in the program."""
        latest, now_s = self._read(), 0.0
        with suppress(OSError):
            now_s = self._own.stat().st_mtime  # just written, so it is the file system's present time
        lines, alive = [], []
        for rank in range(self.world_size):
            if rank not in latest:
                lines.append(f"rank {rank} has given no sign of life at all")
                continue
            beat, age_s = latest[rank][0], now_s - latest[rank][1]
            if age_s > SILENT_INTERVALS * self.interval_s:
                lines.append(
                    f"rank {rank} ({beat.host}, process {beat.pid}) has given no sign of life for {age_s:.0f} s; "
                    f"it was at step {beat.step}, {beat.doing}, in {beat.where}"
                )
            else:
                alive.append(beat)
        alive.sort(key=_place)
        for (step, doing, where), group in groupby(alive, key=_place):
            lines.append(f"{_ranks(beat.rank for beat in group)}: at step {step}, {doing}, in {where}")
        return "\n".join(f"  {line}" for line in lines)

    def _read(self) -> dict[int, tuple[Heartbeat, float]]:
        """By rank: its newest heartbeat, and when it was written (st_mtime)."""
        latest = {}
        for rank, path in enumerate(self._files):
            found = read_record(path) or {}
            known: dict[str, Any] = {field.name: found.get(field.name) for field in fields(Heartbeat)}
            if all(is_a(value, int if name in ("rank", "pid", "step") else str) for name, value in known.items()):
                with suppress(OSError):
                    latest[rank] = Heartbeat(**known), path.stat().st_mtime
        return latest


def _place(beat: Heartbeat) -> tuple[int, str, str]:
    return beat.step, beat.doing, beat.where


def _ranks(ranks: Iterable[int]) -> str:
    """[0, 2, 3, 4] -> 'ranks 0, 2-4'"""
    ordered = sorted(ranks)
    runs = [list(group) for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(spans)}"
