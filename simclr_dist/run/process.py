"""The identity of a process, and whether it still lives: true across reboots, containers and re-used numbers."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Process:
    host: str
    """For messages."""
    machine: str
    """Where `pid` is valid: boot id of a machine and its namespace of process numbers (a container has its own)."""
    pid: int
    start: str
    """Its start in the kernel's clock ticks since boot: differs for a later process with the same number."""

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or "")

    def state(self) -> Literal["alive", "dead", "unknown"]:
        """unknown: the processes of its machine cannot be seen from here."""
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
    """None for a process that has ended (a zombie too), and where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
