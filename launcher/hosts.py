"""The backend for machines that ssh reaches, without a scheduler: one ssh command for each host of a hostfile.

    node1 slots=8                 one host a line; slots: processes (the same on all)
    node2 slots=8 addr=10.0.0.2   addr: the address by which the other nodes reach it

The run directory and the checkout must be on a disk that all hosts share, at the same path.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher import build, local, machine
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import LaunchPlan, checked, new_attempt, one_line


@dataclass(frozen=True)
class Host:
    name: str
    slots: int | None = None
    addr: str = ""


def read_hostfile(path: Path) -> list[Host]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read: {error}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            # checked: a name that starts with a dash would be an option of ssh.
            name = checked("host", words[0])
            values = dict(word.split("=", 1) for word in words[1:])
            unknown = values.keys() - {"slots", "addr"}
            if unknown or not re.fullmatch(r"[1-9]\d{0,3}", values.get("slots", "1")):
                raise ValueError
            addr = checked("address", values["addr"]) if "addr" in values else ""
        except LaunchError as error:
            raise LaunchError(f"{path}:{number}: {error}") from None
        except ValueError:
            raise LaunchError(f"{path}:{number}: expected `host [slots=N] [addr=IP]`, found {line!r}") from None
        if name in [host.name for host in hosts]:
            raise LaunchError(f"{path}:{number}: {name} appears twice; give its number of processes with slots=N")
        hosts.append(Host(name, int(values["slots"]) if "slots" in values else None, addr))
    if not hosts:
        raise LaunchError(f"{path}: no hosts in it")
    return hosts


def plan_for(args: argparse.Namespace) -> LaunchPlan:
    hosts = read_hostfile(Path(args.hostfile))
    slots = sorted({host.slots for host in hosts if host.slots})
    if len(slots) > 1:
        raise LaunchError(
            f"{args.hostfile}: hosts with {slots} slots; every node must run the same number of processes"
        )
    if args.nproc is None and slots:
        args = argparse.Namespace(**{**vars(args), "nproc": slots[0]})
    device, procs = build.device_and_procs(args) if args.device == "auto" else (args.device, args.nproc or 1)
    config, command = build.training(args, len(hosts) * procs)
    return LaunchPlan(
        backend="hosts",
        attempt=build.SHOWN_ATTEMPT if args.dry_run else new_attempt(local.new_job("hosts"), 0),
        device=device,
        num_nodes=len(hosts),
        procs_per_node=procs,
        hosts=tuple(host.name for host in hosts),
        head_addr=args.head_addr or _head_address(hosts),
        ifname=args.ifname or "",
        **build.common(args, config, command),
    )


def _head_address(hosts: list[Host]) -> str:
    if len(hosts) == 1:
        return "127.0.0.1"
    name = hosts[0].addr or hosts[0].name
    try:
        address = machine.resolve(name)
    except OSError as error:
        raise LaunchError(f"{name}: {error.strerror}; write its IP address into the hostfile: {name} addr=IP") from None
    if machine.is_loopback(address) and not hosts[0].addr:
        raise LaunchError(
            f"{name} is {address} on this machine, where the others cannot reach it; "
            f"write its IP address into the hostfile: {name} addr=IP"
        )
    return address


def commands(ssh_cmd: str) -> Callable[[LaunchPlan], list[list[str]]]:
    """A function that gives the ssh command lines of a plan, one for each node."""
    ssh = shlex.split(one_line("--ssh-cmd", ssh_cmd))
    if not ssh:
        raise LaunchError("--ssh-cmd is empty")
    here = str(Path(__file__).resolve().parent.parent)

    def for_plan(plan: LaunchPlan) -> list[list[str]]:
        # The words are quoted, because ssh passes them to a shell on the host. -tt: when the connection is lost, the
        # host sends SIGHUP to the node's processes, and they end. ServerAliveInterval: ssh notices a lost network
        # after three unanswered messages. BatchMode: never wait for a password.
        return [
            [
                *ssh,
                *("-tt", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30", "--", host),
                shlex.join(["env", f"PYTHONPATH={here}", *local.node_command(plan, rank)]),
            ]
            for rank, host in enumerate(plan.hosts)
        ]

    return for_plan


def run(args: argparse.Namespace) -> Exit:
    return local.run(plan_for(args), commands(args.ssh_cmd))
