"""What stands around the steps cannot end a training: an observer that fails is left out, on all ranks, and named."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from simclr_dist.data import Batch
from simclr_dist.errors import DataError
from simclr_dist.monitor.events import Event, Message, Sink
from simclr_dist.monitor.monitor import Monitor
from simclr_dist.monitor.speed import Speed
from simclr_dist.training.observers import Observer, Observers
from simclr_dist.training.step import FinishedStep, StepResult
from tests.distributed.spawn import run_ranks


class Heard(Sink):
    name = "heard"

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def show(self, event: Event) -> None:
        if isinstance(event, Message) and event.is_warning:
            self.warnings.append(event.text)


class Limits:
    """Stands for the run's guard: keeps what was done under which time limit. Its clock moves when it is read."""

    def __init__(self) -> None:
        self.busy_with: list[tuple[str, str]] = []
        self.now_s = 0.0
        self.speed = Speed(0, self.moved)

    @contextmanager
    def busy(self, doing: str, limit: str) -> Any:
        self.busy_with.append((doing, limit))
        yield

    def moved(self) -> float:
        self.now_s += 1.0
        return self.now_s


class Counting(Observer):
    name = "counting"
    setting = "monitor.counting"

    def __init__(self, fails_with: Exception | None = None) -> None:
        self.calls = 0
        self._failure = fails_with

    def is_due(self, finished: FinishedStep) -> bool:
        return finished.step % 2 == 0

    def after_step(self, finished: FinishedStep) -> None:
        self.calls += 1
        if self._failure is not None:
            raise self._failure


class Collective(Counting):
    name = "evaluating"
    setting = "evaluation.knn_every_epochs"
    limit = "evaluation_s"
    is_collective = True


def finished_step(step: int) -> FinishedStep:
    batch = Batch(torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8), torch.arange(1), torch.zeros(1, dtype=torch.int64), 0)
    return FinishedStep(batch, StepResult.of_skipped_step(), step, step, 0.0, 0.0, None, False, {})


def watch(*around: Observer, steps: int = 6) -> tuple[list[str], Limits]:
    heard, limits = Heard(), Limits()
    observers = Observers(around, limits, Monitor([heard]), torch.device("cpu"), limits.speed)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        observers.after_step(finished_step(step))
    return heard.warnings, limits


@pytest.mark.parametrize(
    "failure", [DataError("one image is damaged"), ValueError("a bug"), RuntimeError(), OSError(28, "No space left")]
)
def test_an_observer_that_fails_is_left_out_with_a_warning_and_the_others_go_on(failure: Exception) -> None:
    failing, sound = Counting(failure), Counting()
    (warning,), _ = watch(failing, sound)
    assert "counting failed after step 2 and is left out from now on" in warning
    assert (str(failure) or type(failure).__name__) in warning
    assert "monitor.counting switches it off; training goes on" in warning
    assert (failing.calls, sound.calls) == (1, 3)


def test_only_observers_with_a_limit_of_their_own_stop_the_clock_of_the_step() -> None:
    warnings, limits = watch(Counting(), Collective())
    assert warnings == []
    assert limits.busy_with == [("evaluating", "evaluation_s")] * 3
    assert limits.speed.paused_s == 3.0  # and that of the speed


def failing_on_one_rank(rank: int, world_size: int) -> tuple[int, list[str]]:
    observer = Collective(DataError("unreadable on this node") if rank == 1 else None)
    warnings, _ = watch(observer)
    return observer.calls, warnings


@pytest.mark.distributed
def test_what_fails_on_one_rank_is_left_out_on_all() -> None:
    (calls, first), (other_calls, second) = run_ranks(2, failing_on_one_rank)
    assert calls == other_calls == 1
    assert first == second  # the main process shows it, whichever rank has met it
    assert ["evaluating failed on rank 1 after step 2" in text for text in first] == [True]
    assert ["unreadable on this node" in text for text in first] == [True]
