"""Checkpoints of a running training: when one is due, and that it is written while the training goes on.

The main process copies the state between two steps; a thread writes the copy. There is one copy: the next save waits
for the one before it. What came of a save is noticed at a later border, and all ranks leave together if it must end the
training. The last save is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from simclr_dist.checkpoint import files
from simclr_dist.checkpoint.files import Snapshot
from simclr_dist.config import Config
from simclr_dist.errors import CheckpointError, FailedElsewhereError, NonFiniteAbortError, UserError
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed
from simclr_dist.run import history
from simclr_dist.run.guard import RunGuard
from simclr_dist.run.layout import RunDir
from simclr_dist.run.provenance import versions
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import attempt_name
from simclr_dist.run.stop_requests import Request
from simclr_dist.training.step import FinishedStep

MAX_FAILED_SAVES = 3


@dataclass(frozen=True)
class _Written:
    ended_s: float
    problems: list[str]
    """Sentences; none of them is an error."""


@dataclass(frozen=True)
class _Writing:
    """A save under way. Times by time.monotonic(); the training stood still until `copied_s`."""

    step: int
    began_s: float
    copied_s: float
    result: Future[_Written]


class Saver:
    """Saves `model` and `optimizer` as they stand when asked. All ranks have one and call it together."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        monitor: Monitor,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: Any,
        probe: OnlineProbe | None,
        fingerprint: str,
        guard: RunGuard,
    ) -> None:
        self.config = config
        self.device = device
        self.monitor = monitor
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._probe = probe
        self._fingerprint = fingerprint
        self._guard = guard
        self._is_main = distributed.rank() == 0
        # Of the main process:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: _Writing | None = None
        self._snapshot: Snapshot | None = None  # its memory is used again
        self._failed_saves = 0
        self._last_save_s = time.monotonic()
        self._failure: UserError | None = None
        self._versions = versions()

    def wish(self, step: int) -> Request:
        """What the main process asks for at the border after `step` steps; it alone decides, because clocks differ."""
        if not self._is_main:
            return Request.NONE
        if self._writing is not None and self._writing.result.done():
            try:
                self._end_writing()
            except UserError as error:
                self._failure = error
        if self._failure is not None:
            return Request.FAIL
        every = self.config.checkpoint
        is_due = (every.every_steps is not None and step % every.every_steps == 0) or (
            every.every_min is not None and time.monotonic() - self._last_save_s >= 60 * every.every_min
        )
        return Request.SAVE if is_due else Request.NONE

    def after_step(self, finished: FinishedStep, state: TrainState, request: Request) -> None:
        """Saves what the end of an epoch, the end of the training, or an agreed request asks for. Raises UserError."""
        if request == Request.FAIL:
            raise self._failure or FailedElsewhereError
        ends = finished.is_last or request >= Request.STOP
        if finished.ended_epoch is None and not ends and request < Request.SAVE:
            return
        with self._guard.busy("saving", "save_s"):
            failure: UserError | None = None
            if self._is_main:
                try:
                    self._save(finished, state, asked=request >= Request.SAVE, ends=ends)
                except UserError as error:
                    failure = error
            # Every rank waits here: the first task that ends can make SLURM or the agent end the others.
            if distributed.first_failing_rank(failure is not None, self.device) is not None:
                raise failure or FailedElsewhereError

    def close(self) -> None:
        """Waits for a save that is under way, so that a training which fails does not lose it."""
        self._thread.shutdown(wait=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Of the main process

    def _save(self, finished: FinishedStep, state: TrainState, *, asked: bool, ends: bool) -> None:
        began_s = time.monotonic()
        self._end_writing()
        settings, epoch = self.config.checkpoint, finished.ended_epoch
        milestone, best, every = False, None, False
        if epoch is not None:
            milestone = settings.milestone_epochs is not None and epoch % settings.milestone_epochs == 0
            every = settings.every_epochs is not None and epoch % settings.every_epochs == 0
            best = self._new_best(finished.figures.get("eval/knn_top1"))
        if asked or ends or milestone or every or best is not None:
            self._begin_writing(state, history.marks(milestone=milestone, best_knn_top1=best), began_s)
        if ends or not settings.in_background:
            self._end_writing(is_last=ends)

    def _new_best(self, knn_top1: float | None) -> float | None:
        """The accuracy, if it is the best of the run."""
        if not self.config.checkpoint.keep_best or knn_top1 is None:
            return None
        best = history.best_so_far(self.config.run_dir)
        return knn_top1 if best is None or knn_top1 > best[1] else None

    def _begin_writing(self, state: TrainState, marks: Mapping[str, str], began_s: float) -> None:
        self._snapshot = files.take_snapshot(
            config=self.config,
            state=state,
            fingerprint=self._fingerprint,
            model=self._model,
            optimizer=self._optimizer,
            grad_scaler=self._scaler.state_dict() if self._scaler is not None else {},
            versions=self._versions,
            probe_state=self._probe.state_dict() if self._probe is not None else None,
            reuse=self._snapshot,
        )
        result = self._thread.submit(self._write, self._snapshot, marks)
        self._last_save_s = time.monotonic()
        self._writing = _Writing(state.step, began_s, self._last_save_s, result)

    def _end_writing(self, *, is_last: bool = False) -> None:
        """Waits for the save under way, if there is one.

        A failure is a warning while there will be another save. For the last one, or after MAX_FAILED_SAVES failures in
        a row, it is a CheckpointError.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        state = self._guard.state
        try:
            written = writing.result.result()
        except OSError as error:
            self._failed_saves += 1
            gives_up = is_last or self._failed_saves >= MAX_FAILED_SAVES
            goes_on = "" if gives_up else "; training goes on"
            self.monitor.warn(f"checkpoint of step {writing.step} not saved: {error}{goes_on}")
            if gives_up:
                raise CheckpointError(f"{self._failed_saves} save(s) in a row failed, the last with: {error}") from None
            return
        for problem in written.problems:
            self.monitor.warn(problem)
        self._failed_saves = 0
        spent = {
            "speed/checkpoint_s": written.ended_s - writing.began_s,
            "speed/checkpoint_wait_s": writing.copied_s - writing.began_s,
        }
        self.monitor.log(spent, step=state.step, samples_seen=state.samples_seen)

    # -----------------------------------------------------------------------------------------------------------------
    # Of the thread

    def _write(self, snapshot: Snapshot, marks: Mapping[str, str]) -> _Written:
        """Raises OSError, NonFiniteAbortError, OwnershipError."""
        with self._guard.saving_beside(snapshot.step):
            self._guard.check()  # and not into a directory that has vanished
            if (name := snapshot.first_non_finite()) is not None:
                raise NonFiniteAbortError(f"{name} holds NaN or infinity after step {snapshot.step}; nothing was saved")
            files.write_checkpoint(
                RunDir(self.config.run_dir).checkpoints,
                snapshot,
                attempt=attempt_name(),
                marks=marks,
                before_commit=self._guard.check,
            )
            # Only now: whoever deletes before writing has nothing left when the write fails.
            problems = history.prune(self.config.run_dir, self.config.checkpoint.keep)
        return _Written(time.monotonic(), problems)
