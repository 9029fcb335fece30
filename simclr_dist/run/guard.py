"""A run directory in the hands of this training: whose it is, how it stands, and who watches that it gets on."""

from __future__ import annotations

import sys
from contextlib import suppress

import torch

from simclr_dist.config import Config
from simclr_dist.errors import ConfigError
from simclr_dist.parallel import distributed
from simclr_dist.parallel.run_on_all_ranks import run_on_all_ranks
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.owner import Ownership, claim
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import State, has_failed, write_status
from simclr_dist.run.stop_requests import Requests
from simclr_dist.run.watchdog import Watchdog


class Custody:
    """Every rank has one; the main process's owns the run directory. All ranks construct it together.

    Raises OwnershipError on the main process while another training lives there, ConfigError if it cannot be written
    to, FailedElsewhereError on the others.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._run_dir = config.run_dir
        self._limits = config.timeout
        self._rank = distributed.rank()
        self.state = TrainState()  # the trainer's, once there is one
        self._ownership = run_on_all_ranks(self._claim, device)
        session = int(self._ownership.session, 16) if self._ownership else 0
        shared = int(distributed.broadcast_from_main_(torch.tensor([session], device=device)))
        self.watchdog = Watchdog(
            Heartbeats(self._run_dir, f"{shared:012x}", self._rank, distributed.world_size(), config.timeout.step_s),
            stop_signals=Requests.signals(),
            stop_s=config.timeout.stop_s,
            on_hang=self._report_hang,
            ownership=self._ownership,
        )

    def _claim(self) -> Ownership | None:
        """By the main process, before anything is read or written there."""
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
        """Raises OwnershipError where another training has taken the run over, OSError where its directory is gone."""
        if self._ownership is not None:
            self._ownership.check()

    def release(self) -> None:
        if self._ownership is not None:
            self._ownership.release()

    def set_status(self, state: State) -> None:
        if self._ownership is not None:
            with suppress(OSError):  # a run directory that has vanished: the save has said so
                self.check()
                write_status(self._run_dir, state, step=self.state.step)

    def watch(self, doing: str, *, first: bool = False) -> None:
        """The main thread begins a part of a step; `first`: one that compiles and meets cold caches."""
        if first:
            self.watchdog.doing(doing, self.state.step, self._limits.first_step_s, "first_step_s")
        else:
            self.watchdog.doing(doing, self.state.step, self._limits.step_s, "step_s", stoppable=True)

    def _report_hang(self, message: str) -> None:
        """On every rank that hangs, but told once."""
        if not has_failed(self._run_dir):
            write_status(self._run_dir, "failed", step=self.state.step, reason="hang", message=message)
            print(f"\nrank {self._rank}: {message}", file=sys.stderr, flush=True)
