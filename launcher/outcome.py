"""How an attempt ended, and what follows from it.

Exit codes cannot say: accelerate turns every worker's code into 1. So the trainer leaves its outcome in
RUN/status.json, the launcher keeps RUN/attempts.jsonl (append-only), and `decide` is a pure function of what is on disk
and what the scheduler says. It remembers nothing itself, so it may be asked twice.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import Exit

NEVER_AGAIN = ("config_error", "data_error", "nan_abort", "checkpoint_error")
"""Reasons that another attempt would only meet again."""


@dataclass(frozen=True)
class Status:
    """RUN/status.json, as the trainer (or a node that fails its preflight) writes it."""

    state: str
    """running, finished, preempted, stopped or failed"""
    reason: str = ""
    """of `failed`: what simclr_dist.status names, or preflight"""
    step: int = 0
    attempt: str = ""
    message: str = ""
    time: str = ""


def read_status(run_dir: Path) -> Status | None:
    """None where there is no readable status yet."""
    try:
        values = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
        return Status(
            state=str(values["state"]),
            reason=str(values.get("reason") or ""),
            step=int(values.get("step") or 0),
            attempt=str(values.get("attempt") or ""),
            message=str(values.get("message") or ""),
            time=str(values.get("time") or ""),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_status(run_dir: Path, status: Status) -> None:
    temporary = run_dir / f".status-{status.attempt}-{os.getpid()}.json"
    temporary.write_text(json.dumps(status.__dict__) + "\n", encoding="utf-8")
    temporary.replace(run_dir / "status.json")


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, by name; 0 if there is none."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step_*"))
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)", name))), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# attempts.jsonl


def record(run_dir: Path, event: str, attempt: str, **values: Any) -> None:
    """Append one line. A single write to a file opened for appending stays whole beside others."""
    line = json.dumps({"event": event, "attempt": attempt, "time": round(time.time(), 3), **values}) + "\n"
    descriptor = os.open(run_dir / "attempts.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line cut short when the machine died
        if isinstance(entry, dict) and "event" in entry and "attempt" in entry:
            records.append(entry)
    return records


@dataclass(frozen=True)
class Ended:
    """One earlier attempt of the same job."""

    failed: bool
    progressed: bool


def earlier_attempts(run_dir: Path, attempt: str) -> list[Ended]:
    """Attempts of this attempt's job before it, oldest first. One that left no end was cut off by a lost node or by a
    scheduler that waited no longer: no failure of the run."""
    job = attempt.partition(".")[0]
    starts: dict[str, int] = {}
    ends: dict[str, dict[str, Any]] = {}
    for entry in read_records(run_dir):
        if entry["attempt"].partition(".")[0] != job or entry["attempt"] == attempt:
            continue
        if entry["event"] == "start":
            starts[entry["attempt"]] = int(entry.get("step", 0))
        elif entry["event"] == "end":
            ends[entry["attempt"]] = entry
    names, result = list(starts), []
    for i, name in enumerate(names):
        if name in ends:
            progressed, failed = int(ends[name].get("step", 0)) > starts[name], bool(ends[name].get("failed"))
        else:
            # What it reached is where the next one started.
            following = starts[names[i + 1]] if i + 1 < len(names) else start_step(run_dir, attempt)
            progressed, failed = following > starts[name], False
        result.append(Ended(failed, progressed))
    return result


def start_step(run_dir: Path, attempt: str) -> int:
    for entry in read_records(run_dir):
        if entry["event"] == "start" and entry["attempt"] == attempt:
            return int(entry.get("step", 0))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The decision

JobWord = Literal["none", "running", "time_limit", "cancelled", "requeued", "unknown"]
"""What the scheduler says of the job: `none`: there is no scheduler; `requeued`: it will start again by itself."""


@dataclass(frozen=True)
class Evidence:
    rc: int
    status: Status | None
    """Of this attempt; None if the trainer wrote none."""
    start_step: int
    end_step: int
    earlier: tuple[Ended, ...] = ()
    stop_file: bool = False
    job: JobWord = "none"


@dataclass(frozen=True)
class Decision:
    action: Literal["done", "requeue", "leave", "fail"]
    """done: the run is over as wanted; requeue: start again; leave: somebody else decides; fail: a person must look."""
    exit_code: Exit
    why: str
    failed: bool = False
    """This attempt counts as a failure (and not as a preemption)."""


def decide(evidence: Evidence, *, max_failures: int, requeue: bool) -> Decision:
    """What to do after an attempt. `max_failures`: failures in a row that are forgiven, while each makes progress."""
    status = evidence.status
    state, reason = (status.state, status.reason) if status else ("", "")
    if state == "finished":
        return Decision("done", Exit.OK, "finished")
    if state == "stopped" or evidence.stop_file:
        return Decision("done", Exit.OK, f"stopped on request at step {evidence.end_step}")
    if evidence.job == "cancelled":
        return Decision("leave", Exit.OK, "the job was cancelled; it stays cancelled")
    if evidence.job == "requeued":
        return Decision("leave", Exit.OK, "the scheduler has requeued the job already")
    if state == "failed" and reason in NEVER_AGAIN:
        code = Exit.USAGE if reason == "config_error" else Exit.FAILED
        return Decision("fail", code, f"{reason}: another attempt would meet it again", failed=True)

    progressed = evidence.end_step > evidence.start_step
    idle = 0 if progressed else 1 + _trailing(evidence.earlier, lambda ended: not ended.progressed)
    if state == "preempted" or evidence.job == "time_limit":
        what = "time limit" if evidence.job == "time_limit" else "preempted"
        verdict = Decision("requeue", Exit.OK, f"{what} at step {evidence.end_step}")
        if idle > max(1, max_failures):
            return Decision(
                "fail", Exit.GAVE_UP, f"{what}; {idle} attempts in a row saved nothing (is the time limit too short?)"
            )
        if evidence.job == "none":
            return Decision("leave", Exit.PREEMPTED, verdict.why)
    else:
        failures = 1 + _trailing(evidence.earlier, lambda ended: ended.failed)
        what = (reason or "crash") if state == "failed" else f"ended without a word (exit code {evidence.rc})"
        code = Exit.PREFLIGHT if reason == "preflight" else Exit.FAILED
        if idle >= 2:
            return Decision("fail", Exit.GAVE_UP, f"{what}; {idle} attempts in a row made no progress", failed=True)
        if failures > max_failures:
            code = Exit.GAVE_UP if max_failures else code
            times = f"; {failures} failures in a row" if failures > 1 else ""
            return Decision("fail", code, f"{what} at step {evidence.end_step}{times}", failed=True)
        verdict = Decision("requeue", code, f"{what} (failure {failures} of {max_failures} forgiven)", failed=True)
    if not requeue:
        return _not_requeued(verdict, "requeueing is switched off")
    if evidence.job == "unknown":
        # Without the scheduler's word this may be the user's own scancel; bringing that back would be rude.
        return _not_requeued(verdict, "the scheduler did not say how the job ended")
    return Decision("requeue", Exit.OK, verdict.why, verdict.failed)


def _not_requeued(verdict: Decision, because: str) -> Decision:
    code = verdict.exit_code if verdict.failed else Exit.PREEMPTED
    return Decision("leave", code, f"{verdict.why}; not requeued: {because}", verdict.failed)


def _trailing(attempts: tuple[Ended, ...], holds: Any) -> int:
    count = 0
    for ended in reversed(attempts):
        if not holds(ended):
            break
        count += 1
    return count
