"""Starts processes that have torch and the trainer imported already.

Importing them takes six seconds of CPU, and a test on three ranks would pay that three times. Here a server process
imports them once, and each process is a fork of it. The server never computes: a fork would lose the threads of that.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import chdir
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from simclr_dist.data.decode import ffcv_import
from tests.conftest import REPOSITORY

_IMPORTED = [
    "__main__",
    "torch._dynamo",  # by every optimiser and by DDP
    "simclr_dist.training.main",
    "simclr_dist.training.trainer",
    "simclr_dist.views.cpu_kernel",  # with what numba compiled
    *(
        ["simclr_dist.data.decode.kernel", "simclr_dist.data.decode.compiled_crops"]
        if ffcv_import.unavailable() is None
        else []
    ),
]
context = multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *arguments: Any, fresh: bool = False) -> BaseProcess:
    """`target(*arguments)` in a process of its own; `target` is importable and `arguments` can be pickled.

    fresh: not a fork; the process imports everything itself.
    """
    if fresh:
        process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
        process.start()
        return process
    context.set_forkserver_preload(_IMPORTED)
    with chdir(REPOSITORY), mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # what the server keeps from its start
        forkserver.ensure_running()
    forked = context.Process(target=target, args=arguments)
    forked.start()
    return forked


class ModuleProcess:
    """`python -m module *arguments` with `env`, in the repository, both output streams kept in a file."""

    def __init__(self, module: str, arguments: list[str], env: Mapping[str, str], *, fresh: bool = False) -> None:
        with tempfile.NamedTemporaryFile(prefix="simclr-output-", delete=False) as file:
            self._output = Path(file.name)
        weakref.finalize(self, self._output.unlink, missing_ok=True)
        self._process = start(_run_module, module, arguments, dict(env), file.name, fresh=fresh)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, -N after signal N; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int | None:
        self._process.join(timeout_s)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")


def _run_module(module: str, arguments: list[str], env: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(file, number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False, encoding="utf-8"))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(REPOSITORY)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
