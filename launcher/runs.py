"""The commands for an existing run: status, logs, stop, cancel, resume. They need its run directory only."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from launcher import local, outcome, scontrol, snapshot
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import checked, one_line, read_launch_plan, refuse_foreign
from simclr_dist.run.layout import RunDir, newest_step
from simclr_dist.run.owner import has_living_owner
from simclr_dist.run.status import read_status
from simclr_dist.safe_text import printable
from simclr_dist.streams import print_table


def run_dir_of(args: argparse.Namespace) -> Path:
    files = RunDir(Path(os.path.abspath(args.run_dir)))
    if not files.attempts.exists() and not files.status.exists():
        inside = next((path for path in files.path.glob("*") if RunDir(path).status.exists()), None)
        hint = f"; for the runs in it: simclr-dist runs list {shlex.quote(args.run_dir)}" if inside else ""
        raise LaunchError(f"{files.path}: no run there (neither {files.attempts.name} nor {files.status.name}){hint}")
    return files.path


def slurm_job(run_dir: Path) -> str | None:
    """The newest SLURM job of this run, also one that waits; None if there is none, or it is not for this run alone."""
    jobs = [entry for entry in outcome.recorded(run_dir, "submit", "start") if "job" in entry]
    if not jobs or jobs[-1].get("shared_job") or not re.fullmatch(r"\d+(_\d+)?", str(jobs[-1]["job"])):
        return None
    return str(jobs[-1]["job"])


def code_of(run_dir: Path) -> str | None:
    """The kept code that the newest attempt runs with, or the newest job will."""
    entries = outcome.recorded(run_dir, "submit", "start")
    return str(entries[-1]["code"]) if entries and entries[-1].get("code") else None


def status(args: argparse.Namespace) -> Exit:
    run_dir = run_dir_of(args)
    now, job = read_status(run_dir), slurm_job(run_dir)
    print(printable(str(run_dir)))
    if now:
        reason = f" ({now.reason})" if now.reason else ""
        if now.state == "running" and not local.holder(run_dir) and not has_living_owner(run_dir):
            reason = " when its process ended"
        print(printable(f"state       {now.state}{reason} at step {now.step}, {now.time}"))
        if said := now.message.strip().splitlines():
            print(printable(f"message     {said[-1]}"))
    print(f"checkpoint  step {newest_step(run_dir)}")
    if job:
        in_queue = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"])
        print(printable(f"SLURM job   {job}: {(in_queue or '').strip() or 'no longer in the queue'}"))
    if code := code_of(run_dir):
        print(f"code        {snapshot.describe(code)}")
    for request in (RunDir(run_dir).stop, RunDir(run_dir).save):
        if request.exists():
            print(f"requested   {request.name}")
    ends = {entry["attempt"]: entry for entry in outcome.recorded(run_dir, "end")}
    rows = [_attempt(start, ends.get(start["attempt"], {})) for start in outcome.recorded(run_dir, "start")]
    print_table("", ("attempt", "started", "nodes x processes", "steps", "end", "exit code"), rows, texts=5)
    if remark := outcome.read_attempts(run_dir).remark:
        print(printable(remark))
    return Exit.OK


def _attempt(start: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """A row of `status`."""
    began = "-"
    with suppress(ValueError, OverflowError, OSError):  # a time of no calendar
        began = time.strftime("%F %T", time.localtime(start["time"])) if "time" in start else began
    return [
        start["attempt"],
        began,
        f"{start.get('num_nodes')} x {start.get('procs_per_node')}",
        f"{start.get('step')} to {end.get('step', '…')}",
        str(end.get("why", "no end recorded")),
        str(end.get("rc", "")),
    ]


def logs(args: argparse.Namespace) -> Exit:
    """Becomes `tail` of the newest log: the SLURM job's, else one in logs/, else log.jsonl; or that of one rank."""
    run_dir = run_dir_of(args)
    files, starts = RunDir(run_dir), outcome.recorded(run_dir, "start")
    if args.rank is not None:
        attempt = starts[-1]["attempt"] if starts else ""
        own = files.rank_log(checked("attempt", attempt), args.rank)
        if not own.is_file():
            raise LaunchError(
                f"{own}: not there; the newest attempt has {len(list(own.parent.glob('*.log')))} such files"
            )
        become_tail(args, own)
    job_logs = [Path(entry.get("log") or "") for entry in starts[-1:]]
    written = sorted(files.logs.glob("*.out"), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = [*job_logs, *written, files.log]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise LaunchError(f"{run_dir}: no log yet")
    become_tail(args, found)


def become_tail(args: argparse.Namespace, path: Path) -> NoReturn:
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(args.lines), *(["-F"] if args.follow else []), "--", str(path)])


def stop(args: argparse.Namespace) -> Exit:
    run_dir = run_dir_of(args)
    if is_over(run_dir):
        raise LaunchError(f"{run_dir}: nothing runs there, and no job waits")
    RunDir(run_dir).stop.touch()
    print(f"{run_dir}: it will save and stop within seconds of its next step; `resume` goes on")
    return Exit.OK


def is_over(run_dir: Path) -> bool:
    """Whether nothing runs and no job waits: a request to stop would only stop the next start."""
    now, job = read_status(run_dir), slurm_job(run_dir)
    if now is None or local.holder(run_dir) or (now.state == "running" and has_living_owner(run_dir)):
        return False
    in_queue = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]) if job else ""
    # in_queue is None for jobs that SLURM has forgotten, and on machines without its commands.
    return now.state != "preempted" if in_queue is None else not in_queue.strip()


def cancel(args: argparse.Namespace) -> Exit:
    """Ends the run now; it may not save."""
    run_dir = run_dir_of(args)
    job = slurm_job(run_dir)
    if job:
        done = scontrol.run_query(["scancel", job])
        if done is None or done.returncode:
            raise LaunchError(f"scancel {job}: {done.stderr.strip() if done else 'no such program'}", Exit.FAILED)
        print(f"{run_dir}: job {job} cancelled")
        return Exit.OK
    holder = local.holder(run_dir)
    if holder is None:
        raise LaunchError(f"{run_dir}: nothing runs there")
    pid, node = holder
    if node != os.uname().nodename:
        raise LaunchError(f"{run_dir}: process {pid} on {node} runs it; cancel it there")
    for _ in range(2):  # the first asks, the second kills
        if local.holder(run_dir) == holder:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        time.sleep(1)
    print(f"{run_dir}: process {pid} cancelled")
    return Exit.OK


def resume(args: argparse.Namespace, main: Callable[[Sequence[str]], int]) -> int:
    """Repeats the command that started the run, in the directory where it was given, with the code that was kept."""
    run_dir = run_dir_of(args)
    words, workdir = started_with(run_dir)
    code = next((word.partition("=")[2] for word in words if word.startswith("--code=")), "")
    if code and args.new_code:
        words, code = snapshot.without(code, words), ""
    if any(word.startswith("resume=") for word in words):
        words.append("resume=auto")
    words += ["--dry-run"] if args.dry_run else []
    if not args.dry_run:
        RunDir(run_dir).stop.unlink(missing_ok=True)
    os.chdir(workdir)
    if code:
        print(f"launcher: goes on with {snapshot.describe(code)}; --new-code takes that of now", file=sys.stderr)
        snapshot.enter(code, words)
    return main(words)


def started_with(run_dir: Path) -> tuple[list[str], str]:
    """Arguments of the launcher, and the directory in which they were given."""
    files, submitted = RunDir(run_dir), outcome.recorded(run_dir, "submit")
    plan = read_launch_plan(files.launch_plan) if files.launch_plan.exists() or not submitted else None
    # For a job that `launcher slurm` submitted, the command line that submitted it: it also holds sbatch's options, and
    # a job that never started has no launch plan.
    if submitted and (plan is None or submitted[-1].get("job") == plan.job.partition("_")[0]):
        refuse_foreign(files.attempts, files.attempts.stat())
        again, workdir = submitted[-1].get("again"), submitted[-1].get("workdir")
        if not again or not all(isinstance(word, str) for word in again) or not workdir:
            raise LaunchError(f"{files.attempts}: does not say how the run was submitted; submit it again")
        return [one_line("argument", word) for word in again], one_line("directory", workdir)
    assert plan is not None
    if plan.backend == "rendezvous":
        raise LaunchError(f"{run_dir}: continue it with {local.continue_line(plan)}")
    return list(plan.resume_argv), plan.workdir
