"""What the world asks of a running training: save, or stop. One rank that hears it is enough.

Signals and files only raise a flag; all ranks agree on it by a maximum taken at every step and act at the same border
between two steps. A Python signal handler does not run while its thread waits in a collective, so acting any earlier
would not be possible anyhow.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from simclr_dist.parallel import distributed

POLL_S = 2.0


class Request(IntEnum):
    """In the order in which they outdo each other."""

    NONE = 0
    SAVE = 1
    STOP = 2  # the file STOP: a person wants it ended
    PREEMPT = 3  # a signal, or STOP_REQUEST.* from a batch script: the job will go on later


class Requests:
    """Listens from __enter__ to __exit__; `announce()` at the start of a step, `agreed()` at its end."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self.run_dir = run_dir
        self.device = device
        self.heard = Request.NONE
        self._next_poll = 0.0
        self._answered = 0  # when the last SAVE was made
        self._previous: dict[int, Any] = {}
        self._pending: Callable[[], int] | None = None

    def __enter__(self) -> Requests:
        for number in self.signals():
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @staticmethod
    def signals() -> set[int]:
        chosen = os.environ.get("SIMCLR_STOP_SIGNAL", "USR1").removeprefix("SIG")
        return {signal.SIGTERM, getattr(signal, f"SIG{chosen}", signal.SIGUSR1)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.heard = Request.PREEMPT

    def ask(self, request: Request) -> None:
        """This rank's own wish, for example a save because time has passed."""
        self.heard = max(self.heard, request)

    def announce(self) -> None:
        """Sends this rank's flag on its way; it travels while the step computes."""
        if distributed.rank() == 0 and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_S
            self._look_for_files()
        self._pending = distributed.agree_on_max(int(self.heard), self.device)

    def agreed(self) -> Request:
        """The strongest request that any rank announced, the same on every rank. A SAVE is forgotten once agreed."""
        assert self._pending is not None
        request = Request(self._pending())
        if self.heard == Request.SAVE and request >= Request.SAVE:
            self.heard = Request.NONE
        return request

    def _look_for_files(self) -> None:
        if list(self.run_dir.glob("STOP_REQUEST.*")):
            self.ask(Request.PREEMPT)
        if (self.run_dir / "STOP").exists():
            self.ask(Request.STOP)
        with suppress(OSError):
            # In a directory that cannot be written to the file stays; it is answered once.
            touched = (self.run_dir / "SAVE").stat().st_mtime_ns
            if touched != self._answered:
                self._answered = touched
                self.ask(Request.SAVE)
            (self.run_dir / "SAVE").unlink()

    def forget_files(self) -> None:
        """Removes the files that asked for the stop, so that the next start does not stop at once."""
        for path in [self.run_dir / "STOP", *self.run_dir.glob("STOP_REQUEST.*")]:
            with suppress(OSError):
                path.unlink()
