"""The backend for SLURM. `submit` is run on a login node; `plan` and `finish` by slurm/train.sh inside the job.

The script holds no logic: it asks `plan` for the run directory, starts one task on every node, and hands the result to
`finish`. So every decision is Python, and can be tested without a cluster.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher import build, local, machine, outcome, sweep
from launcher.errors import Exit, LaunchError
from launcher.plan import Plan, checked, looks_secret, new_attempt, one_line, prepare_run_dir, read_plan

SCRIPTS = Path(__file__).resolve().parent.parent / "slurm"
QUERY_TIMEOUT_S = 30.0

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


# ---------------------------------------------------------------------------------------------------------------------
# On the login node


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
    script = args.script or str(SCRIPTS / "train.sh")
    if num_points is not None:
        command.append(f"--array=0-{num_points - 1}")
    return [*command, one_line("--script", script), *job_arguments(args)]


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


def submit(args: argparse.Namespace) -> Exit:
    """Check everything that can be checked here, then hand the job to SLURM."""
    config, _ = build.training(args, planned_world_size(args))
    num_points = None
    if args.sweep:
        points = sweep.read_points(Path(args.sweep))
        num_points = len(points)
        for index in range(num_points):
            build.training(sweep.at_point(args, points, index), planned_world_size(args))
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
    outcome.record(run_dir, "submit", f"{job}.0-000000", job=job, command=command, again=args.again)
    log = f"{log_dir}/slurm-{job}.out" if num_points is None else f"{log_dir}/slurm-{job}_*.out"
    print(f"job {job}: {num_points or 1} run{'s' if (num_points or 1) > 1 else ''} of {config.name}")
    print(f"  log     {log}")
    print(f"  status  python -m launcher status {shlex.quote(str(run_dir))}")
    print(f"  stop    python -m launcher stop {shlex.quote(str(run_dir))}")
    return Exit.OK


def refuse_if_live(run_dir: Path, own: str | None = None) -> None:
    """Two jobs on one run directory would overwrite each other."""
    starts = [entry for entry in outcome.read_records(run_dir) if entry["event"] == "start"]
    job = starts[-1]["attempt"].partition(".")[0] if starts else ""
    if not re.fullmatch(r"\d+(_\d+)?", job) or job == own:
        return
    state = query(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    if state and state.strip():
        raise LaunchError(
            f"{run_dir}: job {job} still holds this run ({state.split()[0].lower()}); "
            f"cancel it with `scancel {job}`, or give this run another name=…"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Inside the job


def job_name_of(environ: Mapping[str, str]) -> str:
    """The id to talk to SLURM with. For arrays ARRAY_TASK: the last task's plain id is also that of the whole array,
    and requeueing or cancelling it would hit every task."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise LaunchError("not inside a SLURM job: submit with `sbatch slurm/train.sh CONFIG`, or `salloc` first")
    return job


def plan_attempt(args: argparse.Namespace) -> Plan:
    """The plan of this attempt, made on the first node of the job from what the job has got this time."""
    environ = os.environ
    job = job_name_of(environ)
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)  # not set in the first run
    if args.sweep:
        points = sweep.read_points(Path(args.sweep))
        args = sweep.at_point(args, points, int(environ.get("SLURM_ARRAY_TASK_ID") or 0))
    hosts = job_hosts(environ)
    device, procs = build.device_and_procs(args)
    config, command = build.training(args, len(hosts) * procs)
    head_addr = args.head_addr or head_address(hosts)
    start = int(job.partition("_")[0]) * 10 + int(job.partition("_")[2] or 0) * 10 + restart
    values = build.common(args, config, local.continuing(command, restart))
    values["port"] = args.port or machine.free_port(head_addr, start)
    values["again"] = ("slurm", f"--nodes={len(hosts)}", *partition_of(environ), *args.again[1:])
    return Plan(
        backend="slurm",
        attempt=new_attempt(job, restart),
        device=device,
        num_nodes=len(hosts),
        procs_per_node=procs,
        hosts=tuple(hosts),
        head_addr=head_addr,
        ifname=args.ifname or "",
        **values,
    )


def partition_of(environ: Mapping[str, str]) -> list[str]:
    found = [("partition", environ.get("SLURM_JOB_PARTITION")), ("account", environ.get("SLURM_JOB_ACCOUNT"))]
    return [f"--{key}={value}" for key, value in found if value and value != "(null)"]


def plan_here(args: argparse.Namespace) -> Exit:
    """Write the plan and print the run directory, for slurm/train.sh. Prints nothing if there is nothing to do."""
    plan = plan_attempt(args)
    run_dir = Path(plan.run_dir)
    refuse_if_live(run_dir, own=plan.job)
    if (run_dir / local.STOP_FILE).exists():
        print(f"launcher: {run_dir}: a stop was requested while the job was waiting; not started", file=sys.stderr)
        return Exit.OK
    local.begin(plan, job=plan.job, hosts=plan.hosts, log=log_path(plan.job))
    print(plan.run_dir)
    return Exit.OK


def job_hosts(environ: Mapping[str, str]) -> list[str]:
    nodelist = environ.get("SLURM_JOB_NODELIST", "")
    listing = query(["scontrol", "show", "hostnames", nodelist]) if nodelist else None
    if listing is None:
        if environ.get("SLURM_JOB_NUM_NODES") == "1":
            return [environ.get("SLURMD_NODENAME") or nodelist]  # containers often lack scontrol
        raise LaunchError(
            f"the nodes of this job ({nodelist}) cannot be listed: `scontrol show hostnames` does not answer here. "
            "If this is a container, start slurm/train.sh outside and only the task inside (see slurm/README.md)",
            Exit.PREFLIGHT,
        )
    return [checked("host", name) for name in listing.split()]


def head_address(hosts: list[str]) -> str:
    """An IP address of the first host that the others can use, without trusting the name service alone.

    First SLURM's own NodeAddr, which it uses itself. A loopback address (Debian puts one for the host's own name into
    /etc/hosts) only if all nodes have one: then all of them are this machine.
    """
    if len(hosts) == 1:
        return "127.0.0.1"
    node_addr = {host: node_address(host) for host in hosts}
    if all(machine.is_loopback(address) for address in node_addr.values()):
        return node_addr[hosts[0]]
    tried = []
    for name in dict.fromkeys([node_addr[hosts[0]], hosts[0]]):
        if not name:
            continue
        try:
            address = machine.resolve(name)
        except OSError as error:
            tried.append(f"{name}: {error.strerror}")
            continue
        if not machine.is_loopback(address):
            return address
        tried.append(f"{name}: only known here as {address}")
    if os.environ.get("SLURMD_NODENAME") == hosts[0]:
        mine = [
            address
            for address, interface in machine.own_addresses().items()
            if ":" not in address and not machine.is_loopback(address) and not machine.is_virtual(interface)
        ]
        if len(mine) == 1:
            return mine[0]
        tried.append(f"this node's own addresses: {', '.join(mine) or 'none'}")
    raise LaunchError(
        "no address found by which the other nodes could reach "
        + hosts[0]
        + ":\n"
        + "\n".join(f"  - {line}" for line in tried)
        + "\ngive it with --head-addr (an IP address of the first node)",
        Exit.PREFLIGHT,
    )


def node_address(host: str) -> str:
    match = re.search(r"(?:^|\s)NodeAddr=(\S+)", query(["scontrol", "-o", "show", "node", host]) or "")
    return match[1] if match else ""


def log_path(job: str) -> str:
    match = re.search(r"\sStdOut=(.*?)(?: [A-Z][A-Za-z:]*=|\s*$)", query(["scontrol", "-o", "show", "job", job]) or "")
    return match[1] if match else ""


def finish(run_dir: Path, rc: int) -> Exit:
    """Called by slurm/train.sh when its srun is over: decide, record, requeue if that is right."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a requeue ends this very script
    plan = read_plan(run_dir / "plan.json")
    job = job_name_of(os.environ)
    if plan.job != job:
        raise LaunchError(f"{plan.path} is the plan of job {plan.job}, this is job {job}", Exit.FAILED)
    decision = local.conclude(plan, rc, job_word(job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)))
    if decision.action == "requeue":
        done = run_query(["scontrol", "requeue", job])
        if done is not None and done.returncode == 0:
            print(f"launcher: {run_dir}: {decision.why}; requeued", file=sys.stderr, flush=True)
            return Exit.OK
        refusal = done.stderr.strip() if done else "scontrol does not answer"
        outcome.record(run_dir, "requeue_refused", plan.attempt, why=refusal)
        print(f"launcher: {run_dir}: {decision.why}; SLURM does not requeue it: {refusal}", file=sys.stderr)
        print(f"launcher: continue with: {local.continue_line(plan)}", file=sys.stderr, flush=True)
        return Exit.FAILED if decision.failed else Exit.PREEMPTED
    local.report(plan, decision)
    return decision.exit_code


def job_word(job: str, own_restarts: int) -> outcome.JobWord:
    return read_job(query(["scontrol", "-o", "show", "job", job]) or "", own_restarts)


def read_job(description: str, own_restarts: int) -> outcome.JobWord:
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


def query(argv: list[str]) -> str | None:
    """What a SLURM command says; None if it is missing, fails or hangs."""
    done = run_query(argv)
    return done.stdout if done is not None and done.returncode == 0 else None


def run_query(argv: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(argv, text=True, capture_output=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
