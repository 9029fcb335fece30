"""Questions to SLURM: its commands, what they answer, and what an answer means."""

from __future__ import annotations

import re
import subprocess

from launcher.outcome import JobWord

QUERY_TIMEOUT_S = 30.0


def query(argv: list[str]) -> str | None:
    """What a SLURM command says; None if it is missing, fails or hangs."""
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


def job_word(job: str, own_restarts: int) -> JobWord:
    return read_job(query(["scontrol", "-o", "show", "job", job]) or "", own_restarts)


def read_job(description: str, own_restarts: int) -> JobWord:
    """Why the job's step ended, from `scontrol -o show job`: the same TERM may come from a scancel, a preemption or a
    requeue, and requeueing after a scancel would bring a cancelled job back."""
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
