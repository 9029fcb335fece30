"""The roll call before anything is started: do all nodes reach the head node, and are they alike?

Node 0 listens on the address and port that the rendezvous will use. Every other node connects and sends a report: who
it is, its versions, its problems. Node 0 answers all of them with the same list of problems; it is empty if the run may
start. So a wrong address or a missing node is named within seconds, where a rendezvous would hang for minutes.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher import machine

CONNECT_TIMEOUT_S = 5.0
CLOCK_SKEW_S = 30.0
LONGEST_LINE = 65536
EVERY_NODE = "every node: "
"""Starts the problems that all nodes have."""


@dataclass(frozen=True)
class Report:
    """What one node sends. `versions` must be alike on all nodes; `clock`: its time in seconds since 1970."""

    node_rank: int
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()
    clock: float = 0.0


def listen(address: str, port: int, attempt: str, own: Report, hosts: Sequence[str], timeout_s: float) -> list[str]:
    """On node 0: waits for the other nodes of `hosts`, sends all of them the problems, and returns these."""
    if address not in machine.own_addresses():
        return [
            f"the head address {address} is not an address of the first node {own.host}, which has: "
            + ", ".join(sorted(machine.own_addresses()))
        ]
    reports, connections = {own.node_rank: own}, []
    deadline = time.monotonic() + timeout_s
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, port), family=family, backlog=len(hosts))
    except OSError as error:
        return [f"port {port} on {address} ({own.host}) cannot be used: {error.strerror}; choose one with --port"]
    with server:
        while len(reports) < len(hosts) and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            connection.settimeout(CONNECT_TIMEOUT_S)
            try:
                received = _read_line(connection)
                if received.pop("attempt") != attempt:
                    raise ValueError("another attempt")
                report = Report(**received)
                if not 0 < report.node_rank < len(hosts) or report.node_rank in reports:
                    raise ValueError("no such node, or twice the same")
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                connection.close()  # another program, or a process of an earlier attempt
                continue
            reports[report.node_rank] = report
            connections.append(connection)
    problems = compare(reports, hosts, timeout_s)
    for connection in connections:
        try:
            connection.sendall(json.dumps({"problems": problems}).encode() + b"\n")
            # The other side closes first, so that this port does not linger in TIME_WAIT on the head node.
            connection.recv(1)
        except OSError:
            pass
        connection.close()
    return problems


def answer(address: str, port: int, attempt: str, own: Report, timeout_s: float) -> list[str]:
    """On the other nodes: reports to node 0 and returns the problems it sends. Tries until `timeout_s` have passed."""
    deadline, last = time.monotonic() + timeout_s, "not tried"
    message = json.dumps({"attempt": attempt, **own.__dict__}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(CONNECT_TIMEOUT_S, left)) as connection:
                connection.sendall(message)
                # Node 0 answers when all nodes have reported or its own time is over.
                connection.settimeout(timeout_s + CONNECT_TIMEOUT_S)
                return [str(problem) for problem in _read_line(connection)["problems"]]
        except (OSError, ValueError, KeyError) as error:
            last = str(error)
            time.sleep(0.2)
    return [
        f"{own.host} cannot reach the head node at {address}:{port} after {timeout_s:.0f} s ({last}); "
        "is there a firewall between the nodes, or is it the wrong interface? Choose another with --head-addr"
    ]


def compare(reports: Mapping[int, Report], hosts: Sequence[str], timeout_s: float) -> list[str]:
    """The problems that nodes reported, differences between nodes, and missing nodes."""
    came = [report for _, report in sorted(reports.items())]
    everywhere = set.intersection(*(set(report.problems) for report in came)) if len(came) == len(hosts) else set()
    problems = [f"{EVERY_NODE}{problem}" for problem in reports[0].problems if problem in everywhere]
    problems += [f"{report.host}: {each}" for report in came for each in report.problems if each not in everywhere]
    missing = [f"{hosts[rank]} (node {rank})" for rank in range(len(hosts)) if rank not in reports]
    if missing:
        problems.append(
            f"no word from {', '.join(missing)} within {timeout_s:.0f} s; {len(reports)} of {len(hosts)} nodes came. "
            "Look at its log, or leave it out (slurm: --exclude)"
        )
    first = reports[0]
    for rank, report in sorted(reports.items()):
        for name in sorted({*first.versions, *report.versions}):
            here, there = first.versions.get(name), report.versions.get(name)
            if here != there:
                problems.append(f"{report.host} (node {rank}) has {name} {there}, but {first.host} has {here}")
        if abs(report.clock - first.clock) > CLOCK_SKEW_S + timeout_s:
            skew = report.clock - first.clock
            problems.append(f"the clocks of {first.host} and {report.host} differ by {skew:+.0f} s")
    return problems


def _read_line(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(data) > LONGEST_LINE:
            raise ValueError("the connection was closed")
        data += part
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a report")
    return value
