"""Checkpoints of a running training: which one it continues from, when one is due, and that all ranks count it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from simclr_dist.checkpoint import files, lineage
from simclr_dist.checkpoint.files import Checkpoint
from simclr_dist.checkpoint.lineage import Kept
from simclr_dist.config import Config
from simclr_dist.data import Loader
from simclr_dist.errors import CheckpointError, ConfigError, FailedElsewhereError, NonFiniteAbortError
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.parallel import distributed
from simclr_dist.run.guard import RunGuard
from simclr_dist.run.layout import RunDir
from simclr_dist.run.provenance import versions
from simclr_dist.run.state import TrainState
from simclr_dist.run.status import attempt_name
from simclr_dist.run.stop_requests import Request
from simclr_dist.training.step import FinishedStep

MAX_FAILED_SAVES = 3


def choose_checkpoint(config: Config, device: torch.device, warn: Callable[[str], None]) -> Checkpoint | None:
    """What `config.resume` names; None for a fresh start. On all ranks. Raises ConfigError or CheckpointError."""
    run_dir, resume = config.run_dir, config.resume
    if resume == "auto":
        return lineage.agree_on_newest(run_dir, device, warn)
    if resume == "none":
        if lineage.list_checkpoints(run_dir):
            raise ConfigError(
                [f"resume=none, but {run_dir} already has checkpoints; choose another name=… or use resume=auto"]
            )
        return None
    return lineage.find_checkpoint(resume, warn)


def restore(
    found: Checkpoint | None,
    config: Config,
    loader: Loader,
    model: nn.Module,
    optimizer: Optimizer,
    probe: OnlineProbe | None = None,
) -> TrainState:
    """Copies `found` into the parts; None: a training that starts at step 0.

    A probe that `found` does not have starts untrained. Raises CheckpointError if `found` comes from another training.
    """
    if found is None:
        return TrainState()
    then, now = found.config, config
    # Release 0.1 recorded another fingerprint of the same images.
    known_as = (loader.content_fingerprint, loader.fingerprint)
    fingerprint = found.fingerprint if found.fingerprint in known_as else loader.content_fingerprint
    changes = [
        f"{key}: {before} then, {after} now"
        for key, before, after in (
            ("seed", then.seed, now.seed),
            ("train.global_batch_size", then.train.global_batch_size, now.train.global_batch_size),
            ("data.order", then.data.order, now.data.order),
            ("optim.optimizer", then.optim.optimizer, now.optim.optimizer),
            ("the images' fingerprint", found.fingerprint, fingerprint),
        )
        if before != after
    ]
    if changes:
        raise CheckpointError(
            f"{found.path} cannot be continued, because these differ: {'; '.join(changes)}. "
            "Put them back, or choose another name=… to start a new run"
        )
    if probe is not None and found.probe_state:
        try:
            probe.load_state_dict(found.probe_state)
        except ValueError as error:
            raise CheckpointError(f"{found.path}: {error}") from None
    return files.load_state(found, model, optimizer)


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
        self._last_save_s = time.monotonic()
        self._failed_saves = 0
        self._saved_step: int | None = None

    def is_due(self, step: int) -> bool:
        """At the border after `step` steps: by steps, or by time. Decided by the main process alone: clocks differ."""
        every = self.config.checkpoint
        return self._is_main and (
            (every.every_steps is not None and step % every.every_steps == 0)
            or (every.every_min is not None and time.monotonic() - self._last_save_s >= 60 * every.every_min)
        )

    def after_step(self, finished: FinishedStep, state: TrainState, request: Request) -> None:
        """Saves what the end of an epoch, the end of the training, or an agreed request asks for."""
        ends = finished.is_last or request >= Request.STOP
        if finished.ended_epoch is None and not ends and request < Request.SAVE:
            return
        with self._guard.busy("saving", "save_s"):
            if finished.ended_epoch is not None:
                self._save_at_epoch_end(state, finished.ended_epoch, finished.figures.get("eval/knn_top1"))
            if ends or request >= Request.SAVE:
                self.save(state, final=ends)

    def _save_at_epoch_end(self, state: TrainState, epoch: int, knn_top1: float | None) -> None:
        """What the settings want saved after `epoch` epochs; knn_top1: measured there, if it was."""
        settings = self.config.checkpoint
        kept = Kept.read(self.config.run_dir) if self._is_main else Kept()
        milestone = settings.milestone_epochs is not None and epoch % settings.milestone_epochs == 0
        best = settings.keep_best and knn_top1 is not None and self._agreed(knn_top1 > kept.best_knn_top1)
        if milestone:  # before it exists: a kill in between must not lose it
            kept = replace(kept, milestones=tuple(sorted({*kept.milestones, state.step})))
            self._note(kept)
        if milestone or best or (settings.every_epochs is not None and epoch % settings.every_epochs == 0):
            self.save(state)
        if best and knn_top1 is not None and self._saved_step == state.step:  # until then the best so far stays
            self._note(replace(kept, best_step=state.step, best_knn_top1=knn_top1))

    def _note(self, kept: Kept) -> None:
        if not self._is_main:
            return
        try:
            kept.write(self.config.run_dir)
        except OSError as error:
            self.monitor.warn(f"checkpoints/kept.json cannot be written, so a milestone may be pruned: {error}")

    def _agreed(self, decision: bool) -> bool:
        """The main process's decision."""
        return bool(distributed.broadcast_from_main_(torch.tensor([int(decision)], device=self.device)))

    def save(self, state: TrainState, final: bool = False) -> None:
        """The main process writes a checkpoint; either every rank counts it as saved or none does.

        A failure is a warning while there will be another save. With `final`, or after MAX_FAILED_SAVES failures in a
        row, it is a CheckpointError.
        """
        if self._saved_step == state.step:
            return
        failure: Exception | None = None
        started = time.monotonic()
        if self._is_main:
            try:
                self._write(state)
            except (OSError, NonFiniteAbortError) as error:
                failure = error
        # Every rank waits here for the commit: the first task that ends can make SLURM or the agent end the others.
        failed = distributed.first_failing_rank(failure is not None, self.device) is not None
        self._last_save_s = time.monotonic()
        if not failed:
            self._failed_saves = 0
            self._saved_step = state.step
            spent = {"speed/checkpoint_s": time.monotonic() - started}
            self.monitor.log(spent, step=state.step, samples_seen=state.samples_seen)
            return
        self._failed_saves += 1
        if isinstance(failure, NonFiniteAbortError):
            raise failure
        if failure is not None:
            self.monitor.warn(f"checkpoint of step {state.step} not saved: {failure}; training goes on")
        if final or self._failed_saves >= MAX_FAILED_SAVES:
            if failure is None:
                raise FailedElsewhereError
            raise CheckpointError(f"{self._failed_saves} save(s) in a row failed, the last with: {failure}")

    def _write(self, state: TrainState) -> None:
        self._guard.check()  # and not into a directory that has vanished
        self._refuse_non_finite(state)
        files.write_checkpoint(
            RunDir(self.config.run_dir).checkpoints,
            attempt=attempt_name(),
            config=self.config,
            state=state,
            fingerprint=self._fingerprint,
            model=self._model,
            optimizer=self._optimizer,
            grad_scaler=self._scaler.state_dict() if self._scaler is not None else {},
            versions=versions(),
            probe_state=self._probe.state_dict() if self._probe is not None else None,
            before_commit=self._guard.check,
        )
        # Only now: whoever deletes before writing has nothing left when the write fails.
        lineage.prune(self.config.run_dir, self.config.checkpoint.keep)

    def _refuse_non_finite(self, state: TrainState) -> None:
        tensors = {**self._model.state_dict(), **files.named_optimizer_state(self._model, self._optimizer)}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteAbortError(f"{name} holds NaN or infinity after step {state.step}; nothing was saved")
