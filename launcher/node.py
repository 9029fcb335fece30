"""What is started once on each node: `python -m launcher node --plan RUN/plan.json`, or `node CONFIG` elsewhere.

Finds the node's rank, interface and environment, takes part in the roll call, and becomes `accelerate launch`. No shell
expands anything in between: a $SLURM_NODEID that is expanded on the wrong machine, or not at all, is the commonest
mistake with several nodes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from launcher import build, gpus, local, machine, node_script, outcome, processes, rollcall, schedulers, snapshot
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import (
    TRAINER,
    LaunchPlan,
    is_reserved,
    job_of,
    new_attempt,
    passed_on,
    prepare_run_dir,
    read_launch_plan,
    restart_of,
    write_launch_plan,
)
from simclr_dist.parallel.environment import found_in
from simclr_dist.run.status import read_status, write_status

AGENT = "simclr_dist.training.agent"
WORKER = "simclr_dist.run.output"
MARK = r"\.node-[0-9a-f]{16}"
STATUS_S = 30.0
ACCELERATE_CONFIG = Path(__file__).with_name("accelerate.yaml")


def run_node(plan_path: Path, node_rank: int | None) -> None:
    """Does not return: this process becomes the agent that starts and watches the node's workers."""
    plan = read_launch_plan(plan_path)
    if (plan.setup or plan.container) and os.environ.get(node_script.RAN) != plan.attempt:
        raise LaunchError(
            "this batch script is of an earlier version and runs neither set-up lines nor a container: "
            "take the present slurm/train.sh, and make your changes there again"
        )
    snapshot.enter(plan.code, sys.argv[1:])
    # The agent would die of the stop signal: it has no handler while it imports torch. An ignored signal stays ignored
    # across exec and fork, until the workers install their handler.
    signal.signal(getattr(signal, f"SIG{plan.stop_signal}"), signal.SIG_IGN)
    with suppress(OSError):  # the preflight names a folder that is not there
        plan.files.started(plan.attempt).touch()
    rank = find_node_rank(plan, node_rank, os.environ)
    problems, everywhere = preflight(plan, rank)
    if problems:
        reason: Literal["preflight", "unfit"] = "unfit" if everywhere else "preflight"
        message = "; ".join(problems)
        write_status(plan.files.path, "failed", step=0, reason=reason, message=message, attempt=plan.attempt)
        raise refusal(problems)
    ifname = plan.ifname or machine.interface_towards(plan.head_addr)
    if rank == 0:
        print(f"launcher: {describe(plan, ifname)}", file=sys.stderr, flush=True)  # stdout is the training's
        say_what_is_kept_back(plan)
    os.chdir(plan.workdir)
    # This node's own interpreter: in a container it has another path than where the launch plan was made.
    argv = checking(agent_argv(replace(plan, python=str(Path(sys.executable).absolute())), rank), plan, rank)
    sys.stdout.flush()
    os.execve(argv[0], argv, agent_env(plan, ifname, machine.num_cpus(), os.environ))


def say_what_is_kept_back(plan: LaunchPlan) -> None:
    """Names the variables that the workers do not get."""
    found = [entry for entry in found_in(os.environ) if is_reserved(entry.name)]
    kept_back = [str(entry) for entry in found if entry.counts]
    if plan.backend != "slurm":  # srun sets some of them always
        places = [f"{entry.name}={entry.shown}" for entry in found if entry.row.treatment == "used"]
        kept_back += [f"{', '.join(places)}: this launcher starts the processes"] if places else []
    if kept_back:
        print(f"launcher: not passed on to the training: {'; '.join(kept_back)}", file=sys.stderr, flush=True)


def refusal(problems: Sequence[str]) -> LaunchError:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return LaunchError(f"preflight: these nodes cannot train together:\n{lines}", Exit.PREFLIGHT)


def run_at_rendezvous(args: argparse.Namespace) -> Exit:
    """This node's part of a training whose nodes were started by another scheduler, all by the same command.

    Each node makes the same launch plan; the roll call compares them. The run directory is shared. This process stays,
    because a scheduler's TERM may reach nothing else, and ends with the exit code of the run.
    """
    device, procs = build.device_and_procs(args)
    own_names = list(dict.fromkeys([socket.gethostname(), socket.getfqdn()]))
    place = schedulers.read_place(
        os.environ,
        own_names,
        procs,
        rendezvous=args.rendezvous or args.head_addr,
        node_rank=args.node_rank,
        num_nodes=args.nodes,
    )
    for sentence in place.said:
        print(f"launcher: {sentence}", file=sys.stderr, flush=True)
    config, command = build.training(args, place.num_nodes * procs)
    # Whether it is started again is the scheduler's choice.
    values = build.common(args, config, command) | {"port": args.port or place.port, "max_failures": 0}
    run_dir = Path(values["run_dir"])
    prepare_run_dir(run_dir)
    job = f"node_{re.sub('[^A-Za-z0-9_]', '_', place.job)[:24]}" if place.job else local.new_job("node")
    restart = sum(job_of(entry["attempt"]) == job for entry in outcome.recorded(run_dir, "start"))
    plan = LaunchPlan(
        backend="rendezvous",
        attempt=new_attempt(job, restart),
        device=device,
        num_nodes=place.num_nodes,
        procs_per_node=procs,
        ifname=args.ifname or "",
        **values,
    )
    facts = {
        "nodes": str(plan.num_nodes),
        "processes on each node": str(procs),
        "device": device,
        "run directory": plan.run_dir,
        "configuration": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
    }
    # Until there are workers that can save. The first process of a container has no handler that would end it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if place.node_rank:
        return _run_with_head(plan, place, facts)
    with local.only_launcher(run_dir):
        return _run_as_head(plan, place, facts)


def _run_as_head(plan: LaunchPlan, place: schedulers.Place, facts: Mapping[str, str]) -> Exit:
    plan = replace(plan, command=local.continuing(plan.command, restart_of(plan.attempt)))
    plan.files.stop.unlink(missing_ok=True)
    local.begin(plan)
    met = _wait_for_others(plan, place, facts)
    if met.problems:
        message = "; ".join(met.problems)
        write_status(plan.files.path, "failed", step=0, reason="preflight", message=message, attempt=plan.attempt)
        print(f"launcher: {refusal(met.problems)}", file=sys.stderr, flush=True)
        rc = int(Exit.PREFLIGHT)
    else:
        plan = replace(plan, hosts=met.hosts, head_addr=met.head_addr)
        write_launch_plan(plan)
        rc = _run_agent(plan, 0)
    decision = local.conclude(plan, rc, "none")
    local.report(plan, decision)
    return decision.exit_code


def _wait_for_others(plan: LaunchPlan, place: schedulers.Place, facts: Mapping[str, str]) -> rollcall.Met:
    own = _report_of(plan, 0, facts)
    if plan.num_nodes == 1:
        alone = replace(plan, head_addr="127.0.0.1")
        return rollcall.Met(preflight(alone, 0)[0], plan.attempt, (own.host,), alone.head_addr)
    try:
        address = head_to_listen_at(place.head, own.host)
    except LaunchError as error:
        return rollcall.Met([str(error)])
    server = rollcall.open_server(address, plan.port, own.host, plan.num_nodes)
    if isinstance(server, str):
        return rollcall.Met([server])
    print(
        f"launcher: waiting for {plan.num_nodes - 1} more nodes at {place.head}:{plan.port}",
        file=sys.stderr,
        flush=True,
    )

    def is_here(mark: str) -> bool:
        return re.fullmatch(MARK, mark) is not None and (Path(plan.run_dir) / mark).exists()

    return rollcall.receive(server, plan.attempt, own, plan.num_nodes, plan.preflight_s, is_here)


def head_to_listen_at(head: str, host: str) -> str:
    """The address of this machine that `head` names; empty, which is all of them, where that cannot be told.

    A Service of Kubernetes has an address that no machine has; `localhost`, which Kubeflow tells its first node, or a
    host's own name in /etc/hosts, has one that no other machine reaches. LaunchError for another machine's address.
    """
    own = machine.own_addresses()
    try:
        address = machine.resolve(head)
    except OSError as error:
        address, why = "", f"cannot be resolved here: {error.strerror}"
    else:
        why = f"is {address}, which is not an address of this node"
    if machine.is_loopback(address):
        # Asked for by number, all nodes are on this machine; no other one may connect.
        return address if head == address else ""
    if address in own:
        return address
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return ""
    raise LaunchError(
        f"{host} is node 0, but the rendezvous {head} {why}; it has {', '.join(sorted(own))}. "
        "Give an address of node 0, or another --node-rank",
        Exit.PREFLIGHT,
    )


def _run_with_head(plan: LaunchPlan, place: schedulers.Place, facts: Mapping[str, str]) -> Exit:
    mark = plan.files.path / f".node-{secrets.token_hex(8)}"
    mark.touch()
    try:
        own = replace(_report_of(plan, place.node_rank, facts), mark=mark.name)
        met = rollcall.join(place.head, plan.port, own, plan.preflight_s)
    finally:
        mark.unlink(missing_ok=True)
    if met.problems:
        raise refusal(met.problems)
    command = local.continuing(plan.command, restart_of(met.attempt))
    plan = replace(plan, attempt=met.attempt, hosts=met.hosts, head_addr=met.head_addr, command=command)
    rc = _run_agent(plan, place.node_rank)
    deadline = time.monotonic() + STATUS_S
    while not rc and time.monotonic() < deadline:  # what rank 0 says at last comes by a shared disk
        status = read_status(Path(plan.run_dir))
        if status is not None and status.attempt == plan.attempt and status.state != "running":
            return Exit.PREEMPTED if status.state == "preempted" else Exit.OK
        time.sleep(local.POLL_S)
    return Exit.FAILED if rc else Exit.OK


def _report_of(plan: LaunchPlan, rank: int, facts: Mapping[str, str]) -> rollcall.Report:
    own = local_report(plan, rank)
    return replace(own, versions={**own.versions, **facts})


def _run_agent(plan: LaunchPlan, rank: int) -> int:
    """Starts this node's workers and waits for them; signals ask them to save."""
    ifname = plan.ifname or machine.interface_towards(plan.head_addr)
    print(f"launcher: {describe(plan, ifname)}", file=sys.stderr, flush=True)
    say_what_is_kept_back(plan)
    argv = checking(agent_argv(plan, rank), plan, rank)
    env = agent_env(plan, ifname, machine.num_cpus(), local.importable_launcher())
    processes.adopt_orphans()
    with local.Requests(plan.stop_signal) as requests:
        return local.run_attempt(plan, requests, [argv], env)


def find_node_rank(plan: LaunchPlan, given: int | None, environ: Mapping[str, str]) -> int:
    rank = given
    if rank is None and "SLURM_STEP_ID" in environ:
        # SLURM_NODEID counts the nodes of the step. A step of fewer nodes than the launch plan (srun -N1 -w n2) would
        # take ranks of other nodes.
        num_nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES", "0"))
        if num_nodes != plan.num_nodes:
            raise LaunchError(
                f"this step has {num_nodes} nodes, the launch plan {plan.num_nodes}: "
                "start one task a node with one srun",
                Exit.PREFLIGHT,
            )
        if int(environ.get("SLURM_LOCALID", "0")) != 0:
            raise LaunchError(
                "two launchers on one node: use --ntasks-per-node=1, each starts the node's processes itself",
                Exit.PREFLIGHT,
            )
        rank = int(environ["SLURM_NODEID"])
    if rank is None and plan.num_nodes == 1:
        rank = 0
    if rank is None or not 0 <= rank < plan.num_nodes:
        raise LaunchError(f"node rank {rank}: the launch plan has nodes 0 to {plan.num_nodes - 1}; give --node-rank")
    return rank


def preflight(plan: LaunchPlan, rank: int) -> tuple[list[str], bool]:
    """The problems that keep these nodes from training together, the same list on each node; and whether one of them is
    alike on all nodes, so that other nodes would have it, too."""
    own = local_report(plan, rank)
    if plan.num_nodes == 1:
        busy = not machine.port_is_free(plan.head_addr, plan.port)
        # On a single machine accelerate would silently change to another port and mode.
        taken = [f"port {plan.port} on {plan.head_addr} is in use; choose another with --port"] if busy else []
        return [*own.problems, *taken], bool(own.problems)
    place = (plan.head_addr, plan.port, plan.attempt, own)
    problems = (
        rollcall.answer(*place, plan.preflight_s) if rank else rollcall.listen(*place, plan.hosts, plan.preflight_s)
    )
    return problems, any(problem.startswith(rollcall.EVERY_NODE) for problem in problems)


def local_report(plan: LaunchPlan, rank: int) -> rollcall.Report:
    problems = []
    if problem := gpu_problem(plan, os.environ):
        problems.append(problem)
    for path in (plan.run_dir, plan.workdir):
        if not Path(path).is_dir():
            problems.append(f"{path} is not there; the run needs a directory that all nodes share")
    if not os.access(plan.run_dir, os.W_OK):
        problems.append(f"{plan.run_dir} cannot be written to")
    host = plan.hosts[rank] if plan.hosts else socket.gethostname()
    return rollcall.Report(rank, host, versions(), problems, time.time())


def gpu_problem(plan: LaunchPlan, environ: Mapping[str, str]) -> str:
    """Why the plan's processes would not find their GPUs on this node; empty if they will."""
    if plan.device == "cpu" or (found := gpus.here()).usable >= plan.procs_per_node:
        return ""
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    try:
        gpus.compare_with_allocated(int(given or 0), f"SLURM_GPUS_ON_NODE={given}", found)
    except LaunchError as error:
        return str(error)
    return (
        f"{found.usable} GPUs usable, but the launch plan has {plan.procs_per_node} processes on each node: "
        f"{found.problem or found.how}"
    )


def versions() -> dict[str, str]:
    """Versions that must be alike on all nodes; read from the installed packages, without importing them."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("torch", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def agent_argv(plan: LaunchPlan, rank: int) -> list[str]:
    """The command line that starts this node's workers."""
    accelerate = [plan.python, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIG)]
    if plan.world_size > 1:
        # --multi_gpu also on CPUs: --cpu --num_processes 2 would silently start one process.
        # Static rendezvous: c10d numbers ranks by arrival, so that rank 0 could be on any node, and needs a name
        # service. Its time-out is doubled by a retry. --max_restarts 0: only the failing node would restart, and the
        # others would wait for ever.
        accelerate += [
            "--multi_gpu",
            *("--num_machines", str(plan.num_nodes), "--num_processes", str(plan.world_size)),
            *("--machine_rank", str(rank), "--rdzv_backend", "static"),
            *("--main_process_ip", plan.head_addr or "HEAD", "--main_process_port", str(plan.port or "PORT")),
            *("--rdzv_conf", f"timeout={plan.rendezvous_s:.0f}", "--max_restarts", "0"),
        ]
    else:
        accelerate += ["--num_machines", "1", "--num_processes", "1", *(["--cpu"] if plan.device == "cpu" else [])]
    # The trainer decides precision and compilation itself.
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*accelerate, *plan.command]


def checking(accelerate: list[str], plan: LaunchPlan, rank: int) -> list[str]:
    """`accelerate launch` for a training, in a process that first looks whether the training can work at all.

    On one node, and once: a later attempt of the job has been looked at.
    """
    if plan.command[:2] != ("-m", TRAINER):
        return accelerate
    first = rank == 0 and restart_of(plan.attempt) == 0
    agent = [accelerate[0], "-m", AGENT, plan.run_dir, *(plan.command[2:] if first else ()), "--"]
    options = accelerate[3 : len(accelerate) - len(plan.command)]
    return [*agent, *options, "-m", WORKER, *plan.command[1:]]


def agent_env(plan: LaunchPlan, ifname: str, num_cpus: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of the agent and its workers. The user's variables win, except for reserved ones."""
    env = passed_on(inherited)
    if plan.code:
        env = snapshot.importing(plan.code, env)
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus // plan.procs_per_node)))
    env.setdefault("PYTHONUNBUFFERED", "1")
    # The name of one interface: gloo accepts no exclusion list.
    env.setdefault("GLOO_SOCKET_IFNAME", ifname)
    if plan.device == "cuda":
        if plan.num_nodes > 1:
            env.setdefault("NCCL_SOCKET_IFNAME", ifname)
        # After a time-out NCCL then reports which rank was missing.
        env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        env.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    env |= plan.env
    env["PET_SHUTDOWN_TIMEOUT"] = f"{plan.save_budget_s:.0f}"
    env["SIMCLR_EXPECTED_WORLD_SIZE"] = str(plan.world_size)
    env["SIMCLR_ATTEMPT"] = plan.attempt
    env["SIMCLR_STOP_SIGNAL"] = plan.stop_signal
    if plan.device == "cpu":
        env["ACCELERATE_USE_CPU"] = "true"
    return env


def describe(plan: LaunchPlan, ifname: str) -> str:
    processes = f"{plan.procs_per_node} process" + ("es" if plan.procs_per_node > 1 else "")
    if plan.num_nodes == 1:
        return f"starting {processes} on {plan.device}, which takes some seconds; attempt {plan.attempt}"
    return (
        f"starting {plan.num_nodes} nodes x {processes} on {plan.device}; head {plan.hosts[0]} at "
        f"{plan.head_addr}:{plan.port} over {ifname}; attempt {plan.attempt}"
    )
