"""How a training has gone so far, from its records alone: has its loss stopped falling, has it collapsed?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simclr_dist.health.collapse import collapse
from simclr_dist.run.layout import NUMBER, RunDir, is_a, read_records

PARTS = 10
SMALLEST_PART = 5  # lines of the log
IDLE_PARTS = 4  # without an improvement, at the end
STANDARD_ERRORS = 2


@dataclass(frozen=True)
class Course:
    """last_step: of the records; 0: there are none. The others are steps, None: that has not happened."""

    last_step: int = 0
    idle_since: int | None = None
    """The loss has not fallen since."""
    collapsed_since: int | None = None
    """By the last health checks; None where the last one found nothing."""


def course_of(run: RunDir, last_step: int | None = None) -> Course:
    """From RUN/log.jsonl, up to `last_step`; a release's log may lack what a later one records."""
    lines = [line for line in read_records(run.log, step=int) if last_step is None or line["step"] <= last_step]
    losses = [(line["step"], float(line["train/loss"])) for line in lines if is_a(line.get("train/loss"), NUMBER)]
    return Course(
        max((line["step"] for line in lines), default=0),
        idle_since([step for step, _ in losses], [loss for _, loss in losses]),
        _collapsed_since(lines),
    )


def idle_since(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step after which the loss has not fallen, None if it has, or where too little is known to say.

    The record is cut in ten parts. One is an improvement if its mean lies below that of the last improvement by more
    than two standard errors of their difference. Four parts without one at the end are a standstill.
    """
    size = len(losses) // PARTS
    if size < SMALLEST_PART:
        return None
    parts = [losses[len(losses) * i // PARTS : len(losses) * (i + 1) // PARTS] for i in range(PARTS)]
    means = [statistics.fmean(part) for part in parts]
    variances = [statistics.variance(part) / len(part) for part in parts]
    best = 0
    for i in range(1, PARTS):
        if means[i] < means[best] - STANDARD_ERRORS * math.sqrt(variances[i] + variances[best]):
            best = i
    if best >= PARTS - IDLE_PARTS:
        return None
    return steps[len(losses) * (best + 1) // PARTS - 1]


def _collapsed_since(lines: Sequence[Mapping[str, Any]]) -> int | None:
    since: int | None = None
    for line in lines:
        rank, spread = line.get("health/h_rankme"), line.get("health/z_std_mean")
        if is_a(rank, NUMBER) and is_a(spread, NUMBER):
            fallen = collapse(rank, 0, spread)
            since = (since if since is not None else line["step"]) if fallen else None
    return since
