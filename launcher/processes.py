"""No process stays behind: children that die with this process, and descendants that are found and ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil  # type: ignore[import-untyped]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_this_process(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` of a child: the kernel kills it when this process ends, however that happens. Survives exec."""
    parent = os.getpid()  # 1 in a container whose first process this is

    def ask_kernel() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:
            os._exit(1)  # it has ended already

    return ask_kernel


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process instead of init's, so that they can be found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def descendants(pid: int, recursive: bool = True) -> list[psutil.Process]:
    import psutil  # type: ignore[import-untyped]

    try:
        return [process for process in psutil.Process(pid).children(recursive=recursive) if process.is_running()]
    except psutil.NoSuchProcess:
        return []


def send(processes: list[psutil.Process], signal_number: int) -> None:
    import psutil  # type: ignore[import-untyped]

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


def end_descendants() -> int:
    """Kills and reaps all descendants of this process. Returns how many there were."""
    import psutil  # type: ignore[import-untyped]

    left = descendants(os.getpid())
    send(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=10)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return len(left)
