"""A log file for each rank: what a worker prints is passed on as before, and written to RUN/logs/ATTEMPT/ as well.

    python -m simclr_dist.run.output MODULE ARGUMENTS…       the worker; recorded if its agent records

A worker hands the reading ends of its output to the agent that has started it, before anything else is imported. So a
worker that is killed leaves its last words, nothing hangs on Python's own streams, and a full disk ends no training.
torch's own `--tee` would keep no terminal, number its folders by chance, and write without limit.
"""

from __future__ import annotations

import os
import runpy
import secrets
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from simclr_dist.run.layout import RunDir
from simclr_dist.streams import open_closed_descriptors

VARIABLE = "SIMCLR_OUTPUT"
LARGEST_BYTES = 16 << 20
"""Of a file. A full one gets the ending .1 in place of an older one, so a rank's newest 16 to 32 MiB are kept."""
_WAIT_S = 5.0
_SAME_USER = struct.calcsize("3i")


class Recorder:
    """In the agent, from __enter__ to __exit__: writes what its workers print, each to a file of its own."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self._files, self._attempt = RunDir(run_dir), attempt
        self._pumps: list[threading.Thread] = []

    def __enter__(self) -> Recorder:
        name = f"simclr-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._files.rank_log(self._attempt, 0).parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._socket.bind(f"\0{name}")  # no file: nothing to clean up
            self._socket.listen(128)
        except OSError as error:
            print(f"the output of each rank is not recorded: {error}", file=sys.stderr, flush=True)
        else:
            os.environ[VARIABLE] = name
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        os.environ.pop(VARIABLE, None)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        # What a dead worker has printed is still in its pipes. A process that it left behind may hold them open.
        deadline = time.monotonic() + _WAIT_S
        for pump in self._pumps:
            pump.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, suppress(OSError, ValueError, struct.error):
                connection.settimeout(_WAIT_S)
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _SAME_USER)
                if struct.unpack("3i", peer)[1] != os.geteuid():
                    continue
                message, ends, _, _ = socket.recv_fds(connection, 64, 2)
                rank, *numbers = map(int, message.split())
                log = _Log(self._files.rank_log(self._attempt, rank))
                pump = threading.Thread(target=_pump, args=(dict(zip(ends, numbers, strict=True)), log), daemon=True)
                self._pumps.append(pump)
                pump.start()
                connection.sendall(b"recorded")


class _Log:
    """A file of limited size. What cannot be written is lost, which is said once."""

    def __init__(self, path: Path) -> None:
        self._path, self._failed = path, False
        self.write(b"")

    def write(self, data: bytes) -> None:
        if self._failed:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
            with open(descriptor, "ab", buffering=0) as file:
                full = file.tell() + len(data) > LARGEST_BYTES
                if full:
                    os.replace(self._path, f"{self._path}.1")
                else:
                    file.write(data)
            if full:
                self._failed = len(data) > LARGEST_BYTES
                self.write(data)
        except OSError as error:
            self._failed = True
            _pass_on(2, f"{self._path}: not recorded any longer: {error.strerror}\n".encode())


def _pump(streams: dict[int, int], log: _Log) -> None:
    """streams: for each end to read from, the descriptor that its bytes go to. Returns when all writers are gone."""
    with selectors.DefaultSelector() as selector:
        for end, number in streams.items():
            selector.register(end, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                _pass_on(key.data, data)
                log.write(data)


def _pass_on(number: int, data: bytes) -> None:
    """Writes all of it; to an output that is gone, nothing. The reader of a pipe that is full is waited for."""
    while data:
        try:
            data = data[os.write(number, data) :]
        except BlockingIOError:
            select.select([], [number], [])
        except OSError:
            return


def hand_over() -> None:
    """In a worker: from now on the agent passes on and records what this process and its children print.

    A terminal on which rank 0 draws stays one: its standard output is not recorded, and its errors are.
    """
    name, rank = os.environ.pop(VARIABLE, ""), int(os.environ.get("RANK", "0"))
    if not name:
        return
    open_closed_descriptors()
    numbers = [number for number in (1, 2) if not (number == 1 and rank == 0 and os.isatty(number))]
    if len(numbers) == 2 and os.path.sameopenfile(1, 2):
        numbers = [1]  # one pipe, so that the order stays
    pipes = [os.pipe() for _ in numbers]
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_WAIT_S)
            connection.connect(f"\0{name}")
            message = " ".join(map(str, (rank, *numbers))).encode()
            socket.send_fds(connection, [message], [reading for reading, _ in pipes])
            if connection.recv(64) == b"recorded":
                for number, (_, writing) in zip(numbers, pipes, strict=True):
                    os.dup2(writing, number)
                if numbers == [1]:
                    os.dup2(1, 2)
    except OSError as error:
        print(f"rank {rank}: its output is not recorded: {error}", file=sys.stderr, flush=True)
    finally:
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)


def main(argv: list[str]) -> None:
    hand_over()
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    finally:
        # A request to stop that comes now is late. Python gives up its handlers on the way out: it would kill.
        if name := os.environ.get("SIMCLR_STOP_SIGNAL"):
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)


if __name__ == "__main__":
    main(sys.argv[1:])
