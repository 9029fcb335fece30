"""From a command line to a launch plan with a checked configuration. Starts nothing and writes nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher import gpus, local, node_script
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import TRAINER, Device, LaunchPlan, checked_env, new_attempt, passed_on
from simclr_dist.config import Config, load_config
from simclr_dist.errors import ConfigError
from simclr_dist.parallel.environment import check_environment

PREFLIGHT = "simclr_dist.training.preflight"
SHOWN_ATTEMPT = "show.0-000000"
"""The attempt's name in what `show` prints."""


def training(args: argparse.Namespace, world_size: int | None) -> tuple[Config, tuple[str, ...]]:
    """The checked configuration, and the command of each process. Raises ConfigError, which names every mistake."""
    if os.path.exists(args.config) and not os.path.isfile(args.config):
        raise LaunchError(
            f"{args.config}: not a plain file, and every process must read it; save the configuration as a file"
        )
    check_environment(passed_on(os.environ) | checked_env(args.env))
    # Data may be elsewhere in a container; then only the job can look.
    elsewhere = any(spec.partition(":")[0] != spec.partition(":")[2] for spec in getattr(args, "bind", ()))
    config = load_config(args.config, args.overrides, world_size=world_size, check_data=not elsewhere)
    return config, command(args)


def command(args: argparse.Namespace) -> tuple[str, ...]:
    """Of each process, after the interpreter."""
    return ("-m", TRAINER, os.path.abspath(args.config), *args.overrides)


def check_before_the_queue(args: argparse.Namespace) -> None:
    """What a start would refuse, found out before a job waits for hours: the network, and what a checkpoint asks for.

    Raises ConfigError. What cannot be looked at on this machine is said; the job will look at it.
    """
    if args.container or args.node_python:
        print("launcher: the nodes have another Python; the job will check the training there", file=sys.stderr)
        return
    print(
        "launcher: checking the training before it is submitted, which takes some seconds", file=sys.stderr, flush=True
    )
    line = [sys.executable, "-m", PREFLIGHT, args.config, *args.overrides]
    done = subprocess.run(line, capture_output=True, text=True, env=local.importable_launcher(), check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    # Whose the run directory is, and what fits there, may change until the job starts.
    problems = [row["problem"] for row in found if "problem" in row and row["what"] != "checkpoints"]
    if problems:
        raise ConfigError(problems)
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        print(f"launcher: it could not be checked here, so the job will: {last}", file=sys.stderr, flush=True)


def device_and_procs(args: argparse.Namespace) -> tuple[Device, int]:
    """Device, and processes on each node: one for each GPU of this machine; without GPUs, one on the CPU.

    Says how that was decided. Raises LaunchError for GPUs that are there, or named, and cannot be used.
    """
    if args.device == "cpu":
        return "cpu", args.nproc or 1
    found = gpus.here()
    sure = args.device == "cuda" and args.nproc is not None and args.nproc <= found.usable
    if found.problem and not sure:
        raise LaunchError(f"{found.problem}. {gpus.OR_ON_THE_CPU}", Exit.PREFLIGHT)
    device: Device = "cuda" if args.device == "cuda" or found.usable else "cpu"
    procs = args.nproc or (max(found.usable, 1) if device == "cuda" else 1)
    if device == "cuda" and procs > found.usable:
        raise LaunchError(
            f"--nproc {procs}: there are {found.usable} GPUs here ({found.how}), and each process needs its own; "
            f"use --nproc {max(found.usable, 1)}, or --device cpu"
        )
    print(f"launcher: on {'the CPU' if device == 'cpu' else device}: {found.how}", file=sys.stderr, flush=True)
    return device, procs


def local_plan(args: argparse.Namespace) -> LaunchPlan:
    device, procs = device_and_procs(args)
    config, command = training(args, procs)
    return LaunchPlan(
        backend="local",
        attempt=SHOWN_ATTEMPT if args.dry_run else new_attempt(local.new_job("local"), 0),
        device=device,
        num_nodes=1,
        procs_per_node=procs,
        head_addr="127.0.0.1",
        ifname="lo",
        **common(args, config, command),
    )


def common(args: argparse.Namespace, config: Config, command: tuple[str, ...]) -> dict:
    """The fields of a launch plan that do not depend on the backend."""
    return {
        "run_dir": os.path.abspath(config.run_dir),
        "workdir": os.getcwd(),
        # Not resolved: the interpreter of a virtual environment is a link, and only that path leads to its packages.
        "python": str(Path(sys.executable).absolute()),
        "command": command,
        "resume_argv": args.argv,
        "port": args.port or 0,
        "env": checked_env(args.env),
        "stop_signal": args.stop_signal,
        "max_failures": args.max_failures,
        "requeue": not args.no_requeue,
        "save_budget_s": args.save_budget_s,
        "preflight_s": args.preflight_s,
        **(in_job(args, config, os.path.abspath(config.run_dir)) if hasattr(args, "container") else {}),
    }


def in_job(args: argparse.Namespace, config: Config | None, run_dir: str) -> dict[str, Any]:
    """What SLURM's nodes have around Python, as fields of a launch plan."""
    code = getattr(args, "code", None)
    return {
        "code": code or "",
        "setup": tuple(args.setup),
        "container": args.container or "",
        "binds": node_script.binds(config, filter(None, (os.getcwd(), run_dir, code)), args.bind)
        if args.container
        else (),
        "node_python": args.node_python or "",
        "shared": getattr(args, "shared", False),
    }
