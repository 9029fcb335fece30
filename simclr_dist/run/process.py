"""Which process is that, and does it still live? Answered across restarts, containers and re-used numbers."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Process:
    host: str
    """For people."""
    machine: str
    """Where `pid` means something: one boot of one machine, and one container's view of its processes."""
    pid: int
    start: str
    """When it began, as the kernel counts: tells it from a later process of the same number."""

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or "")

    def fate(self) -> Literal["alive", "dead", "unknown"]:
        """`unknown`: its machine's processes cannot be seen from here."""
        if not self.start or self.machine != _machine():
            return "unknown"
        return "alive" if _start_of(self.pid) == self.start else "dead"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """None for a process that has ended, also for one that nobody has reaped yet, and where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
