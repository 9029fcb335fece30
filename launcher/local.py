"""The backend for this machine: start, watch to the end. A signal makes it save and stop; a second Ctrl-C kills."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher import machine, outcome, processes
from launcher.errors import Exit, LaunchError
from launcher.outcome import Decision
from launcher.plan import Plan, new_attempt, prepare_run_dir, write_plan

STOP_FILE, STOP_REQUEST = "STOP", "STOP_REQUEST"
POLL_S = 0.1


def new_job(prefix: str) -> str:
    return f"{prefix}_{int(time.time())}_{os.getpid()}"


def node_command(plan: Plan, node_rank: int | None = None) -> list[str]:
    rank = [] if node_rank is None else ["--node-rank", str(node_rank)]
    return [plan.python, "-m", "launcher", "node", "--plan", str(plan.path), *rank]


def run(plan: Plan, commands: Callable[[Plan], list[list[str]]] = lambda plan: [node_command(plan)]) -> Exit:
    """Train, starting again after forgiven failures. Returns the exit code of the last attempt's decision.

    commands: the command line that starts each node of a plan.
    """
    run_dir = Path(plan.run_dir)
    prepare_run_dir(run_dir)
    processes.adopt_orphans()
    with only_launcher(run_dir), Requests(plan.stop_signal) as requests:
        (run_dir / STOP_FILE).unlink(missing_ok=True)
        restart = 0
        while True:
            # Probed anew for each attempt, and each starts elsewhere: see machine.free_port.
            port = plan.port or machine.free_port(plan.head_addr, os.getpid() * 10 + restart)
            attempt = replace(
                plan, port=port, attempt=new_attempt(plan.job, restart), command=continuing(plan.command, restart)
            )
            rc = run_attempt(attempt, requests, commands(attempt))
            decision = conclude(attempt, rc, "none")
            if decision.action != "requeue" or requests.stop:
                break
            print(f"launcher: {decision.why}; starting again", file=sys.stderr, flush=True)
            restart += 1
    report(plan, decision)
    return decision.exit_code


def run_attempt(plan: Plan, requests: Requests, commands: list[list[str]]) -> int:
    """Start every node and wait for all; when one fails, end the others. The first exit code that is not 0, or 0."""
    run_dir = Path(plan.run_dir)
    begin(plan, hosts=plan.hosts)
    # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes on a request to stop.
    agents = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
            env=importable_launcher(),
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
            ask_to_stop(run_dir, plan)
            # Only the workers: what they have started need not know the signal. Sent while they import torch it is
            # lost, as they inherit that it is ignored; so there is the file as well.
            if plan.backend == "local":
                workers = processes.descendants(agents[0].pid, recursive=False)
                processes.send(workers, getattr(signal, f"SIG{plan.stop_signal}"))
            print("launcher: saving, then stopping; Ctrl-C kills at once", file=sys.stderr, flush=True)
        if requests.kill:
            processes.send(processes.descendants(os.getpid()), signal.SIGKILL)
    left = processes.end_descendants()
    if left:
        print(f"launcher: ended {left} processes that outlived their agent", file=sys.stderr, flush=True)
    return failure or next((code for code in codes if code), 0)


def continuing(command: tuple[str, ...], restart: int) -> tuple[str, ...]:
    """A restart goes on from its own newest checkpoint, even if the first attempt was told to start from another."""
    told = restart and any(word.startswith("resume=") for word in command)
    return (*command, "resume=auto") if told else command


def begin(plan: Plan, **values: object) -> None:
    """Write the plan and the attempt's first record; forget requests that were meant for earlier attempts."""
    run_dir = Path(plan.run_dir)
    prepare_run_dir(run_dir)
    for request in run_dir.glob(f"{STOP_REQUEST}.*"):
        request.unlink(missing_ok=True)
    write_plan(plan)
    outcome.record(
        run_dir,
        "start",
        plan.attempt,
        step=outcome.newest_step(run_dir),
        backend=plan.backend,
        num_nodes=plan.num_nodes,
        procs_per_node=plan.procs_per_node,
        **values,
    )


def conclude(plan: Plan, rc: int, job: outcome.JobWord) -> Decision:
    """Decide what follows from the attempt's end and record it."""
    run_dir = Path(plan.run_dir)
    status = outcome.read_status(run_dir)
    if status is not None and status.attempt != plan.attempt:
        status = None  # left by an earlier attempt
    start, end = outcome.start_step(run_dir, plan.attempt), outcome.newest_step(run_dir)
    evidence = outcome.Evidence(
        rc=rc,
        status=status,
        start_step=start,
        end_step=end,
        earlier=tuple(outcome.earlier_attempts(run_dir, plan.attempt)),
        stop_file=(run_dir / STOP_FILE).exists(),
        job=job,
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
    return decision


def ask_to_stop(run_dir: Path, plan: Plan) -> None:
    (run_dir / f"{STOP_REQUEST}.{plan.attempt}").touch()


def report(plan: Plan, decision: Decision) -> None:
    """The last words on stderr: how it ended, why, and how to go on."""
    lines = [f"launcher: {plan.run_dir}: {decision.why}"]
    status = outcome.read_status(Path(plan.run_dir))
    if decision.failed and status and status.message:
        lines.append(f"launcher: {status.message.strip().splitlines()[-1]}")
    if decision.action in ("leave", "fail") and decision.exit_code != Exit.OK:
        lines.append(f"launcher: continue with: {continue_line(plan)}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def continue_line(plan: Plan) -> str:
    resume = [plan.python, "-m", "launcher", "resume", plan.run_dir]
    return f"{shlex.join(['cd', plan.workdir])} && {shlex.join(resume)}"


def importable_launcher() -> dict[str, str]:
    """The environment, in which `-m launcher` is found although it may start elsewhere than in the checkout."""
    here = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": here + (os.pathsep + before if before else "")}


@contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Two launchers on one run directory would take turns in overwriting each other's plan."""
    with open(run_dir / ".launcher.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise LaunchError(
                f"{run_dir}: already being trained by {file.read().strip() or 'another launcher'}; "
                "stop it first, or give this run another name=…"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def holder(run_dir: Path) -> tuple[int, str] | None:
    """Process and machine of the launcher that trains `run_dir`; None if there is none."""
    try:
        with open(run_dir / ".launcher.lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                match = re.fullmatch(r"process (\d+) on (\S+)", file.read().strip())
                return (int(match[1]), match[2]) if match else None
    except OSError:
        pass
    return None


class Requests:
    """Signals that ask this launcher to stop, while it is entered. Ctrl-C after any of them asks it to kill."""

    def __init__(self, stop_signal: str) -> None:
        self.stop = self.kill = False
        self._signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, getattr(signal, f"SIG{stop_signal}"))
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.kill |= self.stop and number == signal.SIGINT
        self.stop = True

    def __enter__(self) -> Requests:
        for number in self._signals:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup it is to go on when the terminal closes
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # Who has been asked to stop is on the way out: a late second Ctrl-C must not spoil the exit code.
            signal.signal(number, signal.SIG_IGN if self.stop else handler)  # type: ignore[arg-type]
