"""Looking after runs that exist: status, logs, stop, cancel, resume. All from the run directory, on any machine."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import local, outcome, scontrol
from launcher.errors import Exit, LaunchError
from launcher.plan import one_line, read_plan, refuse_foreign


def run_dir_of(args: argparse.Namespace) -> Path:
    run_dir = Path(os.path.abspath(args.run_dir))
    if not (run_dir / "attempts.jsonl").exists() and not (run_dir / "status.json").exists():
        raise LaunchError(f"{run_dir}: no run there (neither attempts.jsonl nor status.json)")
    return run_dir


def last_start(run_dir: Path) -> dict[str, Any]:
    starts = [entry for entry in outcome.read_records(run_dir) if entry["event"] == "start"]
    return starts[-1] if starts else {}


def slurm_job(run_dir: Path) -> str | None:
    """The newest SLURM job of this run, also one that still waits."""
    jobs = [
        entry["job"]
        for entry in outcome.read_records(run_dir)
        if entry["event"] in ("submit", "start") and "job" in entry
    ]
    return jobs[-1] if jobs and re.fullmatch(r"\d+(_\d+)?", str(jobs[-1])) else None


def status(args: argparse.Namespace) -> Exit:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    run_dir = run_dir_of(args)
    now, job = outcome.read_status(run_dir), slurm_job(run_dir)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(Text(str(run_dir)), soft_wrap=True)
    if now:
        reason = f" ({now.reason})" if now.reason else ""
        console.print(Text(f"state       {now.state}{reason} at step {now.step}, {now.time}"))
        if now.message:
            console.print(Text(f"message     {now.message.strip().splitlines()[-1]}"), soft_wrap=True)
    console.print(Text(f"checkpoint  step {outcome.newest_step(run_dir)}"))
    if job:
        in_queue = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"])
        console.print(Text(f"SLURM job   {job}: {(in_queue or '').strip() or 'no longer in the queue'}"))
    for name in (local.STOP_FILE, "SAVE"):
        if (run_dir / name).exists():
            console.print(f"requested   {name}")
    table = Table("attempt", "started", "nodes x processes", "steps", "end", "exit code", box=None)
    records = outcome.read_records(run_dir)
    ends = {entry["attempt"]: entry for entry in records if entry["event"] == "end"}
    for start in (entry for entry in records if entry["event"] == "start"):
        end = ends.get(start["attempt"], {})
        cells = [
            start["attempt"],
            time.strftime("%F %T", time.localtime(start["time"])),
            f"{start.get('num_nodes')} x {start.get('procs_per_node')}",
            f"{start.get('step')} to {end.get('step', '…')}",
            str(end.get("why", "no end recorded")),
            str(end.get("rc", "")),
        ]
        table.add_row(*map(Text, cells))
    console.print(table)
    return Exit.OK


def logs(args: argparse.Namespace) -> Exit:
    """Becomes `tail`."""
    run_dir = run_dir_of(args)
    candidates = [Path(last_start(run_dir).get("log") or ""), *_newest_first((run_dir / "logs").glob("*.out"))]
    candidates.append(run_dir / "log.jsonl")
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise LaunchError(f"{run_dir}: no log yet")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(args.lines), *(["-F"] if args.follow else []), "--", str(path)])


def _newest_first(paths: Any) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def stop(args: argparse.Namespace) -> Exit:
    run_dir = run_dir_of(args)
    if is_over(run_dir):
        raise LaunchError(f"{run_dir}: nothing runs there, and no job waits")
    (run_dir / local.STOP_FILE).touch()
    print(f"{run_dir}: it will save and stop within seconds of its next step; `resume` goes on")
    return Exit.OK


def is_over(run_dir: Path) -> bool:
    """Whether a request to stop would be left lying there for the next start."""
    now, job = outcome.read_status(run_dir), slurm_job(run_dir)
    if now is None or now.state == "running" or local.holder(run_dir):
        return False
    in_queue = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]) if job else ""
    # SLURM does not answer for jobs that it has forgotten, nor on machines without its commands.
    return now.state != "preempted" if in_queue is None else not in_queue.strip()


def cancel(args: argparse.Namespace) -> Exit:
    """End it now, without a promise to save."""
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
    """The command that started the run, again, from where it was started."""
    run_dir = run_dir_of(args)
    words, workdir = started_with(run_dir)
    if any(word.startswith("resume=") for word in words):
        words.append("resume=auto")
    if not args.dry_run:
        (run_dir / local.STOP_FILE).unlink(missing_ok=True)
    os.chdir(workdir)
    return main([*words, *(["--dry-run"] if args.dry_run else [])])


def started_with(run_dir: Path) -> tuple[list[str], str]:
    """Arguments of the launcher, and the directory in which they were given."""
    submitted = [entry for entry in outcome.read_records(run_dir) if entry["event"] == "submit"]
    plan = read_plan(run_dir / "plan.json") if (run_dir / "plan.json").exists() or not submitted else None
    # What the job was asked to be, and not only what it got; or it never started.
    if submitted and (plan is None or submitted[-1]["job"] == plan.job.partition("_")[0]):
        records = run_dir / "attempts.jsonl"
        refuse_foreign(records, records.stat())
        return [one_line("argument", word) for word in submitted[-1]["again"]], submitted[-1]["workdir"]
    assert plan is not None
    return list(plan.again), plan.workdir
