"""The backend for machines that ssh reaches, without a scheduler: one ssh command for each host of a hostfile.

    node1 slots=8                 one host a line; slots: processes (the same on all)
    node2 slots=8 addr=10.0.0.2   addr: the address by which the other nodes reach it
    me@node3 port=2222            user and port of ssh

The run directory and the checkout must be on a disk that all hosts share, at the same path.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import build, local, machine
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import LaunchPlan, checked, new_attempt, one_line


@dataclass(frozen=True)
class Host:
    """user, port: how ssh reaches it. addr: how the other nodes do, where that is not its name."""

    name: str
    slots: int | None = None
    addr: str = ""
    user: str = ""
    port: int | None = None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, with their first one first. Raises LaunchError, which shows a line as it should be.

    A host that stands there several times, as in the files of PBS and LSF, has so many slots.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    times: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host = read_host(text)
        except LaunchError as error:
            raise LaunchError(f"{path}:{number}: {error}") from None
        times[host.name] += 1
        if host != hosts.setdefault(host.name, host) or (times[host.name] > 1 and host.slots):
            raise LaunchError(f"{path}:{number}: {host.name} stands there twice; write one line: {host.name} slots=N")
    if not hosts:
        raise LaunchError(f"{path}: no hosts in it")
    repeated = max(times.values()) > 1
    return [replace(host, slots=times[name]) if repeated and not host.slots else host for name, host in hosts.items()]


def read_host(text: str) -> Host:
    """A line such as `user@host port=22 slots=8 addr=IP`. LaunchError shows the line that may be meant."""
    if "," in text:
        raise LaunchError(f"{text!r}: write one host a line")
    where, *words = re.sub(r"\s*=\s*", "=", text).split()
    user, _, where = where.rpartition("@")
    if user:
        checked("user", user)
    number = ""
    if match := re.fullmatch(r"\[([^\]]*)\](?::(\d+))?", where):
        where, number = match[1], match[2] or ""
        if not machine.is_ip(where):
            raise LaunchError(f"{where!r} is not an address: brackets are for IPv6 only")
    elif match := re.fullmatch(r"([^:]*):([^:]*)", where):
        at = f"{user}@{match[1]}" if user else match[1]
        raise LaunchError(
            f"{text!r}: is {match[2]} a number of processes or a port? "
            f"Write `{at} slots={match[2]}`, or `{at} port={match[2]}`"
        )
    # checked: a name that starts with a dash would be an option of ssh.
    name = checked("host", where)
    values = dict(word.partition("=")[::2] for word in words)
    if number:
        values.setdefault("port", number)
    limit = values.pop("max-slots", values.pop("max_slots", ""))
    for key in ("slots", "port"):
        if key in values and not re.fullmatch(r"[1-9]\d{0,4}", values[key]):
            raise LaunchError(f"{text!r}: {key}={values[key]} is not a number; write `{name} {key}=N`")
    if unknown := values.keys() - {"slots", "addr", "port"}:
        raise LaunchError(
            f"{text!r}: {', '.join(sorted(unknown))} is not known; expected `[user@]host [slots=N] [port=N] [addr=IP]`"
            + (f". Write `{name} slots={words[0]}`" if words[0].isdecimal() else "")
        )
    slots = int(values["slots"]) if "slots" in values else None
    if slots and limit.isdecimal() and slots > int(limit):
        raise LaunchError(f"{text!r}: more slots than max-slots")
    addr = checked("address", values["addr"].strip("[]")) if "addr" in values else ""
    return Host(name, slots, addr, user, int(values["port"]) if "port" in values else None)


def plan_for(args: argparse.Namespace) -> LaunchPlan:
    hosts = read_hostfile(Path(args.hostfile))
    slots = sorted({host.slots for host in hosts if host.slots})
    if len(slots) > 1:
        raise LaunchError(
            f"{args.hostfile}: hosts with {slots} slots; every node must run the same number of processes"
        )
    if args.nproc is None and slots:
        args = argparse.Namespace(**{**vars(args), "nproc": slots[0]})
    try:
        device, procs = build.device_and_procs(args) if args.device == "auto" else (args.device, args.nproc or 1)
    except LaunchError as error:
        whose = f"{args.hostfile}, {slots[0]} processes on each host: " if slots else ""
        raise LaunchError(f"{whose}{error}", error.exit_code) from None
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


def commands(ssh_cmd: str, hosts: Sequence[Host] = ()) -> Callable[[LaunchPlan], list[list[str]]]:
    """A function that gives the ssh command lines of a plan, one for each node. hosts: how to reach them."""
    ssh = shlex.split(one_line("--ssh-cmd", ssh_cmd))
    if not ssh:
        raise LaunchError("--ssh-cmd is empty")
    here = str(Path(__file__).resolve().parent.parent)
    known = {host.name: host for host in hosts}

    def for_plan(plan: LaunchPlan) -> list[list[str]]:
        # The words are quoted, because ssh passes them to a shell on the host. -tt: when the connection is lost, the
        # host sends SIGHUP to the node's processes, and they end. ServerAliveInterval: ssh notices a lost network
        # after three unanswered messages. BatchMode: never wait for a password.
        return [
            [
                *ssh,
                *("-tt", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30"),
                *(("-p", str(host.port)) if host.port else ()),
                *("--", f"{host.user}@{host.name}" if host.user else host.name),
                shlex.join(["env", f"PYTHONPATH={here}", *local.node_command(plan, rank)]),
            ]
            for rank, host in enumerate(known.get(name, Host(name)) for name in plan.hosts)
        ]

    return for_plan


def commands_for(args: argparse.Namespace) -> Callable[[LaunchPlan], list[list[str]]]:
    return commands(args.ssh_cmd, read_hostfile(Path(args.hostfile)))


def run(args: argparse.Namespace) -> Exit:
    return local.run(plan_for(args), commands_for(args))
