"""The backend for SLURM, on the login node: checks what can be checked here, then submits slurm/train.sh.

slurm_job.py is the part that runs inside the job.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import build, outcome, scontrol, snapshot, step, sweep
from launcher.arguments import NOT_BY_HAND, SBATCH_OPTIONS, SIGNAL_LEAD_S, as_words
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import LaunchPlan, checked, is_reserved, job_of, one_line, prepare_run_dir
from launcher.snapshot import Snapshot
from simclr_dist.config import Config, compose_config
from simclr_dist.run.layout import RunDir
from simclr_dist.safe_text import looks_secret, masked

PACKAGED = (Path(__file__).resolve().parent / "starter" / "slurm").resolve()

# The variables of the login shell that a job gets. By default sbatch copies all of them into the job's record, tokens
# included, and `--export=NAME=value` would cut values at commas. So sbatch is started with these variables only.
PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|XDG_CACHE_HOME"
    r"|SLURM_CONF|SBATCH_\w+|SIMCLR_\w+|(NCCL|GLOO|CUDA|OMP|UCX|FI)_\w+|(CONDA|MAMBA|LMOD|MODULE)\w*|LOADEDMODULES"
    r"|(APPTAINER|SINGULARITY|ENROOT)\w*"
)
# Those among them that are about this machine, or about the job that this shell is a part of.
OF_THIS_PLACE = {
    r"CUDA_VISIBLE_DEVICES|CUDA_MPS_\w+": "the job has its own GPUs",
    r"SBATCH_(CPU|MEM)_BIND\w*": "SLURM sets it in jobs",
    r"SBATCH_EXPORT|SBATCH_GET_USER_ENV": "use --env NAME=VALUE",
    r"SBATCH_ARRAY_INX": "use --sweep",
}
SCRATCH = ("TMPDIR", "XDG_CACHE_HOME")
"""Inside a job these may lie on a disk of its node, which is emptied when the job ends."""


@dataclass(frozen=True)
class Submission:
    """All that `submit` will do, worked out; nothing is written yet."""

    args: argparse.Namespace
    """With the files that are kept, instead of those of the command line."""
    config: Config
    files: RunDir
    command: list[str]
    num_points: int | None
    """Runs of a sweep; None for a single run."""
    kept: Snapshot | None


def prepare(args: argparse.Namespace) -> Submission:
    """Checks the command line and the configuration. Raises LaunchError and ConfigError."""
    if args.code:  # a run that is resumed
        args = snapshot.use(args, Path(args.code))
    refuse_half_nodes(args)
    refuse_missing_pyxis(args)
    config = checked_config(args)
    num_points = num_checked_points(args)
    files = RunDir(Path(os.path.abspath(config.run_dir)))
    script = Path(one_line("--script", args.script or script_path("train.sh")))
    kept = None
    if args.code:
        script = Path(args.code) / "slurm" / script.name
    else:
        changed = script_for(args, script)
        named = {"slurm": (script, changed)}
        if not args.no_snapshot:
            named["config"] = (Path(args.config), composed(args.config))
            named |= {"sweep": (Path(args.sweep), None)} if args.sweep else {}
        if changed is not None or not args.no_snapshot:
            kept = snapshot.take(files, Path.cwd(), named, program=not args.no_snapshot)
            script = kept.path / "slurm" / script.name
        if kept and not args.no_snapshot:
            args = snapshot.use(args, kept.path)
    return Submission(args, config, files, submit_command(args, files, script, num_points), num_points, kept)


def composed(config: str) -> bytes | None:
    """A configuration and the files that it begins from as one; None if it begins from none."""
    text = compose_config(Path(config))
    return None if text is None else text.encode()


def refuse_half_nodes(args: argparse.Namespace) -> None:
    wanted = [name for name in ("cpus-per-task", "mem") if not getattr(args, name.replace("-", "_"))]
    wanted += ["gpus-per-node"] if args.device != "cpu" and gpus_on_each_node(args) is None else []
    if args.shared and wanted:
        raise LaunchError(
            f"--shared: say what the job gets of each node: {' '.join(f'--{name}=…' for name in wanted)}"
            + (" (or --device=cpu)" if "gpus-per-node" in wanted else "")
        )


def refuse_missing_pyxis(args: argparse.Namespace) -> None:
    options = scontrol.query(["srun", "--help"]) if (args.container or "").startswith("pyxis:") else None
    if options is not None and "--container-image" not in options:
        raise LaunchError(
            f"--container {args.container}: srun has no --container-image here, so Pyxis is not installed; "
            "for Apptainer: --container FILE.sif"
        )


def script_for(args: argparse.Namespace, script: Path) -> bytes | None:
    """The batch script without `--exclusive`, which no option takes back; None where it can stay as it is."""
    try:
        text = script.read_bytes()
    except OSError as error:
        raise LaunchError(f"{script}: the batch script cannot be read: {error.strerror}") from None
    shorter = re.sub(rb"^#SBATCH[ \t]+--exclusive\b.*\n", b"", text, flags=re.M) if args.shared else text
    return shorter if shorter != text else None


def submit_command(args: argparse.Namespace, files: RunDir, script: Path, num_points: int | None) -> list[str]:
    """The sbatch command line. files: of the run, whose directory has the job's name."""
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
    submitted: list[str] = []
    if num_points is not None:
        command.append(f"--array=0-{num_points - 1}")
        submitted = [f"--submitted={word}" for word in submission_words(args)]
    return [*command, str(script), *submitted, *job_arguments(args)]


def submission_words(args: argparse.Namespace) -> list[str]:
    """The options of `launcher slurm` that the job does not need; a task of an array remembers them to be resumed."""
    return as_words(args, *SBATCH_OPTIONS, "sbatch-arg", "script", "no-snapshot")


def script_path(name: str) -> str:
    """The script in ./slurm, which the user may have edited; otherwise the package's."""
    own = Path.cwd() / "slurm" / name
    return str(own if own.is_file() else PACKAGED / name)


def job_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of slurm/train.sh, which passes them to `launcher plan` inside the job."""
    words = as_words(args, *("stop-signal", "max-failures", "save-budget-s", "preflight-s", "nproc", "head-addr"))
    words += as_words(args, *("ifname", "device", "port", "no-requeue", "env"))
    words += as_words(args, "signal-lead-s") if args.signal_lead_s != SIGNAL_LEAD_S else []
    words += [*as_words(args, "shared", "code"), *surroundings(args)]
    words += [f"--sweep={os.path.abspath(args.sweep)}"] if args.sweep else []
    return [*words, os.path.abspath(args.config), *args.overrides]


def surroundings(args: argparse.Namespace) -> list[str]:
    """Set-up lines and container, as options. The lines are one word without line ends."""
    kept = [f"--kept-setup={json.dumps(args.setup)}"] if args.setup else []
    return [*as_words(args, "container", "bind", "node-python"), *kept]


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of sbatch, which is also that of the job."""
    left_out = SCRATCH if "SLURM_JOB_ID" in environ else ()
    env = {
        name: value
        for name, value in environ.items()
        if PASSED_ON.fullmatch(name) and not (looks_secret(name, value) or is_reserved(name) or name in left_out)
    }
    env = {name: value for name, value in env.items() if not why_not_passed_on(name)}
    return env | {"SIMCLR_PYTHON": str(Path(sys.executable).absolute())}


def why_not_passed_on(name: str) -> str | None:
    return next((why for pattern, why in OF_THIS_PLACE.items() if re.fullmatch(pattern, name)), None)


def gpus_on_each_node(args: argparse.Namespace) -> int | None:
    """None where the command line does not say it."""
    given = [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    for option in (*given, *args.sbatch_arg):
        name, _, value = option.partition("=")
        if name == "--gres":
            value = next((part for part in value.split(",") if part.partition(":")[0] == "gpu"), "")
            value = "1" if value == "gpu" else value
        elif name not in ("--gpus-per-node", "--gpus-per-task", "--gpus"):
            continue
        counts = [part.rpartition(":")[2] for part in value.split(",")]
        if not all(count.isdigit() for count in counts):
            continue
        total = sum(map(int, counts))
        if name != "--gpus":
            return total
        nodes = node_range(args)
        if nodes and len(nodes) == 1 and total % nodes[0] == 0:
            return total // nodes[0]
    return None


def node_range(args: argparse.Namespace) -> range:
    """The numbers of nodes that the job may get; empty where the command line does not say it."""
    if args.nodes is None:
        return range(0)
    low, _, high = args.nodes.partition("-")
    return range(int(low), int(high or low) + 1)


def planned_procs(args: argparse.Namespace) -> int | None:
    """Processes on each node, where the command line says it."""
    return args.nproc or (1 if args.device == "cpu" else gpus_on_each_node(args))


def checked_config(args: argparse.Namespace) -> Config:
    """The configuration, which every number of processes that the job may get can train."""
    procs = planned_procs(args)
    sizes = [num_nodes * procs for num_nodes in node_range(args)] if procs else []
    for world_size in sizes[:-1]:
        build.training(args, world_size)
    return build.training(args, sizes[-1] if sizes else None)[0]


def shown_plan(submission: Submission) -> LaunchPlan:
    """The launch plan as far as it is known before the job has nodes."""
    args = submission.args
    return LaunchPlan(
        backend="slurm",
        attempt=build.SHOWN_ATTEMPT,
        device="cpu" if args.device == "cpu" else "cuda",
        num_nodes=max(node_range(args), default=1),
        procs_per_node=planned_procs(args) or 1,
        head_addr=args.head_addr or "",
        ifname=args.ifname or "",
        **build.common(args, submission.config, build.command(args)),
    )


def num_checked_points(args: argparse.Namespace) -> int | None:
    """The number of runs of a sweep, after a check of each configuration; None for a single run."""
    if not args.sweep:
        return None
    points = sweep.read_points(Path(args.sweep))
    for index in range(len(points)):
        checked_config(sweep.at_point(args, points, index))
    return len(points)


def submit(args: argparse.Namespace) -> Exit:
    """Checks everything that can be checked here, then submits the job."""
    submission = prepare(args)
    files, num_points, kept = submission.files, submission.num_points, submission.kept
    run_dir = files.path
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
    prepare_run_dir(run_dir)
    files.logs.mkdir(exist_ok=True, mode=0o750)
    files.stop.unlink(missing_ok=True)
    if kept:
        kept.write(config=os.path.abspath(args.config), sweep=args.sweep and os.path.abspath(args.sweep))
    say_what_is_left_out(os.environ)
    try:
        done = subprocess.run(
            submission.command, env=passed_on(os.environ), text=True, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise LaunchError("sbatch: no such program; are you on a login node of the cluster?") from None
    if done.returncode:
        line = shlex.join(submission.command)
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}\n  {line}", Exit.FAILED)
    job = checked("host", done.stdout.strip().partition(";")[0])
    again = ["slurm", *submission_words(args), *job_arguments(submission.args)]
    code = submission.args.code
    outcome.record(
        run_dir, "submit", f"{job}.0-000000", job=job, workdir=os.getcwd(), again=again, code=code, points=num_points
    )
    snapshot.remove_unused(files, used_code(files))
    print(f"job {job}: {num_points or 1} run{'s' if (num_points or 1) > 1 else ''} of {submission.config.name}")
    print(f"  log     {files.logs}/slurm-{job}{'' if num_points is None else '_*'}.out")
    print(f"  code    {snapshot.describe(code) if code else f'{os.getcwd()}, as it is when the job starts'}")
    print(f"  status  python -m launcher status {shlex.quote(str(run_dir))}")
    print(f"  stop    python -m launcher stop {shlex.quote(str(run_dir))}")
    return Exit.OK


def say_what_is_left_out(environ: Mapping[str, str]) -> None:
    for name in sorted(environ):
        if why := why_not_passed_on(name):
            print(f"launcher: {name}={masked(environ)[name]} is not passed on to the job: {why}", file=sys.stderr)


def used_code(files: RunDir) -> set[str]:
    """What some attempt ran with, what the newest job was submitted with, and what the tasks of arrays may run with."""
    submitted, started = outcome.recorded(files.path, "submit"), outcome.recorded(files.path, "start")
    entries = [*started, *submitted[-1:], *(entry for entry in submitted if entry.get("points"))]
    return {str(entry["code"]) for entry in entries if entry.get("code")}


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
