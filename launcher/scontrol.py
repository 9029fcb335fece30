"""Queries to SLURM: its commands, their output, and what the output means."""

from __future__ import annotations

import re
import subprocess

from launcher.outcome import JobState

QUERY_TIMEOUT_S = 30.0


def query(argv: list[str]) -> str | None:
    """What a SLURM command prints; None if it is missing, fails or hangs."""
    done = run_query(argv)
    return done.stdout if done is not None and done.returncode == 0 else None


def run_query(argv: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(argv, text=True, capture_output=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def node_address(host: str) -> str:
    match = re.search(r"(?:^|\s)NodeAddr=(\S+)", query(["scontrol", "-o", "show", "node", host]) or "")
    return match[1] if match else ""


def log_path(job: str) -> str:
    match = re.search(r"\sStdOut=(.*?)(?: [A-Z][A-Za-z:]*=|\s*$)", query(["scontrol", "-o", "show", "job", job]) or "")
    return match[1] if match else ""


def job_state(job: str, own_restarts: int) -> JobState:
    """own_restarts: how often SLURM had restarted the job when this attempt began."""
    return parse_job_state(query(["scontrol", "-o", "show", "job", job]) or "", own_restarts)


def parse_job_state(description: str, own_restarts: int) -> JobState:
    """Why the step of a job ended, from the output of `scontrol -o show job`.

    SIGTERM comes from a scancel, a preemption and a requeue alike, and a cancelled job must not be requeued.
    """
    fields = dict(re.findall(r"(?:^|\s)(JobState|Reason|Restarts)=(\S+)", description))
    state, reason = fields.get("JobState"), fields.get("Reason")
    if state is None or not fields.get("Restarts", "").isdigit():
        return "unknown"
    if int(fields["Restarts"]) > own_restarts or state in ("PENDING", "REQUEUED"):
        return "requeued"
    if state == "RUNNING":
        return "running"
    if state == "TIMEOUT" or (state == "COMPLETING" and reason == "TimeLimit"):
        return "time_limit"
    if state == "CANCELLED" or (state == "COMPLETING" and reason == "None"):
        return "cancelled"
    return "unknown"
