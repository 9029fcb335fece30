"""The backend for this machine: starts the processes and waits for their end.

A signal makes them save and stop; a second Ctrl-C kills them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import machine, outcome, processes
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import PATTERNS, LaunchPlan, new_attempt, prepare_run_dir, write_launch_plan
from launcher.outcome import Decision
from simclr_dist.run.layout import NUMBER, RunDir, is_a, newest_step, read_record
from simclr_dist.run.status import read_status
from simclr_dist.safe_text import printable

POLL_S = 0.1
KEPT_ATTEMPTS = 10


def new_job(prefix: str) -> str:
    return f"{prefix}_{int(time.time())}_{os.getpid()}"


def node_command(plan: LaunchPlan, node_rank: int | None = None) -> list[str]:
    rank = [] if node_rank is None else ["--node-rank", str(node_rank)]
    return [plan.python, "-m", "launcher", "node", "--plan", str(plan.path), *rank]


def run(
    plan: LaunchPlan, commands: Callable[[LaunchPlan], list[list[str]]] = lambda plan: [node_command(plan)]
) -> Exit:
    """Trains, and starts again after forgiven failures. Returns the exit code that the last attempt's decision names.

    commands: the command lines that start the nodes of a plan, one each.
    """
    run_dir = Path(plan.run_dir)
    prepare_run_dir(run_dir)
    processes.adopt_orphans()
    with only_launcher(run_dir), Requests(plan.stop_signal) as requests:
        RunDir(run_dir).stop.unlink(missing_ok=True)
        restart = 0
        while True:
            # Each attempt gets another port: see machine.free_port.
            port = plan.port or machine.free_port(plan.head_addr, os.getpid() * 10 + restart)
            attempt = replace(
                plan, port=port, attempt=new_attempt(plan.job, restart), command=continuing(plan.command, restart)
            )
            begin(attempt, hosts=attempt.hosts)
            rc = run_attempt(attempt, requests, commands(attempt))
            decision = conclude(attempt, rc, "none")
            if decision.action != "requeue" or requests.stop:
                break
            print(f"launcher: {decision.why}; starting again", file=sys.stderr, flush=True)
            restart += 1
    report(plan, decision)
    return decision.exit_code


def run_attempt(
    plan: LaunchPlan, requests: Requests, commands: list[list[str]], env: Mapping[str, str] | None = None
) -> int:
    """Starts all nodes and waits for them; when one fails, ends the others. Returns its exit code, or 0."""
    stop_signal = getattr(signal, f"SIG{plan.stop_signal}")
    die = processes.die_with_this_process()

    def prepare() -> None:
        die()
        # An ignored signal stays ignored across exec, until workers install their handler: see node.run_node.
        signal.signal(stop_signal, signal.SIG_IGN)

    # In sessions of their own: Ctrl-C in the terminal reaches the launcher only, which passes on a request to stop.
    agents = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=prepare,
            env=env or importable_launcher(),
        )
        for command in commands
    ]
    asked, failure, deadline = False, 0, float("inf")
    while None in (codes := [agent.poll() for agent in agents]):
        time.sleep(POLL_S)
        failed = [code for code in codes if code]
        if failed and not failure:
            failure, deadline = failed[0], time.monotonic() + plan.save_budget_s + POLL_S
            for agent in agents:
                agent.terminate()
        if time.monotonic() > deadline:
            for agent in agents:
                agent.kill()
        if requests.stop and not asked:
            asked = True
            # The signal goes to the workers only, not to processes they started. Workers that still import torch
            # ignore it; they find the file later.
            if plan.backend in ("local", "rendezvous"):
                processes.send(processes.descendants(agents[0].pid, recursive=False), stop_signal)
            # After the signal, which would kill a worker that has found the file and is on its way out.
            plan.files.stop_request(plan.attempt).touch()
            print("launcher: saving, then stopping; Ctrl-C kills at once", file=sys.stderr, flush=True)
        if requests.kill:
            processes.send(processes.descendants(os.getpid()), signal.SIGKILL)
    left = processes.end_descendants()
    if left:
        print(f"launcher: ended {left} processes that outlived their agent", file=sys.stderr, flush=True)
    return failure or next((code for code in codes if code), 0)


def continuing(command: tuple[str, ...], restart: int) -> tuple[str, ...]:
    """The command of attempt `restart`: later ones go on from the run's newest checkpoint, whatever `resume=` says."""
    chosen = restart and any(word.startswith("resume=") for word in command)
    return (*command, "resume=auto") if chosen else command


def begin(plan: LaunchPlan, **values: object) -> None:
    """Writes the launch plan and the record of the attempt's start; removes stop requests to earlier attempts."""
    run_dir = Path(plan.run_dir)
    prepare_run_dir(run_dir)
    for left in (*RunDir(run_dir).stop_requests(), *run_dir.glob(RunDir(run_dir).started("*").name)):
        left.unlink(missing_ok=True)
    remove_old_logs(run_dir)
    write_launch_plan(plan)
    outcome.record(
        run_dir,
        "start",
        plan.attempt,
        step=newest_step(run_dir),
        backend=plan.backend,
        num_nodes=plan.num_nodes,
        procs_per_node=plan.procs_per_node,
        **values,
    )


def remove_old_logs(run_dir: Path) -> None:
    """Keeps the ranks' logs of the newest attempts: a run that is requeued a hundred times has too many."""
    attempts = [entry["attempt"] for entry in outcome.recorded(run_dir, "start")]
    for attempt in attempts[: -KEPT_ATTEMPTS or None]:
        if re.fullmatch(PATTERNS["attempt"], str(attempt)):
            shutil.rmtree(RunDir(run_dir).logs_of(attempt), ignore_errors=True)


def conclude(plan: LaunchPlan, rc: int, job: outcome.JobState, **more: Any) -> Decision:
    """Decides what follows from the attempt's end, and records it. more: of outcome.Evidence."""
    run_dir = Path(plan.run_dir)
    status = read_status(run_dir)
    if status is not None and status.attempt != plan.attempt:
        status = None  # left by an earlier attempt
    start, end = outcome.start_step(run_dir, plan.attempt), newest_step(run_dir)
    evidence = outcome.Evidence(
        rc=rc,
        status=status,
        start_step=start,
        end_step=end,
        earlier=tuple(outcome.earlier_attempts(run_dir, plan.attempt)),
        stop_file=RunDir(run_dir).stop.exists(),
        job=job,
        **more,
    )
    decision = outcome.decide(evidence, max_failures=plan.max_failures, requeue=plan.requeue)
    outcome.record(
        run_dir,
        "end",
        plan.attempt,
        step=end,
        rc=rc,
        state=status.state if status else None,
        reason=status.reason if status else None,
        job=job,
        failed=decision.failed,
        action=decision.action,
        why=decision.why,
    )
    if decision.failed and not decision.explained and plan.world_size > 1:
        print_last_words(plan)
    return decision


def print_last_words(plan: LaunchPlan) -> None:
    """Prints to stderr what the rank that failed first has printed last: it may be far above, between other ranks'."""
    failures = map(read_record, plan.files.logs_of(plan.attempt).glob("rank_*.failed.json"))
    kinds = {"rank": int, "time": NUMBER, "how": str}
    known = [each for each in failures if each and all(is_a(each.get(key), kind) for key, kind in kinds.items())]
    if not known:
        return
    first = min(known, key=lambda failure: failure["time"])
    path = plan.files.rank_log(plan.attempt, first["rank"])
    lines = last_lines(path)
    print(
        f"launcher: {printable(first['how'])}; {path}{' ends with:' if lines else ' is empty'}",
        file=sys.stderr,
    )
    for line in lines:
        print(f"  | {printable(line)[:200]}", file=sys.stderr, flush=True)


def last_lines(path: Path, most: int = 20) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-most:]


def report(plan: LaunchPlan, decision: Decision) -> None:
    """Prints to stderr how the run ended, why, and the command that continues it."""
    lines = [f"launcher: {plan.run_dir}: {decision.why}"]
    status = read_status(Path(plan.run_dir))
    if decision.failed and not decision.explained and status and status.message:
        lines.append(f"launcher: {status.message.strip().splitlines()[-1]}")
    if decision.action in ("leave", "fail") and decision.exit_code != Exit.OK and not decision.permanent:
        lines.append(f"launcher: continue with: {continue_line(plan)}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def continue_line(plan: LaunchPlan) -> str:
    if plan.backend == "rendezvous":
        return f"on each node the command that it was started with, in {shlex.quote(plan.workdir)}"
    resume = [plan.python, "-m", "launcher", "resume", plan.run_dir]
    return f"{shlex.join(['cd', plan.workdir])} && {shlex.join(resume)}"


def importable_launcher() -> dict[str, str]:
    """This process's environment, with a PYTHONPATH by which `-m launcher` is found from any working directory."""
    here = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + before if before else "")}


@contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Holds the run directory's lock. Raises LaunchError if another launcher does."""
    with RunDir(run_dir).launcher_lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LaunchError(
                f"{run_dir}: already being trained by {file.read().strip() or 'another launcher'}; "
                "stop it first, or give this run another name=…"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def holder(run_dir: Path) -> tuple[int, str] | None:
    """Process id and machine of the launcher that trains `run_dir`; None if there is none."""
    try:
        with RunDir(run_dir).launcher_lock.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                match = re.fullmatch(r"process (\d+) on (\S+)", file.read().strip())
                return (int(match[1]), match[2]) if match else None
    except OSError:
        pass
    return None


class Requests:
    """Listens to signals from __enter__ to __exit__. The first one sets `stop`; a Ctrl-C after it sets `kill`."""

    def __init__(self, *stop_signals: str) -> None:
        self.stop = self.kill = False
        asking = (getattr(signal, f"SIG{name}") for name in stop_signals)
        self._signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *asking)
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.kill |= self.stop and number == signal.SIGINT
        self.stop = True

    def __enter__(self) -> Requests:
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started with nohup: it goes on when the terminal closes
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # After a request to stop this process is about to end: a late second Ctrl-C must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.stop else handler)  # type: ignore[arg-type]
