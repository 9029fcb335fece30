"""Images a second: one definition, by a clock that the test moves."""

from __future__ import annotations

import pytest

from simclr_dist.monitor.speed import LAST_INTERVAL, SINCE_START, Speed


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def speed(clock: Clock) -> Speed:
    """Of a start that goes on after 640 samples."""
    return Speed(640, clock)


def test_both_figures_count_the_images_of_this_start_alone(speed: Speed, clock: Clock) -> None:
    clock.now_s += 10
    assert speed.read(640 + 100) == {LAST_INTERVAL: 10.0, SINCE_START: 10.0}
    clock.now_s += 10
    assert speed.read(640 + 400) == {LAST_INTERVAL: 30.0, SINCE_START: 20.0}


@pytest.mark.parametrize("pauses", [(5.0,), (1.0, 100.0), (0.0, 1e6, 3.0)])
def test_evaluations_and_saves_make_no_training_slower(speed: Speed, clock: Clock, pauses: tuple[float, ...]) -> None:
    for pause_s in pauses:
        clock.now_s += 10 / len(pauses)
        with speed.paused():
            clock.now_s += pause_s
    assert speed.read(640 + 100) == pytest.approx({LAST_INTERVAL: 10.0, SINCE_START: 10.0})
    assert speed.paused_s == sum(pauses)
    assert speed.trained_s() == pytest.approx(10.0)


def test_a_pause_that_fails_ends_as_well(speed: Speed, clock: Clock) -> None:
    def evaluate() -> None:
        with speed.paused():
            clock.now_s += 7
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        evaluate()
    clock.now_s += 1
    assert speed.since_start(650) == 10.0


def test_an_interval_of_a_quick_step_is_no_figure_of_the_run(speed: Speed, clock: Clock) -> None:
    """What was shown as the speed of a run was once that of its last step."""
    for _ in range(100):
        clock.now_s += 1
    speed.read(640 + 6400)
    clock.now_s += 0.01
    last = speed.read(640 + 6400 + 64)
    assert last[LAST_INTERVAL] == pytest.approx(6400, rel=1e-6)
    assert last[SINCE_START] == pytest.approx(6464 / 100.01)


def test_no_time_at_all_is_no_division_by_zero(speed: Speed) -> None:
    assert speed.read(640) == {LAST_INTERVAL: 0.0, SINCE_START: 0.0}
    assert speed.read(704)[SINCE_START] > 0
