"""One training's hold on its run directory: ownership, status, and the watchdog that ends it when it hangs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
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
from simclr_dist.run.stop_requests import forget_earlier_requests
from simclr_dist.run.stop_signals import stop_signals
from simclr_dist.run.watchdog import BACKSTOP_S, Watchdog
from simclr_dist.safe_text import message

_LONGEST_FETCH_S = 7 * 24 * 3600.0  # a store that fails is given up by whoever asks it
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
        self._step_limit_s = timeout.first_step_s  # until the first step has ended on all ranks
        self._ownership = run_on_all_ranks(self._claim, device)
        session = int(self._ownership.session, 16) if self._ownership else 0
        shared = int(distributed.broadcast_from_main_(torch.tensor([session], device=device)))
        self.watchdog = Watchdog(
            Heartbeats(run_dir, f"{shared:012x}", self._rank, distributed.world_size(), timeout.step_s),
            stop_signals=stop_signals(),
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
            forget_earlier_requests(self._run_dir)
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

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the wait for data from elsewhere before the first step: as long as they come. All ranks together."""
        set_backstop(_LONGEST_FETCH_S)
        self.watchdog.doing("fetching data", self.state.step, float("inf"), "")
        yield
        distributed.barrier()

    def first_step_begins(self) -> None:
        """All ranks call it together, when everything is built: until here the longest limit of all is in force."""
        self.begin("starting", first=True)
        distributed.barrier()
        set_backstop(self._step_limit_s)

    def first_step_done(self) -> None:
        """From now on the limit is step_s. All ranks call it together, so that none waits for a rank with more time."""
        distributed.barrier()
        self._step_limit_s = self._timeout.step_s
        set_backstop(self._step_limit_s)

    @contextmanager
    def busy(self, doing: str, limit: LimitName) -> Iterator[None]:
        """Around work between two steps that has a time limit of its own, `timeout.<limit>`.

        All ranks enter and leave it together: no rank goes on, under a shorter limit, while another is still at work.
        """
        seconds: float = getattr(self._timeout, limit)
        set_backstop(max(seconds, self._step_limit_s))
        with self.watchdog.busy(doing, seconds, limit):
            yield
            distributed.barrier()
        set_backstop(self._step_limit_s)

    def saving_beside(self, step: int) -> AbstractContextManager[None]:
        """Around a save in another thread, while this one trains."""
        return self.watchdog.beside("saving in the background", step, self._timeout.save_s, "save_s")

    def closing(self) -> None:
        """The last activity of this rank: whatever is still being written may take as long as a checkpoint."""
        set_backstop(max(self._timeout.save_s, self._step_limit_s))
        self.watchdog.doing("closing", self.state.step, self._timeout.save_s, "save_s")

    def _report_hang(self, text: str) -> None:
        """Every rank that hangs calls it; the first one writes."""
        if not has_failed(self._run_dir):
            write_status(self._run_dir, "failed", step=self.state.step, reason="hang", message=text)
            print(f"\nrank {self._rank}: {message(text)}", file=sys.stderr, flush=True)


def set_backstop(limit_s: float) -> None:
    """The process group's own time-out, for the case that a watchdog cannot run: beyond every limit now in force."""
    distributed.set_timeout(limit_s + BACKSTOP_S)
