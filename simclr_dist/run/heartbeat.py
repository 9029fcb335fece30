"""Every rank's sign of life: RUN/heartbeat/<session>/rank_00003.json, renewed every few seconds.

Files, because they can be read when the process group cannot be used any more, by ranks, by people and afterwards. The
interval grows with the world, so that all ranks together never write more than about 20 files a second.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

INTERVAL_S = 10.0
WRITES_PER_S = 20.0
SILENT_INTERVALS = 3


@dataclass(frozen=True)
class Sign:
    rank: int
    host: str
    pid: int
    step: int
    doing: str
    where: str
    """The line of this package that its main thread was in."""


class Heartbeats:
    """The signs of all ranks of one start of the run (`session`), seen from `rank`."""

    def __init__(self, run_dir: Path, session: str, rank: int, world_size: int, limit_s: float) -> None:
        """limit_s: how long silence may last before it is a fault."""
        self.rank = rank
        self.world_size = world_size
        self.interval_s = max(min(INTERVAL_S, limit_s / 4), world_size / WRITES_PER_S)
        self._folder = run_dir / "heartbeat" / session
        self._own = self._path(rank)

    def write(self, step: int, doing: str, where: str) -> None:
        """This rank's sign of life. Raises OSError."""
        sign = Sign(self.rank, socket.gethostname(), os.getpid(), step, doing, where)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        temporary = self._own.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(sign)) + "\n", encoding="utf-8")
        os.replace(temporary, self._own)

    def forget_earlier_starts(self) -> None:
        for folder in self._folder.parent.glob("*"):
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> None:
        """This rank has come to a good end; the last one removes the folder."""
        with suppress(OSError):
            self._own.unlink(missing_ok=True)
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def verdict(self) -> str:
        """Who keeps the others waiting, as far as the signs tell: a line for each rank or group that stands out."""
        signs, now_s = self._read(), 0.0
        with suppress(OSError):
            now_s = self._own.stat().st_mtime  # by the file system's clock, just written
        lines, living = [], []
        for rank in range(self.world_size):
            if rank not in signs:
                lines.append(f"rank {rank} has given no sign of life at all")
                continue
            sign, age_s = signs[rank][0], now_s - signs[rank][1]
            if age_s > SILENT_INTERVALS * self.interval_s:
                lines.append(
                    f"rank {rank} ({sign.host}, process {sign.pid}) has given no sign of life for {age_s:.0f} s; "
                    f"it was at step {sign.step}, {sign.doing}, in {sign.where}"
                )
            else:
                living.append(sign)
        living.sort(key=lambda sign: (sign.step, sign.doing, sign.where))
        for (step, doing, where), group in groupby(living, key=lambda sign: (sign.step, sign.doing, sign.where)):
            lines.append(f"{_ranks(sign.rank for sign in group)}: at step {step}, {doing}, in {where}")
        return "\n".join(f"  {line}" for line in lines)

    def _read(self) -> dict[int, tuple[Sign, float]]:
        signs = {}
        for rank in range(self.world_size):
            path = self._path(rank)
            with suppress(OSError, ValueError, TypeError):
                signs[rank] = Sign(**json.loads(path.read_text(encoding="utf-8"))), path.stat().st_mtime
        return signs

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def _ranks(ranks: Iterable[int]) -> str:
    """[0, 2, 3, 4] -> 'ranks 0, 2-4'"""
    ordered = sorted(ranks)
    runs = [list(group) for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(spans)}"
