"""The backend for SLURM, inside the job: slurm/train.sh calls `plan` before its srun and `finish` after it.

The script decides nothing: it gets the run directory from `plan`, starts one task on every node, and passes the exit
code to `finish`. So every decision is in Python and can be tested without a cluster.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher import build, local, machine, outcome, scontrol, slurm, sweep
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import LaunchPlan, checked, new_attempt, read_launch_plan
from simclr_dist.run.layout import RunDir


def job_name_of(environ: Mapping[str, str]) -> str:
    """The job's id for SLURM's commands. In an array ARRAY_TASK, because the last task's plain id also names the whole
    array: requeueing or cancelling that id would act on every task."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise LaunchError("not inside a SLURM job: submit with `sbatch slurm/train.sh CONFIG`, or `salloc` first")
    return job


def plan_attempt(args: argparse.Namespace) -> LaunchPlan:
    """The launch plan of this attempt, made on the first node of the job for the nodes that it has this time."""
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
    # A task of an array is continued as a single run.
    words = (*partition_and_account(environ), *slurm.job_arguments(args))
    values["resume_argv"] = ("slurm", f"--nodes={len(hosts)}", *words)
    return LaunchPlan(
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


def partition_and_account(environ: Mapping[str, str]) -> list[str]:
    found = [("partition", environ.get("SLURM_JOB_PARTITION")), ("account", environ.get("SLURM_JOB_ACCOUNT"))]
    return [f"--{key}={value}" for key, value in found if value and value != "(null)"]


def plan_here(args: argparse.Namespace) -> Exit:
    """For slurm/train.sh: writes the launch plan and prints the run directory, or nothing if there is nothing to do."""
    plan = plan_attempt(args)
    run_dir = Path(plan.run_dir)
    slurm.refuse_if_live(run_dir, own=plan.job)
    if plan.files.stop.exists():
        plan.files.stop.unlink(missing_ok=True)  # granted: the next job may start
        print(f"launcher: {run_dir}: a stop was requested while the job was waiting; not started", file=sys.stderr)
        return Exit.OK
    local.begin(plan, job=plan.job, hosts=plan.hosts, log=scontrol.log_path(plan.job))
    print(plan.run_dir)
    return Exit.OK


def job_hosts(environ: Mapping[str, str]) -> list[str]:
    nodelist = environ.get("SLURM_JOB_NODELIST", "")
    listing = scontrol.query(["scontrol", "show", "hostnames", nodelist]) if nodelist else None
    if listing is None:
        if environ.get("SLURM_JOB_NUM_NODES") == "1":
            return [environ.get("SLURMD_NODENAME") or nodelist]  # containers often have no scontrol
        raise LaunchError(
            f"the nodes of this job ({nodelist}) cannot be listed: `scontrol show hostnames` does not answer here. "
            "If this is a container, start slurm/train.sh outside and only the task inside (see slurm/README.md)",
            Exit.PREFLIGHT,
        )
    return [checked("host", name) for name in listing.split()]


def head_address(hosts: list[str]) -> str:
    """An IP address by which the other nodes reach the first host.

    NodeAddr, the address that SLURM itself uses, is tried before the name. A loopback address counts only if all nodes
    have one, so that all of them are this machine: Debian's /etc/hosts gives every host's own name such an address.
    """
    if len(hosts) == 1:
        return "127.0.0.1"
    node_addr = {host: scontrol.node_address(host) for host in hosts}
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


def finish(run_dir: Path, rc: int) -> Exit:
    """For slurm/train.sh, after its srun: decides what follows, records it, and requeues the job if it should be."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a requeue sends signals to this script, too
    plan = read_launch_plan(RunDir(run_dir).launch_plan)
    job = job_name_of(os.environ)
    if plan.job != job:
        raise LaunchError(f"{plan.path} is the launch plan of job {plan.job}, this is job {job}", Exit.FAILED)
    decision = local.conclude(plan, rc, scontrol.job_state(job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)))
    if decision.action == "requeue":
        done = scontrol.run_query(["scontrol", "requeue", job])
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
