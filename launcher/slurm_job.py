"""The backend for SLURM, inside the job: `launcher job`, which slurm/train.sh becomes.

It plans the attempt on the first node, starts one task on every node, and decides what follows when they have ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import allocation, build, gpus, local, machine, outcome, scontrol, slurm, snapshot, step, sweep
from launcher.allocation import Job
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import (
    STOP_SIGNALS,
    Device,
    LaunchPlan,
    new_attempt,
    prepare_run_dir,
    read_launch_plan,
    restart_of,
)
from simclr_dist.run.layout import RunDir


def run(args: argparse.Namespace) -> Exit:
    """One attempt, from its plan to what follows."""
    snapshot.enter(args.code or "", args.argv)
    with local.Requests(*STOP_SIGNALS) as requests:
        job = this_job()
        not_ours = allocation.why_not_ours(job, os.environ)
        forget_other_jobs()
        plan = plan_attempt(args, job)
        run_dir = Path(plan.run_dir)
        slurm.refuse_if_live(run_dir, own=plan.job)
        prepare_run_dir(run_dir)
        with local.only_launcher(run_dir):
            if stopped_while_waiting(plan):
                return Exit.OK
            if not_ours and plan.requeue:
                print(f"launcher: {not_ours}: it is not requeued when the training stops", file=sys.stderr)
            if problem := slurm.time_limit_problem(job.time_limit_s, args.signal_lead_s, args.save_budget_s):
                print(f"launcher: {problem}", file=sys.stderr, flush=True)
            begin(plan, job, not_ours)
            said = step.SrunMessages()
            code = step.run(plan, job, requests)
            asked = requests.stop or said.cancelled
            return conclude(plan, code, not_ours, said=str(said), stop_requested=asked)


def this_job() -> Job:
    """The job of this shell. LaunchError where its nodes train already."""
    job = allocation.this_job(os.environ)
    if live := scontrol.live_step(job.name, step.NAME):
        raise LaunchError(
            f"job {job.name} already trains, in step {live}: end it first (Ctrl-C where it was started, or "
            f"`scancel {live}`)"
        )
    return job


def forget_other_jobs() -> None:
    """Takes the options of srun and sbatch out of this process's environment; some are another job's."""
    clean = step.environment(os.environ)
    os.environ.clear()
    os.environ.update(clean)


# ---------------------------------------------------------------------------------------------------------------------
# Before the step


def plan_attempt(args: argparse.Namespace, job: Job) -> LaunchPlan:
    """The launch plan of this attempt, made on the first node of the job for the nodes that it has this time."""
    if args.sweep:
        args = sweep.at_point(args, sweep.read_points(Path(args.sweep)), job.array_task)
    device, procs = device_and_procs(args, job)
    config, command = build.training(args, len(job.hosts) * procs)
    head_addr = args.head_addr or head_address(job.hosts)
    values = build.common(args, config, local.continuing(command, job.restarts))
    values["port"] = args.port or machine.free_port(head_addr, first_port(job))
    values["python"] = node_python()
    # A task of an array is continued as a single run.
    queue = [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(job, key))]
    asked = [word for word in args.submitted if not word.startswith("--nodes=")] or queue
    values["resume_argv"] = ("slurm", f"--nodes={len(job.hosts)}", *asked, *slurm.job_arguments(args))
    return LaunchPlan(
        backend="slurm",
        attempt=new_attempt(job.name, job.restarts),
        device=device,
        num_nodes=len(job.hosts),
        procs_per_node=procs,
        hosts=job.hosts,
        head_addr=head_addr,
        ifname=args.ifname or "",
        **values,
    )


def device_and_procs(args: argparse.Namespace, job: Job) -> tuple[Device, int]:
    """Device, and processes on each node: one for each GPU that SLURM gave. Each node looks whether it can use them.

    Where SLURM gave none, it may not know of the GPUs of its nodes, and those of this machine count.
    """
    allocated = 0 if args.device == "cpu" else job.gpus_per_node(args.nproc)
    if not allocated:
        return build.device_and_procs(args)
    if args.nproc and args.nproc > allocated:
        raise LaunchError(
            f"--nproc {args.nproc}: job {job.name} has {allocated} GPUs on each node, and each process needs its own; "
            f"use --nproc {allocated}, or ask for more. {gpus.OR_ON_THE_CPU}"
        )
    return "cuda", args.nproc or allocated


def node_python() -> str:
    """The script's interpreter, which may be a wrapper around this process's."""
    return shutil.which(os.environ.get("SIMCLR_PYTHON", "")) or str(Path(sys.executable).absolute())


def first_port(job: Job) -> int:
    array, _, task = job.name.partition("_")
    return int(array) * 10 + int(task or 0) * 10 + job.restarts


def stopped_while_waiting(plan: LaunchPlan) -> bool:
    """Whether a stop was requested before the start. The request is then granted."""
    if not plan.files.stop.exists():
        return False
    plan.files.stop.unlink(missing_ok=True)  # the next job may start
    print(f"launcher: {plan.run_dir}: a stop was requested while the job was waiting; not started", file=sys.stderr)
    return True


def begin(plan: LaunchPlan, job: Job, not_ours: str) -> None:
    whose = {"shared_job": True} if not_ours else {}
    local.begin(plan, job=plan.job, hosts=plan.hosts, log=job.log, code=plan.code or None, **whose)


def head_address(hosts: Sequence[str]) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# After the step


def conclude(
    plan: LaunchPlan, code: int, not_ours: str, said: str = "its message stands above", stop_requested: bool = False
) -> Exit:
    """Decides what follows, records it, and requeues the job if it should be. code: srun's; said: its own words."""
    if plan.files.started(plan.attempt).exists() or not scontrol.all_answer(plan.hosts):
        said = ""  # something ran, or a node was lost
    state = scontrol.job_state(plan.job, restart_of(plan.attempt))
    decision = local.conclude(plan, code, state, never_started=said, stop_requested=stop_requested, not_ours=not_ours)
    plan.files.started(plan.attempt).unlink(missing_ok=True)
    if decision.action != "requeue":
        local.report(plan, decision)
        return decision.exit_code
    done = scontrol.run_query(["scontrol", "requeue", plan.job])
    if done is not None and done.returncode == 0:
        print(f"launcher: {plan.run_dir}: {decision.why}; requeued", file=sys.stderr, flush=True)
        return Exit.OK
    refusal = done.stderr.strip() if done else "scontrol does not answer"
    outcome.record(Path(plan.run_dir), "requeue_refused", plan.attempt, why=refusal)
    print(f"launcher: {plan.run_dir}: {decision.why}; SLURM does not requeue it: {refusal}", file=sys.stderr)
    print(f"launcher: continue with: {local.continue_line(plan)}", file=sys.stderr, flush=True)
    return Exit.FAILED if decision.failed else Exit.PREEMPTED


# ---------------------------------------------------------------------------------------------------------------------
# For copies of the scripts of release 0.1, which start the step themselves


def plan_here(args: argparse.Namespace) -> Exit:
    """Writes the launch plan and prints the run directory, or nothing if there is nothing to do."""
    snapshot.enter(args.code or "", args.argv)
    job = this_job()
    forget_other_jobs()
    plan = plan_attempt(args, job)
    slurm.refuse_if_live(Path(plan.run_dir), own=plan.job)
    if not stopped_while_waiting(plan):
        begin(plan, job, "")
        print(plan.run_dir)
    return Exit.OK


def finish(run_dir: Path, code: int) -> Exit:
    """After the script's srun."""
    with local.Requests(*STOP_SIGNALS):  # a requeue sends signals to this process, too
        plan = read_launch_plan(RunDir(run_dir).launch_plan)
        job = allocation.this_job(os.environ, over=True)
        if plan.job != job.name:
            raise LaunchError(f"{plan.path} is the launch plan of job {plan.job}, this is job {job.name}", Exit.FAILED)
        return conclude(plan, code, allocation.why_not_ours(job, os.environ))
