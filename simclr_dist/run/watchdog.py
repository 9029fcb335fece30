"""Notices that this rank makes no progress, reports which ranks are missing, and ends the process.

A rank that waits for a lost one is blocked in C code: no exception comes and no Python signal handler runs. So a thread
watches. Each activity of the main thread has a time limit. When it passes, every rank prints its stacks, reports from
the heartbeats (heartbeat.py) which ranks are silent or at another place than the rest, and exits. The process group's
own time-out is BACKSTOP_S longer, for the case that this thread cannot run.

The thread also hears stop signals, through the wake-up socket of Python's signal handling. If the step that was running
does not end within `timeout.stop_s`, the ranks can no longer agree to stop, and the process ends.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from simclr_dist.errors import OwnershipError
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.owner import TOUCH_EVERY_S, Ownership
from simclr_dist.safe_text import message

BACKSTOP_S = 15.0
ENDS_PROCESS = ContextVar("ENDS_PROCESS", default=True)
"""False in a process that does other things too, such as a notebook's: the watchdog of a training there only warns."""
REPORT_S = 10.0  # the process ends after this time even if the report is not finished (the file system may hang too)
PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class _Activity:
    doing: str
    step: int
    since_s: float
    limit_s: float
    setting: str
    """The name of the limit under `timeout:` in the configuration."""
    stoppable: bool
    """After a stop signal the limit is stop_s."""


class Watchdog:
    """Watches from __enter__ to __exit__. Calls `on_hang` with a message, once, before it ends the process."""

    def __init__(
        self,
        heartbeats: Heartbeats,
        *,
        stop_signals: Collection[int],
        stop_s: float,
        on_hang: Callable[[str], None],
        ownership: Ownership | None = None,
    ) -> None:
        self._heartbeats = heartbeats
        self._stop_signals = frozenset(stop_signals)
        self._stop_s = stop_s
        self._on_hang = on_hang
        self._ownership = ownership
        self._ends_process = ENDS_PROCESS.get()
        self._activity = _Activity("starting", 0, time.monotonic(), float("inf"), "", False)
        self._beside: _Activity | None = None
        self._stop_heard_s: float | None = None
        self._trains = threading.get_ident()
        self._hears_signals = threading.current_thread() is threading.main_thread()  # Python's rule
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._wakeup_receiver, self._wakeup_sender = socket.socketpair()
        self._wakeup_sender.setblocking(False)
        if self._hears_signals:
            self._previous_fd = signal.set_wakeup_fd(self._wakeup_sender.fileno(), warn_on_full_buffer=False)
        if self._ownership is not None:
            self._heartbeats.remove_earlier_starts()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._hears_signals:
            signal.set_wakeup_fd(self._previous_fd)
        self._wakeup_sender.close()  # ends the thread
        self._thread.join()
        self._wakeup_receiver.close()
        if kind is None:
            self._heartbeats.end()

    def doing(self, doing: str, step: int, limit_s: float, setting: str, *, stoppable: bool = False) -> None:
        """The main thread begins an activity that must end within `limit_s`, the value of `timeout.<setting>`."""
        self._activity = _Activity(doing, step, time.monotonic(), limit_s, setting, stoppable)

    @contextmanager
    def busy(self, doing: str, limit_s: float, setting: str) -> Iterator[None]:
        """An activity in between. Afterwards the time of the interrupted one starts at 0 again."""
        before = self._activity
        self.doing(doing, before.step, limit_s, setting)
        yield
        self.doing(before.doing, before.step, before.limit_s, before.setting, stoppable=before.stoppable)

    @contextmanager
    def beside(self, doing: str, step: int, limit_s: float, setting: str) -> Iterator[None]:
        """What another thread does meanwhile; one at a time."""
        self._beside = _Activity(doing, step, time.monotonic(), limit_s, setting, False)
        try:
            yield
        finally:
            self._beside = None

    # -----------------------------------------------------------------------------------------------------------------
    # The thread

    def _watch(self) -> None:
        next_beat = next_touch = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_beat:
                self._write_heartbeat()
                next_beat = now + self._heartbeats.interval_s
            if self._ownership is not None and now >= next_touch:
                self._touch(self._ownership)
                next_touch = now + TOUCH_EVERY_S
            if overdue := self._overdue():
                if self._ends_process:
                    self._give_up(*overdue)
                else:
                    self._warn(*overdue)
            readable, _, _ = select.select([self._wakeup_receiver], [], [], min(1.0, max(0.05, next_beat - now)))
            if readable:
                heard = self._wakeup_receiver.recv(64)
                if not heard:
                    return
                if self._stop_heard_s is None and self._stop_signals.intersection(heard):
                    self._stop_heard_s = time.monotonic()

    def _overdue(self) -> tuple[_Activity, str] | None:
        now = time.monotonic()
        for activity in (self._beside, self._activity):
            if activity is not None and now - activity.since_s > activity.limit_s:
                return activity, f"for {activity.limit_s:g} s (timeout.{activity.setting})"
        activity = self._activity
        if activity.stoppable and self._stop_heard_s is not None:
            since = max(activity.since_s, self._stop_heard_s)
            if now - since > self._stop_s:
                return activity, f"for {self._stop_s:g} s after a stop signal (timeout.stop_s)"
        return None

    def _write_heartbeat(self) -> None:
        with suppress(OSError):  # a full disk does not end a training
            self._heartbeats.write(self._activity.step, self._activity.doing, self._where())

    def _touch(self, ownership: Ownership) -> None:
        try:
            ownership.touch()
        except OwnershipError as error:
            if not self._ends_process:
                return  # the next save raises it
            print(f"\n{message(error)}", file=sys.stderr, flush=True)
            os._exit(2)
        except OSError:  # the next save reports it
            pass

    def _warn(self, activity: _Activity, how_long: str) -> None:
        """Once for each activity."""
        place = f"step {activity.step}, {activity.doing}, {self._where()}"
        print(f"\nwarning: no progress {how_long}: {place}; interrupt it to stop", file=sys.stderr, flush=True)
        patient = replace(activity, limit_s=float("inf"), stoppable=False)
        if activity is self._activity:
            self._activity = patient
        else:
            self._beside = patient

    def _give_up(self, activity: _Activity, how_long: str) -> None:
        threading.Timer(REPORT_S, os._exit, (1,)).start()
        rank = self._heartbeats.rank
        self._write_heartbeat()
        with suppress(Exception):
            print(f"\nrank {rank}: no progress; what its threads are doing:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        time.sleep(min(REPORT_S / 2, 1.5 * self._heartbeats.interval_s))  # until the others have written theirs
        self._write_heartbeat()
        with suppress(Exception):
            self._on_hang(
                f"no progress {how_long}: step {activity.step}, {activity.doing}\n{self._heartbeats.describe_ranks()}\n"
                "A rank without sign of life has died, or its machine has. A rank at another place than the rest keeps "
                "them waiting. If a step may really take so long, raise the limit. The next start goes on from the "
                "newest checkpoint"
            )
        os._exit(1)

    def _where(self) -> str:
        """The innermost line of this package that the training's thread is executing."""
        frame = sys._current_frames().get(self._trains)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame is None:
            return "no line of simclr_dist"
        return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
