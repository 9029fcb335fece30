"""Files of which a bounded number is open at a time."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simclr_dist.errors import DataError

_MOST = 256


@dataclass(frozen=True)
class FileState:
    """By which a file is known again when it is opened once more."""

    num_bytes: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)

    def is_unchanged(self, before: FileState) -> bool:
        """Inodes do not tell: some network file systems number a file anew when they open it."""
        return (self.num_bytes, self.changed_ns) == (before.num_bytes, before.changed_ns)


@dataclass
class _Open:
    fd: int
    users: int = 0


class OpenFiles:
    """Opens files when they are needed and closes those that were not needed for longest. For any number of threads.

    most: files that stay open; by default 256, or a quarter of what the process may have.
    """

    def __init__(self, paths: Sequence[Path], states: Sequence[FileState], most: int | None = None) -> None:
        self._paths, self._states = paths, states
        self._most = most or max(1, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def reading(self, number: int) -> Iterator[int]:
        """The descriptor of a file, open for as long as the block lasts. Raises DataError."""
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                self._close_unused(self._most - 1)
                file = _Open(self._opened(number))
            self._open[number] = file  # the last one used
            file.users += 1
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                if self._closed:
                    self._close_unused(0)

    def _opened(self, number: int) -> int:
        path = self._paths[number]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened any more: {error.strerror}") from None
        if not FileState.of(os.fstat(fd)).is_unchanged(self._states[number]):
            os.close(fd)
            raise DataError(f"{path}: was changed or replaced while it was in use; start again")
        return fd

    def _close_unused(self, most: int) -> None:
        while len(self._open) > most:
            number = next((number for number, file in self._open.items() if not file.users), None)
            if number is None:
                return
            os.close(self._open.pop(number).fd)

    def close(self) -> None:
        """May be called twice, and while other threads read: what they use is closed when they are done."""
        with self._lock:
            self._closed = True
            self._close_unused(0)
