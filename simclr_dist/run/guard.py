"""One training's hold on its run directory: ownership, status, and the watchdog that ends it when it hangs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Literal

import torch

from simclr_dist.config import TimeoutConfig
from simclr_dist.errors import ConfigError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.owner import Ownership, claim
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import State, has_failed, write_status
from simclr_dist.run.stop_requests import Requests
from simclr_dist.run.watchdog import Watchdog

LimitName = Literal["evaluation_s", "save_s"]


class RunGuard:
    """Every rank has one; the main process's owns the run directory. All ranks construct it together.

    Raises OwnershipError on the main process while another training owns the directory, ConfigError if it cannot be
    written to, FailedElsewhereError on the other ranks.
    """

    def __init__(self, run_dir: Path, timeout: TimeoutConfig, device: torch.device) -> None:
        self._run_dir = run_dir
        self._timeout = timeout
        self._rank = distributed.rank()
        self.state = TrainState()  # replaced by the trainer's
        self._ownership = run_on_all_ranks(self._claim, device)
        session = int(self._ownership.session, 16) if self._ownership else 0
        shared = int(distributed.broadcast_from_main_(torch.tensor([session], device=device)))
        self.watchdog = Watchdog(
            Heartbeats(run_dir, f"{shared:012x}", self._rank, distributed.world_size(), timeout.step_s),
            stop_signals=Requests.signals(),
            stop_s=timeout.stop_s,
            on_hang=self._report_hang,
            ownership=self._ownership,
        )

    def _claim(self) -> Ownership | None:
        """By the main process, before anything there is read or written."""
        if self._rank != 0:
            return None
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
            ownership = claim(self._run_dir)
        except OSError as error:
            raise ConfigError([f"runs_dir: {self._run_dir} cannot be written to: {error.strerror}"]) from None
        write_status(self._run_dir, "running", step=0)
        return ownership

    def check(self) -> None:
        """Raises OwnershipError if another training has taken over, OSError if the directory has vanished."""
        if self._ownership is not None:
            self._ownership.check()

    def release(self) -> None:
        if self._ownership is not None:
            self._ownership.release()

    def set_status(self, state: State) -> None:
        if self._ownership is not None:
            with suppress(OSError):  # the directory has vanished: the save has reported it
                self.check()
                write_status(self._run_dir, state, step=self.state.step)

    def begin(self, doing: str, *, first: bool = False) -> None:
        """The main thread begins a part of a step; `first`: one that compiles and meets cold caches."""
        if first:
            self.watchdog.doing(doing, self.state.step, self._timeout.first_step_s, "first_step_s")
        else:
            self.watchdog.doing(doing, self.state.step, self._timeout.step_s, "step_s", stoppable=True)

    def busy(self, doing: str, limit: LimitName) -> AbstractContextManager[None]:
        """Around work between two steps that has a time limit of its own, `timeout.<limit>`."""
        return self.watchdog.busy(doing, getattr(self._timeout, limit), limit)

    def _report_hang(self, message: str) -> None:
        """Every rank that hangs calls it; the first one writes."""
        if not has_failed(self._run_dir):
            write_status(self._run_dir, "failed", step=self.state.step, reason="hang", message=message)
            print(f"\nrank {self._rank}: {message}", file=sys.stderr, flush=True)
