"""What happens around the steps: figures, health, evaluation, checkpoints. The step knows nothing of it.

An observer that fails is a warning that names its setting, and training goes on without it. Checkpoints are no
observer: a training whose state cannot be saved ends (saving.py).
"""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simclr_dist.config import Config
from simclr_dist.data import Batch, Loader
from simclr_dist.errors import FailedElsewhereError, UserError
from simclr_dist.evaluation.drift import DriftGuard, Likeness, likeness
from simclr_dist.evaluation.gallery import show_gallery
from simclr_dist.evaluation.online import OnlineEvaluation, OnlineScores
from simclr_dist.evaluation.online_probe import OnlineProbe
from simclr_dist.health.check import HealthCheck, RankFacts, Recording
from simclr_dist.kinds import kind_of
from simclr_dist.monitor.events import Histograms, Pairs, StepsDone
from simclr_dist.monitor.monitor import Monitor, memory_peak_gib
from simclr_dist.monitor.speed import LAST_INTERVAL, Speed
from simclr_dist.network.flops import peak_flops, train_flops
from simclr_dist.network.precision import assumed_precision
from simclr_dist.optim.schedule import learning_rate
from simclr_dist.parallel import distributed
from simclr_dist.run.guard import LimitName, RunGuard
from simclr_dist.run.layout import RunDir, append_record
from simclr_dist.run.state import TrainState
from simclr_dist.training.parts import Parts
from simclr_dist.training.step import FinishedStep
from simclr_dist.training.summary import device_name


class Observer(ABC):
    """Called by all ranks together after every step."""

    name: str
    """What it does, for messages."""
    setting: str
    """The key of the configuration that switches it off."""
    limit: LimitName | None = None
    """The time limit it has of its own; None: it belongs to the step."""
    is_collective = False
    """All ranks must do it together, so all of them give it up together. What may fail on one rank alone, before a
    collective inside, goes through `run_on_all_ranks`.
    """

    def begins(self, state: TrainState) -> bool:
        """Whether there is something to do before the first step; the same on every rank."""
        return False

    def before_first_step(self) -> None:
        """What `begins` announces."""
        raise NotImplementedError

    @abstractmethod
    def is_due(self, finished: FinishedStep) -> bool:
        """The same on every rank."""

    @abstractmethod
    def after_step(self, finished: FinishedStep) -> None: ...


class Observers:
    """Calls each observer that is due. One that fails is left out from then on, on all ranks."""

    def __init__(
        self, observers: Sequence[Observer], guard: RunGuard, monitor: Monitor, device: torch.device, speed: Speed
    ) -> None:
        self._observers = list(observers)
        self._guard = guard
        self._speed = speed
        self._monitor = monitor
        self._device = device

    def begin(self, state: TrainState) -> None:
        """Once, before the first step of this start."""
        for observer in list(self._observers):
            if observer.begins(state):
                self._call(observer, observer.before_first_step, state.step)

    def after_step(self, finished: FinishedStep) -> None:
        for observer in list(self._observers):
            if observer.is_due(finished):
                self._call(observer, partial(observer.after_step, finished), finished.step)

    def _call(self, observer: Observer, work: Callable[[], None], step: int) -> None:
        if observer.limit is None:
            self._try(observer, work, step)
            return
        with self._guard.busy(observer.name, observer.limit), self._speed.paused():
            self._try(observer, work, step)

    def _try(self, observer: Observer, work: Callable[[], None], step: int) -> None:
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        where, reason = "", None if failure is None else _reason_of(failure)
        if observer.is_collective:
            # The rank that met the fault says why; those that only heard of it have nothing to add.
            own = None if isinstance(failure, FailedElsewhereError) else reason
            said = distributed.first_text(own, self._device)
            if said is not None:
                where, reason = f" on rank {said[0]}" if distributed.world_size() > 1 else "", said[1]
        if reason is not None:
            self._observers.remove(observer)
            self._monitor.warn(
                f"{observer.name} failed{where} after step {step} and is left out from now on: {reason}. "
                f"{observer.setting} switches it off; training goes on"
            )


def _reason_of(failure: Exception) -> str:
    """One line; of a fault of the program also its kind and its place."""
    text = " ".join(str(failure).split())
    if isinstance(failure, UserError | OSError):
        return text or type(failure).__name__
    last = traceback.extract_tb(failure.__traceback__)[-1:]
    place = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in last)
    return f"{type(failure).__name__}{': ' if text else ''}{text}{place}"


class AugmentedPairs(Observer):
    """Shows all views of a few images at the start of an epoch."""

    name = "showing augmented pairs"
    setting = "monitor.image_pairs"

    def __init__(
        self,
        num_images: int,
        steps_per_epoch: int,
        show_views: Callable[[Batch], Tensor | list[list[str]] | None],
        monitor: Monitor,
    ) -> None:
        self._num_images = num_images
        self._steps_per_epoch = steps_per_epoch
        self._show_views = show_views
        self._monitor = monitor

    def is_due(self, finished: FinishedStep) -> bool:
        return self._num_images > 0 and (finished.step - 1) % self._steps_per_epoch == 0

    def after_step(self, finished: FinishedStep) -> None:
        if distributed.rank() != 0:
            return
        batch, n = finished.batch, min(self._num_images, len(finished.batch.labels))
        texts = None if batch.texts is None else batch.texts[:n]
        few = Batch(batch.views[:, :n], batch.sample_ids[:n], batch.labels[:n], batch.epoch, texts=texts)
        global_batch_size = len(batch.labels) * distributed.world_size()
        with torch.no_grad():
            shown = self._show_views(few)
        if shown is not None:
            self._monitor.show(Pairs(shown, finished.samples_seen - global_batch_size))


class Probe(Observer):
    """The online probe learns from every step; its recent accuracy, every few steps."""

    name = "the online probe"
    setting = "evaluation.online_probe"

    def __init__(self, probe: OnlineProbe | None, log_every_steps: int) -> None:
        self._probe = probe
        self._log_every = log_every_steps

    def is_due(self, finished: FinishedStep) -> bool:
        return self._probe is not None

    def after_step(self, finished: FinishedStep) -> None:
        assert self._probe is not None
        if not finished.result.skipped:
            self._probe.update(finished.result.h, finished.batch.labels)
        if finished.step % self._log_every == 0 or finished.is_last:
            top1, top5 = self._probe.recent_accuracy()
            finished.figures.update({"train/probe_top1": top1, "train/probe_top5": top5})


class Figures(Observer):
    """Loss, learning rate and speed, every few steps."""

    name = "logging"
    setting = "monitor.log_every_steps"

    def __init__(
        self,
        every_steps: int,
        monitor: Monitor,
        loader: Loader,
        device: torch.device,
        speed: Speed,
        *,
        learning_rate: Callable[[], float],
        masked_duplicates: Callable[[], int],
        temperature: Callable[[], float] | None,
        flops: int | None,
        precision: str,
    ) -> None:
        """temperature: a learnt one; None: it stays. flops: of an image in a step; None: not known."""
        self._every = every_steps
        self._monitor = monitor
        self._loader = loader
        self._device = device
        self._speed = speed
        self._learning_rate = learning_rate
        self._masked_duplicates = masked_duplicates
        self._temperature = temperature
        self._flops = flops
        self._precision = precision
        self._waited_s = loader.wait_s  # at the last reading

    def is_due(self, finished: FinishedStep) -> bool:
        return True

    def after_step(self, finished: FinishedStep) -> None:
        self._monitor.show(StepsDone(finished.step))
        if finished.step % self._every == 0 or finished.is_last:
            loss = {"train/loss": float(finished.result.loss), "train/grad_norm": float(finished.result.grad_norm)}
            # The loss waits for the device: first.
            values = {**loss, **self._measure(finished), **finished.figures}
            self._monitor.log(values, step=finished.step, samples_seen=finished.samples_seen)

    def _measure(self, finished: FinishedStep) -> dict[str, float]:
        wait_s, self._waited_s = self._loader.wait_s - self._waited_s, self._loader.wait_s
        share = wait_s / self._speed.interval_s()
        speeds = self._speed.read(finished.samples_seen)
        per_device = speeds[LAST_INTERVAL] / distributed.world_size()
        values = {
            "train/lr": self._learning_rate(),
            **speeds,
            "speed/images_per_s_per_device": per_device,
            "speed/data_wait_share": share,
            "speed/memory_peak_gib": memory_peak_gib(self._device),
            "health/masked_duplicates": float(self._masked_duplicates()),
        }
        if self._temperature:
            values["train/temperature"] = self._temperature()
        if self._flops:
            flops_per_s = self._flops * per_device
            values["speed/model_tflops_per_device"] = flops_per_s / 1e12
            if peak := peak_flops(device_name(self._device), self._precision):
                values["speed/model_flops_utilization"] = flops_per_s / peak
        return values


class Health(Observer):
    """The health check of the step that recorded for it (health/check.py)."""

    name = "the health check"
    setting = "monitor.health_every_steps"
    is_collective = True

    def __init__(
        self,
        check: HealthCheck,
        monitor: Monitor,
        loader: Loader,
        device: torch.device,
    ) -> None:
        self._check = check
        self._monitor = monitor
        self._loader = loader
        self._device = device
        self._last: tuple[float, float] | None = None  # when, and the loader's wait then

    def is_due(self, finished: FinishedStep) -> bool:
        if self._last is None:
            self._last = finished.began_s, finished.waited_s
        if finished.result.skipped:
            return False
        return finished.result.recording is not None or self._check.is_watched(finished.step)

    def after_step(self, finished: FinishedStep) -> None:
        watched = self._check.is_watched(finished.step)
        if watched and (warning := self._check.watch(finished.result.h, finished.result.z)):
            self._monitor.warn(f"step {finished.step}: {warning}")
        if finished.result.recording is not None:
            self._examine(finished, finished.result.recording)

    def _examine(self, finished: FinishedStep, recording: Recording) -> None:
        result, started_s, wait_s = finished.result, time.monotonic(), self._loader.wait_s
        assert self._last is not None
        since_s, waited_s = self._last
        share = (wait_s - waited_s) / max(started_s - since_s, 1e-9)
        findings = self._check.examine(
            recording,
            result.h,
            result.z,
            RankFacts(share, memory_peak_gib(self._device)),
            group_ids=finished.batch.group_ids,
            grad_scale=result.loss_scale,
        )
        if distributed.rank() == 0:
            scalars = {**findings.scalars, "speed/health_check_s": time.monotonic() - started_s}
            self._monitor.log(scalars, step=finished.step, samples_seen=finished.samples_seen)
            self._monitor.show(Histograms(findings.histograms, finished.samples_seen))
            for warning in findings.warnings:
                self._monitor.warn(f"step {finished.step}: {warning}")
        self._last = time.monotonic(), wait_s


class Evaluation(Observer):
    """kNN and the probe's accuracy on data.test at the end of epochs."""

    name = "evaluating"
    setting = "evaluation.knn_every_epochs"
    limit = "evaluation_s"
    is_collective = True

    def __init__(
        self,
        every_epochs: int | None,
        evaluate: Callable[[int], OnlineScores],
        monitor: Monitor,
        run_dir: RunDir,
        drift: DriftGuard | None = None,
    ) -> None:
        """evaluate: called with the number of steps done, by all ranks together. drift: of a start from weights."""
        self._every = every_epochs
        self._drift = drift
        self._evaluate = evaluate
        self._monitor = monitor
        self._run_dir = run_dir

    def is_due(self, finished: FinishedStep) -> bool:
        if self._every is None or finished.ended_epoch is None:
            return False
        return finished.ended_epoch % self._every == 0 or finished.is_last

    def begins(self, state: TrainState) -> bool:
        return self._every is not None and self._drift is not None and state.step == 0

    def before_first_step(self) -> None:
        assert self._drift is not None
        scores = self._evaluate(0)
        top1 = scores.figures["eval/knn_top1"]  # the probe has learnt nothing yet
        self._drift.begin_knn(top1)
        self._monitor.log({"eval/knn_top1": top1}, step=0, samples_seen=0)
        self._record(scores)

    def after_step(self, finished: FinishedStep) -> None:
        scores = self._evaluate(finished.step)
        finished.figures.update(scores.figures)
        self._monitor.log(scores.figures, step=finished.step, samples_seen=finished.samples_seen)
        self._record(scores)
        if self._drift is not None and (
            warning := self._drift.compare_knn(scores.figures["eval/knn_top1"], scores.record)
        ):
            self._monitor.warn(f"step {finished.step}: {warning}")

    def _record(self, scores: OnlineScores) -> None:
        if distributed.rank() == 0:
            try:
                append_record(self._run_dir.evaluations, scores.record)
            except OSError as error:
                self._monitor.warn_once(f"{self._run_dir.evaluations} cannot be written to: {error}")


class Drift(Observer):
    """What has become of the h of given weights, at the end of epochs; without labels."""

    name = "comparing with the start"
    setting = "evaluation.drift_every_epochs"
    limit = "evaluation_s"
    is_collective = True

    def __init__(
        self,
        every_epochs: int | None,
        measure: Callable[[], Likeness | None],
        monitor: Monitor,
        guard: DriftGuard | None,
    ) -> None:
        """measure: called by all ranks together. guard: None without given weights."""
        self._every = None if guard is None else every_epochs
        self._measure = measure
        self._monitor = monitor
        self._guard = guard

    def begins(self, state: TrainState) -> bool:
        return self._every is not None and state.step == 0

    def before_first_step(self) -> None:
        assert self._guard is not None
        self._monitor.log(self._guard.begin(self._measure()), step=0, samples_seen=0)

    def is_due(self, finished: FinishedStep) -> bool:
        if self._every is None or finished.ended_epoch is None:
            return False
        return finished.ended_epoch % self._every == 0 or finished.is_last

    def after_step(self, finished: FinishedStep) -> None:
        assert self._guard is not None
        figures, warning = self._guard.compare(self._measure())
        self._monitor.log(figures, step=finished.step, samples_seen=finished.samples_seen)
        if warning:
            self._monitor.warn(f"step {finished.step}: {warning}")


class Gallery(Observer):
    """The embedding projector and nearest neighbours at the end of epochs."""

    name = "showing neighbours"
    setting = "monitor.projector_every_epochs"
    limit = "evaluation_s"
    is_collective = True

    def __init__(self, every_epochs: int | None, show: Callable[[int], None]) -> None:
        """show: called with samples seen, by all ranks together."""
        self._every = every_epochs
        self._show = show

    def is_due(self, finished: FinishedStep) -> bool:
        return bool(self._every and finished.ended_epoch is not None and finished.ended_epoch % self._every == 0)

    def after_step(self, finished: FinishedStep) -> None:
        self._show(finished.samples_seen)


def build_observers(
    config: Config,
    parts: Parts,
    augment: Callable[[Batch], Tensor],
    nt_xent: Callable[[Tensor, Tensor], Tensor],
    speed: Speed,
) -> Observers:
    """In the order in which they are called.

    augment, nt_xent: the trainer's own, which a subclass may have exchanged. speed: of this start of the run.
    """
    device, monitor = parts.device, parts.monitor
    precision = assumed_precision(config.train.precision, device.type)
    batch_size = config.evaluation.batch_size

    seen = kind_of(config.evaluation_data)  # by evaluations
    images, evaluation = parts.evaluation_images, None
    if images is not None:
        evaluation = OnlineEvaluation(
            images,
            kind=seen,
            evaluation=config.evaluation,
            precision=precision,
            device=device,
            warn_once=monitor.warn_once,
        )

    def evaluate(step: int) -> OnlineScores:
        assert evaluation is not None
        probe = None if parts.probe is None or parts.probe.has_failed else parts.probe
        return evaluation(parts.encoder, step, probe)

    def show_neighbours(samples_seen: int) -> None:
        show_gallery(
            parts.encoder,
            monitor,
            kind=seen,
            batch_size=batch_size,
            precision=precision,
            samples_seen=samples_seen,
            device=device,
        )

    origin = parts.state.started_from
    drift = None if origin is None else DriftGuard(origin)

    def measure_likeness() -> Likeness | None:
        return likeness(parts.encoder, seen, batch_size=batch_size, precision=precision, device=device)

    figures = Figures(
        config.monitor.log_every_steps,
        monitor,
        parts.loader,
        device,
        speed,
        learning_rate=lambda: learning_rate(parts.optimizer),
        masked_duplicates=lambda: getattr(nt_xent, "masked_duplicates", 0),
        temperature=(lambda: parts.nt_xent.temperature_now) if config.loss.learn_temperature else None,
        flops=train_flops(parts.forward_flops, config.data.num_views) if parts.forward_flops else None,
        precision=precision,
    )
    return Observers(
        [
            AugmentedPairs(
                config.monitor.image_pairs,
                parts.steps_per_epoch,
                lambda batch: parts.kind.show_views(augment(batch).cpu()),
                monitor,
            ),
            Probe(parts.probe, config.monitor.log_every_steps),
            figures,
            Health(parts.health, monitor, parts.loader, device),
            Evaluation(config.evaluation.knn_every_epochs, evaluate, monitor, RunDir(config.run_dir), drift),
            Drift(config.evaluation.drift_every_epochs, measure_likeness, monitor, drift),
            Gallery(config.monitor.projector_every_epochs, show_neighbours),
        ],
        parts.guard,
        monitor,
        device,
        speed,
    )
