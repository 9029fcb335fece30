"""Is this machine, or are these nodes, fit for a training? `--deep` also starts processes that connect and gather."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher import allocation, build, gpus, local, machine, node, processes, scontrol, slurm, slurm_job, step
from launcher.allocation import Job
from launcher.arguments import as_words
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import (
    STOP_SIGNALS,
    LaunchPlan,
    checked_env,
    is_reserved,
    new_attempt,
    prepare_run_dir,
    read_launch_plan,
    write_launch_plan,
)
from simclr_dist.run.layout import RunDir, read_record
from simclr_dist.run.status import read_status

MODULE = "launcher.deep_check"


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "problem"]
    what: str
    found: str
    advice: str = ""


def run(args: argparse.Namespace) -> Exit:
    findings = list(look(args))
    if args.json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        marks = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print(f"{marks[finding.level]}  {finding.what:{width}}  {finding.found}")
            if finding.advice:
                print(f"{'':9}{'':{width}}  {finding.advice}")
    if any(finding.level == "problem" for finding in findings):
        return Exit.PREFLIGHT
    if not args.deep:
        return Exit.OK
    if args.backend == "slurm":
        return deep_slurm(args)
    plan = deep_plan(args)
    processes.adopt_orphans()
    plan = replace(plan, port=plan.port or machine.free_port(plan.head_addr, os.getpid() * 10))
    with local.Requests(plan.stop_signal) as requests:
        local.begin(plan, hosts=plan.hosts)
        local.run_attempt(plan, requests, [local.node_command(plan)])
    return report(Path(plan.run_dir))


# ---------------------------------------------------------------------------------------------------------------------
# Without starting anything


def look(args: argparse.Namespace) -> Iterator[Finding]:
    for name, version in node.versions().items():
        level: Literal["ok", "problem"] = "problem" if version == "missing" else "ok"
        yield Finding(level, name, version, "" if level == "ok" else f"{sys.executable} -m pip install {name}")
    found = gpus.here()
    yield Finding("problem" if found.problem else "ok", "GPUs", f"{found.usable} usable: {found.how}", found.problem)
    yield Finding("ok", "CPUs", f"{machine.num_cpus()} usable by this process")
    for address, interface in machine.own_addresses().items():
        public = machine.is_public(address)
        yield Finding(
            "warning" if public else "ok",
            "address",
            f"{address} on {interface}",
            "public: torch's rendezvous has no password; keep its port (20000-29999) behind a firewall"
            if public
            else "",
        )
    yield from look_at_folder(Path(args.runs_dir))
    yield from look_at_limits()
    reserved = sorted(name for name in os.environ if is_reserved(name))
    if reserved:
        yield Finding("warning", "environment", ", ".join(reserved), "left by another launcher; not passed to workers")
    if args.backend == "slurm":
        yield from look_at_slurm()


def look_at_folder(folder: Path) -> Iterator[Finding]:
    """Checkpoints need a folder in which files can be synced and renamed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-", delete=False) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        renamed = Path(file.name).with_suffix(".renamed")
        Path(file.name).rename(renamed)
        renamed.unlink()
        free_gib = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        yield Finding("problem", "run folder", f"{folder}: {error.strerror}", "choose another with --runs-dir")
        return
    yield Finding(
        "ok" if free_gib > 5 else "warning",
        "run folder",
        f"{folder}: write, sync and rename work; {free_gib:.1f} GiB free",
        "" if free_gib > 5 else "a ResNet-50 keeps three checkpoints of 0.2 GiB",
    )


def look_at_limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != resource.RLIM_INFINITY and files < 1024
    yield Finding("warning" if few else "ok", "open files", str(files), "ulimit -n 4096" if few else "")
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        gib = shutil.disk_usage(shared_memory).total / 2**30
        advice = "NCCL may fail with less: docker run --shm-size=8g" if gib < 0.5 else ""
        yield Finding("warning" if gib < 0.5 else "ok", "/dev/shm", f"{gib:.1f} GiB", advice)


def look_at_slurm() -> Iterator[Finding]:
    config = scontrol.query(["scontrol", "show", "config"])
    if config is None:
        yield Finding("problem", "SLURM", "scontrol does not answer", "run this on a login node; is SLURM_CONF right?")
        return
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in config.splitlines())}
    yield Finding("ok", "SLURM", values.get("SLURM_VERSION", "?"))
    requeues = values.get("JobRequeue", "0").startswith("1")
    yield Finding(
        "ok" if requeues else "warning",
        "JobRequeue",
        values.get("JobRequeue", "?"),
        "" if requeues else "jobs are not requeued unless they ask to; slurm/train.sh does (--requeue)",
    )
    kill_wait = values.get("KillWait", "? sec").split()[0]
    yield Finding("ok", "KillWait", f"{kill_wait} s between a request to end and the kill")
    yield Finding("ok", "PreemptMode", values.get("PreemptMode", "?"))


# ---------------------------------------------------------------------------------------------------------------------
# --deep: all ranks connect


def deep_plan(args: argparse.Namespace, job: Job | None = None) -> LaunchPlan:
    """A launch plan whose processes run deep_check instead of a training, on this machine or in this SLURM job."""
    device, procs = slurm_job.device_and_procs(args, job) if job else build.device_and_procs(args)
    hosts = job.hosts if job else (socket.gethostname().partition(".")[0],)
    attempt = new_attempt(job.name if job else local.new_job("local"), 0)
    run_dir = Path(os.path.abspath(args.runs_dir)) / ".check" / attempt
    head_addr = args.head_addr or (slurm_job.head_address(hosts) if job else "127.0.0.1")
    plan = LaunchPlan(
        backend="slurm" if job else "local",
        attempt=attempt,
        run_dir=str(run_dir),
        workdir=os.getcwd(),
        python=slurm_job.node_python() if job else str(Path(sys.executable).absolute()),
        command=("-m", MODULE, str(run_dir)),
        resume_argv=("check",),
        device=device,
        num_nodes=len(hosts),
        procs_per_node=procs,
        hosts=hosts,
        head_addr=head_addr,
        port=args.port or 0,
        ifname=args.ifname or ("" if job else "lo"),
        env=checked_env(args.env),
        max_failures=0,
        preflight_s=args.preflight_s,
        **(build.in_job(args, None, str(run_dir)) if job else {}),
    )
    prepare_run_dir(run_dir)
    return plan


def plan_in_job(args: argparse.Namespace, job: Job) -> LaunchPlan:
    """The launch plan of a check in a SLURM job, written."""
    slurm_job.forget_other_jobs()
    plan = deep_plan(args, job)
    plan = replace(plan, port=plan.port or machine.free_port(plan.head_addr, slurm_job.first_port(job)))
    write_launch_plan(plan)
    return plan


def run_in_job(args: argparse.Namespace) -> Exit:
    """What slurm/check_nodes.sh becomes."""
    job = allocation.this_job(os.environ)
    plan = plan_in_job(args, job)
    said = step.SrunMessages()
    with local.Requests(*STOP_SIGNALS) as requests:
        step.run(plan, job, requests)
    if not plan.files.started(plan.attempt).exists():
        print(f"PROBLEM  srun could not start the step: {said}", flush=True)
    return report(Path(plan.run_dir))


def plan_check(args: argparse.Namespace) -> Exit:
    """For copies of the script of release 0.1: prints the folder of the launch plan."""
    print(plan_in_job(args, allocation.this_job(os.environ)).run_dir)
    return Exit.OK


def deep_slurm(args: argparse.Namespace) -> Exit:
    """Asks for nodes, runs slurm/check_nodes.sh on them, and waits for its result."""
    command = ["salloc", *as_words(args, "nodes", "partition"), "--ntasks-per-node=1", "--exclusive", "--mem=0"]
    command += ["--time=10", "bash", slurm.script_path("check_nodes.sh")]
    command += as_words(args, "preflight-s", "device", "runs-dir", "nproc", "port", "head-addr", "ifname", "env")
    command += slurm.surroundings(args)
    env = step.environment(os.environ) | {"SIMCLR_PYTHON": str(Path(sys.executable).absolute())}
    try:
        return Exit.OK if subprocess.run(command, env=env, check=False).returncode == 0 else Exit.PREFLIGHT
    except FileNotFoundError:
        raise LaunchError("salloc: no such program; are you on a login node of the cluster?") from None


def report(run_dir: Path) -> Exit:
    """Prints how far the processes of each node came. Removes the folder if there was no problem."""
    plan = read_launch_plan(RunDir(run_dir).launch_plan)
    procs, status = plan.procs_per_node, read_status(run_dir)
    problems = status.message.split("; ") if status and status.state == "failed" else []
    for rank, host in enumerate(plan.hosts):
        ranks = [_stage(run_dir, r) for r in range(rank * procs, (rank + 1) * procs)]
        stages = ", ".join(dict.fromkeys(r["stage"] for r in ranks))
        fit = all(r["stage"] == "gathered" for r in ranks)
        times = f", all-gather of 4 MiB a rank {max(r['gather_ms'] for r in ranks):.1f} ms" if fit else ""
        devices = ", ".join(dict.fromkeys(r["device"] for r in ranks if "device" in r))
        print(f"{'ok     ' if fit else 'PROBLEM'}  {host}: {procs} processes {stages}{times}  {devices}".rstrip())
        if not fit and not problems:
            problems.append(f"{host}: its processes came no further than `{stages}`; see the log above")
    for problem in problems:
        print(f"PROBLEM  {problem}")
    if problems:
        return Exit.PREFLIGHT
    shutil.rmtree(run_dir, ignore_errors=True)
    return Exit.OK


def _stage(run_dir: Path, rank: int) -> dict[str, Any]:
    return read_record(run_dir / f"rank-{rank}.json") or {"stage": "not started"}
