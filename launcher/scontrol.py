"""Queries to SLURM: its commands, their output, and what the output means."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from launcher.launch_plan import checked
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


def host_names(nodelist: str) -> tuple[str, ...]:
    """The hosts of a list such as n[1-2]; empty where SLURM does not answer."""
    listing = query(["scontrol", "show", "hostnames", nodelist]) if nodelist else None
    return tuple(checked("host", name) for name in (listing or "").split())


def node_address(host: str) -> str:
    return _of_node(host, "NodeAddr")


def threads_per_core(host: str) -> int:
    return int(_of_node(host, "ThreadsPerCore") or 1)


def all_answer(hosts: Sequence[str]) -> bool:
    """Whether SLURM takes these nodes for fit: none is down or without an answer (`*` behind its state)."""
    described = query(["scontrol", "-o", "show", "node", ",".join(hosts)]) or ""
    states = re.findall(r"(?:^|\s)State=(\S+)", described)
    return not any(re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", state) for state in states)


def _of_node(host: str, key: str) -> str:
    match = re.search(rf"(?:^|\s){key}=(\S+)", query(["scontrol", "-o", "show", "node", host]) or "")
    return match[1] if match else ""


def live_step(job: str, name: str) -> str:
    """The id of a step of the job that has this name; empty if there is none. job: in an array ARRAY_TASK."""
    steps = query(["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i %j"]) or ""
    return next((line.split()[0] for line in steps.splitlines() if re.fullmatch(rf"{job}\.\S+ +{name} *", line)), "")


def parse_time_limit(text: str) -> float | None:
    """Seconds of a limit as sbatch takes it: MIN, MIN:S, H:M:S, D-H, D-H:M or D-H:M:S. None if it is none of these."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is None and len(given) < 3:  # MIN or MIN:S
        given.insert(0, 0)
    hours, minutes, seconds = [*given, 0, 0][:3]
    return 86400.0 * (days or 0) + 3600 * hours + 60 * minutes + seconds


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
