"""The backend for SLURM, on the login node: checks what can be checked here, then submits slurm/train.sh.

slurm_job.py is the part that runs inside the job.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher import build, outcome, scontrol, step, sweep
from launcher.arguments import SBATCH_OPTIONS, SIGNAL_LEAD_S, as_words
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import LaunchPlan, checked, job_of, looks_secret, one_line, prepare_run_dir
from simclr_dist.run.layout import RunDir

PACKAGED = (Path(__file__).resolve().parent / "starter" / "slurm").resolve()

# The variables of the login shell that a job gets. By default sbatch copies all of them into the job's record, tokens
# included, and `--export=NAME=value` would cut values at commas. So sbatch is started with these variables only.
PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|XDG_CACHE_HOME"
    r"|SLURM_CONF|SBATCH_\w+|SIMCLR_\w+|(NCCL|GLOO|CUDA|OMP|UCX|FI)_\w+|(CONDA|MAMBA|LMOD|MODULE)\w*|LOADEDMODULES"
)
NOT_BY_HAND = {
    "--array": "use --sweep",
    "--export": "use --env NAME=VALUE",
    "--ntasks": "there is one task on each node, which starts its processes itself: use --nproc",
    "--ntasks-per-node": "there is one task on each node, which starts its processes itself: use --nproc",
    "--output": "logs go to the run directory",
    "--signal": "use --stop-signal and --signal-lead-s",
    "--wrap": "the script is slurm/train.sh",
}


def submit_command(args: argparse.Namespace, files: RunDir, num_points: int | None) -> list[str]:
    """The sbatch command line. `show` prints it, `submit` runs it.

    files: of the run, whose directory has the job's name. num_points: runs of a sweep; None for a single run.
    """
    # Never %x: a job name with slashes would lead out of the folder. %% is a plain percent sign of the path.
    pattern = "slurm-%j.out" if num_points is None else "slurm-%A_%a.out"
    output = f"{str(files.logs).replace('%', '%%')}/{pattern}"
    command = ["sbatch", "--parsable", f"--job-name={checked('job name', files.path.name)}", f"--output={output}"]
    command.append("--export=ALL")  # of `passed_on`, whatever SBATCH_EXPORT says
    command += as_words(args, *SBATCH_OPTIONS)
    if not any(word.startswith("--mem") for word in (*command, *args.sbatch_arg)):
        command.append("--mem=0")  # the nodes' whole memory, as the whole nodes are the job's
    command.append(f"--signal=B:{args.stop_signal}@{args.signal_lead_s}")
    command += as_words(args, "no-requeue")
    for option in args.sbatch_arg:
        key = one_line("--sbatch-arg", option).partition("=")[0]
        if not re.fullmatch(r"--[a-z][a-z-]+", key):
            raise LaunchError(f"--sbatch-arg={option}: expected --option or --option=value")
        if key in NOT_BY_HAND:
            raise LaunchError(f"--sbatch-arg={option}: {NOT_BY_HAND[key]}")
        command.append(option)
    script = args.script or script_path("train.sh")
    if num_points is not None:
        command.append(f"--array=0-{num_points - 1}")
    return [*command, one_line("--script", script), *job_arguments(args)]


def script_path(name: str) -> str:
    """The script in ./slurm, which the user may have edited; otherwise the package's."""
    own = Path.cwd() / "slurm" / name
    return str(own if own.is_file() else PACKAGED / name)


def job_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of slurm/train.sh, which passes them to `launcher plan` inside the job."""
    words = as_words(args, *("stop-signal", "max-failures", "save-budget-s", "preflight-s", "nproc", "head-addr"))
    words += as_words(args, *("ifname", "device", "port", "no-requeue", "env"))
    words += as_words(args, "signal-lead-s") if args.signal_lead_s != SIGNAL_LEAD_S else []
    words += [f"--sweep={os.path.abspath(args.sweep)}"] if args.sweep else []
    return [*words, os.path.abspath(args.config), *args.overrides]


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of sbatch, which is also that of the job."""
    env = {name: value for name, value in environ.items() if PASSED_ON.fullmatch(name) and not looks_secret(name)}
    return env | {"SIMCLR_PYTHON": str(Path(sys.executable).absolute())}


def planned_world_size(args: argparse.Namespace) -> int | None:
    """None where the command line does not say it: then it is known when the job starts."""
    if args.nodes is None:
        return None
    procs = args.nproc
    if procs is None and args.gpus_per_node and args.gpus_per_node.rpartition(":")[2].isdigit():
        procs = int(args.gpus_per_node.rpartition(":")[2])
    return args.nodes * procs if procs else None


def shown_plan(args: argparse.Namespace) -> LaunchPlan:
    """The launch plan as far as it is known before the job has nodes."""
    config, command = build.training(args, planned_world_size(args))
    return LaunchPlan(
        backend="slurm",
        attempt=build.SHOWN_ATTEMPT,
        device="cpu" if args.device == "cpu" else "cuda",
        num_nodes=args.nodes or 1,
        procs_per_node=args.nproc or max(1, (planned_world_size(args) or 1) // (args.nodes or 1)),
        head_addr=args.head_addr or "",
        ifname=args.ifname or "",
        **build.common(args, config, command),
    )


def num_checked_points(args: argparse.Namespace) -> int | None:
    """The number of runs of a sweep, after a check of each configuration; None for a single run."""
    if not args.sweep:
        return None
    points = sweep.read_points(Path(args.sweep))
    for index in range(len(points)):
        build.training(sweep.at_point(args, points, index), planned_world_size(args))
    return len(points)


def submit(args: argparse.Namespace) -> Exit:
    """Checks everything that can be checked here, then submits the job."""
    config, _ = build.training(args, planned_world_size(args))
    num_points = num_checked_points(args)
    run_dir = Path(os.path.abspath(config.run_dir))
    if "\\" in str(run_dir):
        raise LaunchError(
            f"{run_dir}: SLURM gives backslashes in log paths a meaning of their own; choose another path"
        )
    refuse_if_live(run_dir)
    asked = [option.partition("=")[2] for option in args.sbatch_arg if option.startswith("--time=")]
    limit = scontrol.parse_time_limit([os.environ.get("SBATCH_TIMELIMIT", ""), args.time or "", *asked][-1])
    if problem := time_limit_problem(limit, args.signal_lead_s, args.save_budget_s):
        raise LaunchError(problem)
    if num_points is None:
        build.check_before_the_queue(args)
    files = RunDir(run_dir)
    command = submit_command(args, files, num_points)
    prepare_run_dir(run_dir)
    files.logs.mkdir(exist_ok=True, mode=0o750)
    files.stop.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, env=passed_on(os.environ), text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise LaunchError("sbatch: no such program; are you on a login node of the cluster?") from None
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}\n  {shlex.join(command)}", Exit.FAILED)
    job = checked("host", done.stdout.strip().partition(";")[0])
    outcome.record(run_dir, "submit", f"{job}.0-000000", job=job, workdir=os.getcwd(), again=args.argv)
    print(f"job {job}: {num_points or 1} run{'s' if (num_points or 1) > 1 else ''} of {config.name}")
    print(f"  log     {files.logs}/slurm-{job}{'' if num_points is None else '_*'}.out")
    print(f"  status  python -m launcher status {shlex.quote(str(run_dir))}")
    print(f"  stop    python -m launcher stop {shlex.quote(str(run_dir))}")
    return Exit.OK


def time_limit_problem(limit_s: float | None, lead_s: float, save_budget_s: float) -> str:
    """Why attempts under this time limit would do little but start and save; empty where they have time."""
    if limit_s is None or limit_s > lead_s + save_budget_s:
        return ""
    return (
        f"the time limit of {limit_s:.0f} s leaves no time to train where SLURM asks to save {lead_s:.0f} s before it "
        f"(--signal-lead-s; by hand sbatch --signal=B:USR1@{lead_s:.0f}) and saving may take {save_budget_s:.0f} s "
        "(--save-budget-s): use a longer --time, or a shorter lead"
    )


def refuse_if_live(run_dir: Path, own: str | None = None) -> None:
    """Raises LaunchError if another job holds this run directory.

    own: the job that asks, from inside. Jobs that still wait do not stop it: the first one to start gets the directory.
    """
    for event in ("start",) if own else ("start", "submit"):
        entries = outcome.recorded(run_dir, event)
        job = job_of(entries[-1]["attempt"]) if entries else ""
        if not re.fullmatch(r"\d+(_\d+)?", job) or job == own:
            continue
        if entries[-1].get("shared_job"):  # that job goes on without this run
            if live := scontrol.live_step(job, step.NAME):
                raise LaunchError(f"{run_dir}: step {live} trains this run; end it with `scancel {live}`")
            continue
        state = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
        if state and state.strip():
            raise LaunchError(
                f"{run_dir}: job {job} still holds this run ({state.split()[0].lower()}); "
                f"cancel it with `scancel {job}`, or give this run another name=…"
            )
