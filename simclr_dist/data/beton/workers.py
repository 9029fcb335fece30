"""Encodes images in this process and in workers, in the order of the source.

Each worker has a pipe of its own, whose end is its end: where the kernel kills it in the middle of an answer, this is
an error at once. `ProcessPoolExecutor` waits for ever then, for the rest of the answer in the queue that all share.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from simclr_dist.data.sources.images import ImageSource
from simclr_dist.errors import DataError

if TYPE_CHECKING:
    from simclr_dist.data.beton.encode import Encoded

LARGEST_CHUNK = 64  # images that a process works on at a time
_QUEUED = 3  # chunks for each worker: one to work on, and enough for while this process is busy with its own


class WorkerDiedError(Exception):
    """A worker process ended before it had answered."""


class Workers:
    """Processes that encode. A thread for each waits for its answers.

    started: a result for each worker, there when it has started.
    Raises DataError when none can be started.
    """

    def __init__(self, num_workers: int) -> None:
        # A fork starts at once, where a new interpreter imports for 0.4 s; but it would inherit the locks of threads.
        forks = _has_one_thread()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._free: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)
        try:
            for _ in range(num_workers):
                self._start(multiprocessing.get_context("fork" if forks else "spawn"))
            self.started = [self._threads.submit(self._meet, pipe) for pipe in self._pipes]
        except OSError as error:
            self.stop()
            raise DataError(
                f"worker processes cannot be started: {error.strerror or error} (each needs some open files; "
                "see `ulimit -n`); use --workers 1, which needs none"
            ) from None
        wait(self.started, timeout=0.1 if forks else 0)  # so that they get the first chunks

    def _start(self, context: BaseContext) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._pipes.append(ours)
        with theirs:  # a copy of it here, or in a worker that is forked later, would keep the pipe open
            process = cast(Any, context).Process(target=_work, args=(theirs, os.getpid()), daemon=True)
            process.start()
        self._processes.append(process)

    def _meet(self, pipe: Connection) -> None:
        try:
            _receive(pipe)
        finally:
            self._free.put(pipe)

    def submit(self, encoder: Callable[[ImageSource], Encoded], chunk: ImageSource) -> Future[Encoded]:
        """What the next free worker makes of a chunk. The result raises what `encoder` raised, or WorkerDiedError."""
        return self._threads.submit(self._ask, encoder, chunk)

    def _ask(self, encoder: Callable[[ImageSource], Encoded], chunk: ImageSource) -> Encoded:
        pipe = self._free.get()
        try:
            try:
                pipe.send((encoder, chunk))
            except OSError:
                raise WorkerDiedError from None
            return cast("Encoded", _receive(pipe))
        finally:
            self._free.put(pipe)  # also one of a worker that died: then the next who asks it hears so, and none waits

    def stop(self) -> None:
        """Kill them: they hold nothing that would be lost."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)  # they read the ends of their pipes
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _receive(pipe: Connection) -> object:
    try:
        result, error = pipe.recv()
    except (EOFError, OSError):
        raise WorkerDiedError from None
    if error is not None:
        raise error
    return result


def _work(pipe: Connection, parent: int) -> None:
    """Answer until killed. Ctrl-C is for the parent to handle; but a worker dies with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the line above
        os._exit(1)
    pipe.send((None, None))  # it has started
    while True:
        encoder, chunk = pipe.recv()
        try:
            pipe.send((encoder(chunk), None))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # a pickled exception has no traceback
            pipe.send((None, error))


def encode_in_order(
    encoder: Callable[[ImageSource], Encoded], images: ImageSource, ids: NDArray[np.int64], num_processes: int
) -> Iterator[Encoded]:
    """The images `ids`, some at a time, in this order; a bounded number of them is in memory.

    encoder: can be sent to another process. num_processes: this one among them: it works too, so that nothing waits
    for the others to start.
    Raises DataError.
    """
    if num_processes == 1 or len(ids) <= LARGEST_CHUNK:
        yield from (encoder(images.take(chunk)) for chunk in chunks_of(ids, num_processes))
        return
    yield encoder(images.take(ids[:1]))  # what is imported for it, forked workers need not import
    workers = Workers(num_processes - 1)
    try:
        yield from share(encoder, map(images.take, chunks_of(ids[1:], num_processes)), workers)
    except WorkerDiedError:
        raise DataError(_why_died(any(map(_has_ended_well, workers.started)))) from None
    finally:
        workers.stop()


def chunks_of(ids: NDArray[np.int64], num_processes: int) -> Iterator[NDArray[np.int64]]:
    """Smaller ones towards the end, so that all processes end at about the same time."""
    while len(ids):
        size = min(max(len(ids) // (4 * num_processes), 4), LARGEST_CHUNK)
        yield ids[:size]
        ids = ids[size:]


def share(
    encoder: Callable[[ImageSource], Encoded], chunks: Iterator[ImageSource], workers: Workers
) -> Iterator[Encoded]:
    """A worker gets a chunk whenever too few are queued, otherwise this process encodes it."""
    ahead: deque[Future[Encoded]] = deque()
    started = workers.started
    for chunk in chunks:
        queued = sum(not result.done() for result in ahead)
        if queued < _QUEUED * len(started) and any(future.done() for future in started):
            ahead.append(workers.submit(encoder, chunk))
        else:
            ahead.append(Future())
            ahead[-1].set_result(encoder(chunk))
        while ahead and (ahead[0].done() or len(ahead) > 2 * _QUEUED * len(started)):
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
    for future in started:
        future.result()  # raises when workers could not start: also where this process was faster than that


def _has_one_thread() -> bool:
    """But for that of pyarrow's allocator, jemalloc, which knows forks. False where it cannot be known."""
    try:
        names = [thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
        return len([name for name in names if name != "jemalloc_bg_thd"]) == 1
    except OSError:
        return False


def _has_ended_well(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _why_died(have_started: bool) -> str:
    script = getattr(sys.modules["__main__"], "__file__", None)
    if not have_started and script is not None and "__name__" not in Path(script).read_text("utf-8", "replace"):
        return (
            f"worker processes cannot be started from {script}: each imports it, so put what it does below "
            '`if __name__ == "__main__":`; or use num_workers=1'
        )
    return "a worker process died, perhaps because memory ran out; use fewer --workers"
