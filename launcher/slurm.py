"""The backend for SLURM, on the login node: check all that can be checked here, then hand slurm/train.sh to sbatch.

What happens inside the job is in slurm_job.py.
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

from launcher import build, local, outcome, scontrol, sweep
from launcher.errors import Exit, LaunchError
from launcher.plan import Plan, checked, looks_secret, one_line, prepare_run_dir

PACKAGED = (Path(__file__).resolve().parent / "starter" / "slurm").resolve()

# What a job gets of the login shell. By default sbatch copies all of it into the job's record, tokens included; and
# `--export=NAME=value` would cut values at commas. So sbatch itself is started with no more than this.
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


def submit_command(args: argparse.Namespace, name: str, log_dir: str, num_points: int | None) -> list[str]:
    """The sbatch command line. A pure function of its arguments: `show` prints what `submit` runs."""
    checked("job name", name)
    options = {
        "nodes": args.nodes,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_task,
        "mem": args.mem,
        "constraint": args.constraint,
        "exclude": args.exclude,
    }
    # Never %x: a job name with slashes would lead out of the folder. %% is a plain percent sign of the path.
    pattern = "slurm-%j.out" if num_points is None else "slurm-%A_%a.out"
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={log_dir.replace('%', '%%')}/{pattern}"]
    command += [f"--{key}={one_line(f'--{key}', str(value))}" for key, value in options.items() if value is not None]
    command.append(f"--signal=B:{args.stop_signal}@{args.signal_lead_s}")
    if args.no_requeue:
        command.append("--no-requeue")
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
    """A script of the folder that we stand in, whose EDIT lines somebody may have filled in; else the package's."""
    own = Path.cwd() / "slurm" / name
    return str(own if own.is_file() else PACKAGED / name)


def job_arguments(args: argparse.Namespace) -> list[str]:
    """What slurm/train.sh passes to `launcher plan`: SLURM carries it as a list of words."""
    words = [f"--stop-signal={args.stop_signal}", f"--max-failures={args.max_failures}"]
    words += [f"--save-budget-s={args.save_budget_s:g}", f"--preflight-s={args.preflight_s:g}"]
    for name, value in (("nproc", args.nproc), ("head-addr", args.head_addr), ("ifname", args.ifname)):
        words += [f"--{name}={value}"] if value else []
    words += [f"--device={args.device}"] if args.device != "auto" else []
    words += [f"--port={args.port}"] if args.port else []
    words += ["--no-requeue"] if args.no_requeue else []
    words += [f"--env={setting}" for setting in args.env]
    words += [f"--sweep={os.path.abspath(args.sweep)}"] if args.sweep else []
    return [*words, os.path.abspath(args.config), *args.overrides]


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of sbatch, and so of the job."""
    env = {name: value for name, value in environ.items() if PASSED_ON.fullmatch(name) and not looks_secret(name)}
    return env | {"SIMCLR_PYTHON": str(Path(sys.executable).absolute())}


def planned_world_size(args: argparse.Namespace) -> int | None:
    """Known before the job starts only if the command line says it."""
    if args.nodes is None:
        return None
    procs = args.nproc
    if procs is None and args.gpus_per_node and args.gpus_per_node.rpartition(":")[2].isdigit():
        procs = int(args.gpus_per_node.rpartition(":")[2])
    return args.nodes * procs if procs else None


def shown_plan(args: argparse.Namespace) -> Plan:
    """The plan as far as it is known before the job has nodes."""
    config, command = build.training(args, planned_world_size(args))
    return Plan(
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
    """Of a sweep, with the configuration of each checked; None for a single run."""
    if not args.sweep:
        return None
    points = sweep.read_points(Path(args.sweep))
    for index in range(len(points)):
        build.training(sweep.at_point(args, points, index), planned_world_size(args))
    return len(points)


def submit(args: argparse.Namespace) -> Exit:
    """Check everything that can be checked here, then hand the job to SLURM."""
    config, _ = build.training(args, planned_world_size(args))
    num_points = num_checked_points(args)
    run_dir = Path(os.path.abspath(config.run_dir))
    if "\\" in str(run_dir):
        raise LaunchError(
            f"{run_dir}: SLURM gives backslashes in log paths a meaning of their own; choose another path"
        )
    refuse_if_live(run_dir)
    log_dir = run_dir / "logs"
    command = submit_command(args, config.name, str(log_dir), num_points)
    prepare_run_dir(run_dir)
    log_dir.mkdir(exist_ok=True, mode=0o750)
    (run_dir / local.STOP_FILE).unlink(missing_ok=True)
    try:
        done = subprocess.run(command, env=passed_on(os.environ), text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise LaunchError("sbatch: no such program; are you on a login node of the cluster?") from None
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}\n  {shlex.join(command)}", Exit.FAILED)
    job = checked("host", done.stdout.strip().partition(";")[0])
    outcome.record(run_dir, "submit", f"{job}.0-000000", job=job, workdir=os.getcwd(), again=args.again)
    log = f"{log_dir}/slurm-{job}.out" if num_points is None else f"{log_dir}/slurm-{job}_*.out"
    print(f"job {job}: {num_points or 1} run{'s' if (num_points or 1) > 1 else ''} of {config.name}")
    print(f"  log     {log}")
    print(f"  status  python -m launcher status {shlex.quote(str(run_dir))}")
    print(f"  stop    python -m launcher stop {shlex.quote(str(run_dir))}")
    return Exit.OK


def refuse_if_live(run_dir: Path, own: str | None = None) -> None:
    """Two jobs on one run directory would overwrite each other."""
    # One may run while another waits; of those that wait, the first to start wins.
    for event in ("start",) if own else ("start", "submit"):
        entries = [entry for entry in outcome.read_records(run_dir) if entry["event"] == event]
        job = entries[-1]["attempt"].partition(".")[0] if entries else ""
        if not re.fullmatch(r"\d+(_\d+)?", job) or job == own:
            continue
        state = scontrol.query(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
        if state and state.strip():
            raise LaunchError(
                f"{run_dir}: job {job} still holds this run ({state.split()[0].lower()}); "
                f"cancel it with `scancel {job}`, or give this run another name=…"
            )
