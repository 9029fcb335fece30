"""How an attempt ended, and what follows from it.

Exit codes cannot tell: accelerate turns every worker's code into 1. So the trainer writes RUN/status.json, the launcher
adds lines to RUN/attempts.jsonl, and `decide` is a pure function of these files and of what the scheduler reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

from launcher.errors import Exit
from launcher.launch_plan import job_of
from simclr_dist.run.layout import NUMBER, Records, RunDir, append_record, read_records
from simclr_dist.run.status import Status

PERMANENT = ("config_error", "data_error", "nan_abort", "checkpoint_error", "unfit")
"""Reasons of a failure that would come back in every further attempt."""
PERMANENT_EXIT = {"config_error": Exit.USAGE, "unfit": Exit.PREFLIGHT}


# ---------------------------------------------------------------------------------------------------------------------
# attempts.jsonl


def record(run_dir: Path, event: str, attempt: str, **values: Any) -> None:
    """Adds a line. event: submit, start, end or requeue_refused."""
    line = {"event": event, "attempt": attempt, "time": round(time.time(), 3), **values}
    # `resume` runs its commands, and refuses those of a file that others may write to.
    append_record(RunDir(run_dir).attempts, line, mode=0o640)


def recorded(run_dir: Path, *events: str) -> list[dict[str, Any]]:
    """The lines of these events, oldest first."""
    return [entry for entry in read_attempts(run_dir) if entry["event"] in events]


def read_attempts(run_dir: Path) -> Records:
    """Every line whose entries are of their kinds."""
    return read_records(
        RunDir(run_dir).attempts,
        event=str,
        attempt=str,
        time=NUMBER | None,
        step=int | None,
        rc=int | None,
        why=str | None,
        job=str | None,
        workdir=str | None,
        log=str | None,
        again=list | None,
    )


@dataclass(frozen=True)
class Ended:
    """One earlier attempt of the same job."""

    failed: bool
    progressed: bool


def earlier_attempts(run_dir: Path, attempt: str) -> list[Ended]:
    """The attempts of the same job before this one, oldest first.

    An attempt without a recorded end was cut off by a lost node or by its scheduler: it does not count as failed.
    """
    starts, ends = (
        {entry["attempt"]: entry for entry in recorded(run_dir, event) if job_of(entry["attempt"]) == job_of(attempt)}
        for event in ("start", "end")
    )
    result = []
    for name, following in pairwise([*(name for name in starts if name != attempt), attempt]):
        # Where no end was recorded, the attempt came as far as the next one's start.
        last = ends.get(name) or starts.get(following, {})
        steps = starts[name].get("step") or 0, last.get("step") or 0
        result.append(Ended(bool(last.get("failed")), has_progressed(*steps)))
    return result


def has_progressed(start_step: int, end_step: int) -> bool:
    """Whether an attempt was worth its start. One that is asked to stop while it starts still trains one step, and so
    could come back for ever."""
    return end_step > start_step + 1


def start_step(run_dir: Path, attempt: str) -> int:
    starts = (entry for entry in recorded(run_dir, "start") if entry["attempt"] == attempt)
    return next(starts, {}).get("step") or 0


# ---------------------------------------------------------------------------------------------------------------------
# The decision

JobState = Literal["none", "running", "time_limit", "cancelled", "requeued", "unknown"]
"""What the scheduler reports of the job. none: there is no scheduler; requeued: the scheduler will start it again."""


@dataclass(frozen=True)
class Evidence:
    rc: int
    """The exit code of the attempt's processes."""
    status: Status | None
    """What this attempt left in status.json; None if it wrote nothing there."""
    start_step: int
    end_step: int
    earlier: tuple[Ended, ...] = ()
    stop_file: bool = False
    job: JobState = "none"
    never_started: str = ""
    """Why the scheduler started nothing of this attempt, in its own words; empty where something ran."""
    stop_requested: bool = False
    """Whether this attempt was asked to save and stop, or ended by its scheduler."""
    not_ours: str = ""
    """Why the job must not be requeued; empty where it is there for this training alone."""


@dataclass(frozen=True)
class Decision:
    action: Literal["done", "requeue", "leave", "fail"]
    """done: the run has ended as wanted; requeue: start it again; leave: do nothing, it can be continued; fail: do
    nothing, a person has to look first."""
    exit_code: Exit
    why: str
    failed: bool = False
    """Whether this attempt counts as a failure; a preemption does not."""
    permanent: bool = False
    """The same command would fail in the same way."""
    explained: bool = False
    """The last lines that were printed say why: no process of the training had been started."""


def decide(evidence: Evidence, *, max_failures: int, requeue: bool) -> Decision:
    """What to do after an attempt. `max_failures`: failures in a row that are forgiven, while each makes progress."""
    status = evidence.status
    state, reason = (status.state, status.reason) if status else ("", "")
    if status is None and evidence.rc == Exit.USAGE:
        return Decision(
            "fail", Exit.USAGE, "refused: another attempt would be, too", failed=True, permanent=True, explained=True
        )
    if state == "finished":
        return Decision("done", Exit.OK, "finished")
    if state == "stopped" or evidence.stop_file:
        return Decision("done", Exit.OK, f"stopped on request at step {evidence.end_step}")
    if evidence.job == "cancelled":
        return Decision("leave", Exit.OK, "the job was cancelled; it stays cancelled")
    if evidence.job == "requeued":
        return Decision("leave", Exit.OK, "the scheduler has requeued the job already")
    if state == "failed" and reason in PERMANENT:
        return Decision(
            "fail",
            PERMANENT_EXIT.get(reason, Exit.FAILED),
            f"{reason}: another attempt would fail in the same way",
            failed=True,
            permanent=True,
            explained=evidence.rc == Exit.USAGE,  # workers' exit codes become 1
        )

    if evidence.never_started and status is None and not evidence.stop_requested:
        return Decision("fail", Exit.FAILED, f"srun could not start the step: {evidence.never_started}", failed=True)

    progressed = has_progressed(evidence.start_step, evidence.end_step)
    idle = 0 if progressed else 1 + _num_last(evidence.earlier, lambda ended: not ended.progressed)
    cut_short = evidence.stop_requested and status is None  # before any process could answer
    if state == "preempted" or evidence.job == "time_limit" or cut_short:
        what = "time limit" if evidence.job == "time_limit" else "preempted"
        again = Decision("requeue", Exit.PREEMPTED, f"{what} at step {evidence.end_step}")
        if evidence.job == "none":  # a person asked; nothing here starts it again by itself
            return replace(again, action="leave")
        if idle > max(1, max_failures):
            return Decision(
                "fail",
                Exit.GAVE_UP,
                f"{what}; {idle} attempts in a row trained one step at most (is the time limit too short?)",
            )
    else:
        failures = 1 + _num_last(evidence.earlier, lambda ended: ended.failed)
        what = (reason or "crash") if state == "failed" else f"ended without a status (exit code {evidence.rc})"
        code = Exit.PREFLIGHT if reason == "preflight" else Exit.FAILED
        if idle >= 2:
            return Decision("fail", Exit.GAVE_UP, f"{what}; {idle} attempts in a row made no progress", failed=True)
        if failures > max_failures:
            code = Exit.GAVE_UP if max_failures else code
            times = f"; {failures} failures in a row" if failures > 1 else ""
            return Decision("fail", code, f"{what} at step {evidence.end_step}{times}", failed=True)
        again = Decision("requeue", code, f"{what} (failure {failures} of {max_failures} forgiven)", failed=True)
    if not requeue:
        return _not_requeued(again, "requeueing is switched off")
    if evidence.not_ours:
        return _not_requeued(again, evidence.not_ours)
    if evidence.job == "unknown":
        # The user may have cancelled the job, and then it must not come back.
        return _not_requeued(again, "the scheduler did not say how the job ended")
    return replace(again, exit_code=Exit.OK)


def _not_requeued(again: Decision, because: str) -> Decision:
    return replace(again, action="leave", why=f"{again.why}; not requeued: {because}")


def _num_last(attempts: tuple[Ended, ...], holds: Callable[[Ended], bool]) -> int:
    """For how many of the last attempts in a row `holds` is true."""
    return sum(1 for _ in takewhile(holds, reversed(attempts)))
