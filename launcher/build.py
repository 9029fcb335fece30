"""From a command line to a checked plan: nothing is started and nothing written here."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launcher import local, machine
from launcher.errors import LaunchError
from launcher.plan import Device, Plan, checked_env, new_attempt
from simclr_dist.config import Config, load_config

TRAINER = "simclr_dist.train"
SHOWN_ATTEMPT = "show.0-000000"
"""Stands for the attempt where nothing is going to be started."""


def training(args: argparse.Namespace, world_size: int | None) -> tuple[Config, tuple[str, ...]]:
    """The checked configuration, and the command of each process. ConfigError names everything wrong at once."""
    config = load_config(args.config, args.overrides, world_size=world_size)
    return config, ("-m", TRAINER, os.path.abspath(args.config), *args.overrides)


def device_and_procs(args: argparse.Namespace) -> tuple[Device, int]:
    """All GPUs of this machine, one process each; without any, one process on the CPU."""
    gpus = machine.num_gpus()
    device: Device = args.device if args.device != "auto" else "cuda" if gpus else "cpu"
    procs = args.nproc or (max(gpus, 1) if device == "cuda" else 1)
    if device == "cuda" and procs > gpus:
        raise LaunchError(
            f"--nproc {procs}: there are {gpus} GPUs here, and each process needs its own; "
            f"use --nproc {max(gpus, 1)}, or --device cpu"
        )
    return device, procs


def local_plan(args: argparse.Namespace) -> Plan:
    device, procs = device_and_procs(args)
    config, command = training(args, procs)
    return Plan(
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
    """The parts of a plan that do not depend on the backend."""
    return {
        "run_dir": os.path.abspath(config.run_dir),
        "workdir": os.getcwd(),
        # Not resolved: a virtual environment's interpreter is a link, and the link is what knows its packages.
        "python": str(Path(sys.executable).absolute()),
        "command": command,
        "again": tuple(args.again),
        "port": args.port,
        "env": checked_env(args.env),
        "stop_signal": args.stop_signal,
        "max_failures": args.max_failures,
        "requeue": not args.no_requeue,
        "save_budget_s": args.save_budget_s,
        "preflight_s": args.preflight_s,
    }
