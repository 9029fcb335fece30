"""Requests to a running training, by signal or file: save, or stop. It is enough if one rank receives a request.

A request only sets a flag. At every step all ranks take the maximum of their flags, so that all of them act between the
same two steps. A rank could not act earlier anyhow: Python runs no signal handler while a thread waits in a collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]
import torch

from simclr_dist.parallel import distributed
from simclr_dist.run.layout import RunDir
from simclr_dist.run.owner import file_system_time
from simclr_dist.run.stop_signals import SIGNALS

POLL_S = 2.0


class Request(IntEnum):
    """From the weakest to the strongest: the strongest of all ranks' requests is granted."""

    NONE = 0
    SAVE = 1
    STOP = 2  # the file STOP: a person ends the run
    PREEMPT = 3  # a signal, or STOP_REQUEST.* from a batch script: the run can be continued
    FAIL = 4  # the main process cannot go on: all leave together, and it says why


class Requests:
    """Listens from __enter__ to __exit__; `announce()` at the start of a step, `agreed()` at its end."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self._files = RunDir(run_dir)
        self.device = device
        self._asked = Request.NONE
        self._next_poll = 0.0
        self._answered = 0  # st_mtime_ns of the last SAVE file that was granted
        self._pending: Callable[[], int] | None = None

    def __enter__(self) -> Requests:
        SIGNALS.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        SIGNALS.__exit__()

    def ask(self, request: Request) -> None:
        """A request of this rank itself, for example to save because 10 minutes have passed."""
        self._asked = max(self._asked, request)

    def announce(self) -> None:
        """Starts the exchange of flags; it runs while the step computes."""
        if distributed.rank() == 0 and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_S
            self._look_for_files()
        # The handler's flag stands apart from _asked: an ask() that it interrupts cannot overwrite it.
        heard = Request.PREEMPT if SIGNALS.heard else Request.NONE
        self._pending = distributed.agree_on_max(int(max(self._asked, heard)), self.device)

    def agreed(self) -> Request:
        """The strongest request that any rank announced, the same on every rank. A SAVE is forgotten once agreed."""
        assert self._pending is not None
        request = Request(self._pending())
        if self._asked == Request.SAVE and request >= Request.SAVE:
            self._asked = Request.NONE
        return request

    def _look_for_files(self) -> None:
        if self._files.stop_requests():
            self.ask(Request.PREEMPT)
        if self._files.stop.exists():
            self.ask(Request.STOP)
        with suppress(OSError):
            # In a directory that cannot be written to, SAVE cannot be removed: it is granted once.
            touched = self._files.save.stat().st_mtime_ns
            if touched != self._answered:
                self._answered = touched
                self.ask(Request.SAVE)
            self._files.save.unlink()

    def forget_files(self) -> None:
        """Removes the files that asked for the stop, so that the next start does not stop at once."""
        for path in [self._files.stop, *self._files.stop_requests()]:
            with suppress(OSError):
                path.unlink()


def forget_earlier_requests(run_dir: Path) -> None:
    """Removes the files that asked for something before this process began: they were meant for an earlier start.

    Not for a start by the launcher, which has done so: whatever is there now was meant for this one. Raises OSError.
    """
    if "SIMCLR_ATTEMPT" in os.environ:
        return
    files = RunDir(run_dir)
    began_s = file_system_time(run_dir) - (time.time() - psutil.Process().create_time())
    for path in (files.stop, files.save, *files.stop_requests()):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < began_s:
                path.unlink()
