"""Signals that ask a training to save and stop: SIGTERM, the scheduler's, Ctrl-C, a closed terminal. Imports no torch.

They are heard from the first moment, while torch is still being imported: the loop acts on them at its next border.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

SECOND_AFTER_S = 1.0  # torchrun passes one Ctrl-C on to workers that have had it from the terminal


def stop_signals() -> set[signal.Signals]:
    """SIMCLR_STOP_SIGNAL names the launcher's own: USR1, or USR2 where NCCL uses that."""
    chosen = os.environ.get("SIMCLR_STOP_SIGNAL", "USR1").removeprefix("SIG")
    return {signal.SIGTERM, getattr(signal, f"SIG{chosen}", signal.SIGUSR1), signal.SIGINT, signal.SIGHUP}


class StopSignals:
    """Listens from the first __enter__ to the last __exit__. Off the main thread Python allows no handlers: none then.

    A second Ctrl-C raises KeyboardInterrupt, unless an agent (torchrun) looks after this process: it ends itself then.
    """

    def __init__(self) -> None:
        self.heard = False
        self._depth = 0
        self._interrupted_s: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                ignored = signal.getsignal(number) == signal.SIG_IGN
                if ignored and number in (signal.SIGINT, signal.SIGHUP):
                    continue  # started in the background, or with nohup
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
            self.heard, self._interrupted_s = False, None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if number != signal.SIGINT or "TORCHELASTIC_RUN_ID" in os.environ:
            return
        now_s = time.monotonic()
        if self._interrupted_s is not None:
            if now_s - self._interrupted_s > SECOND_AFTER_S:
                raise KeyboardInterrupt
            return
        self._interrupted_s = now_s
        with suppress(OSError):  # print() may have been interrupted, and must not be entered twice
            os.write(2, b"\nsaving, then stopping; another Ctrl-C ends at once, without saving\n")


SIGNALS = StopSignals()
"""The one of this process: signal handlers belong to a process, not to a run."""
