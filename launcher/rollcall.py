"""The roll call before anything is started: do all nodes reach the head node, and are they alike?

Node 0 listens on the address and port that the rendezvous will use. Every other node connects and sends a report: who
it is, its versions, its problems. Node 0 answers all of them with the same list of problems; it is empty if the run may
start. So a wrong address or a missing node is named within seconds, where a rendezvous would hang for minutes.
"""

from __future__ import annotations

import json
import select
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launcher import machine
from simclr_dist.bounded_json import parse_json

CONNECT_TIMEOUT_S = 5.0
CLOCK_SKEW_S = 30.0
MARK_S = 20.0
LONGEST_LINE = 65536
MOST_STRANGERS = 64  # open connections beside those of the nodes
EVERY_NODE = "every node: "
"""Starts the problems that all nodes have."""
MEETING = "rendezvous"
"""In place of an attempt's name, where node 0 gives it only in its answer."""


@dataclass(frozen=True)
class Report:
    """What one node sends. `versions` must be alike on all nodes; `clock`: its time in seconds since 1970."""

    node_rank: int
    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()
    clock: float = 0.0
    mark: str = ""
    """A file that this node has made in the run directory, for node 0 to see that they share it."""


@dataclass(frozen=True)
class Met:
    """What every node knows after a roll call at a rendezvous: the problems; or, without any, the rest.

    hosts: by rank. head_addr: the address by which this node reaches node 0; on node 0, by which the others do.
    """

    problems: list[str]
    attempt: str = ""
    hosts: tuple[str, ...] = ()
    head_addr: str = ""


def listen(address: str, port: int, attempt: str, own: Report, hosts: Sequence[str], timeout_s: float) -> list[str]:
    """On node 0: waits for the other nodes of `hosts`, sends all of them the problems, and returns these."""
    if address not in machine.own_addresses():
        return [
            f"the head address {address} is not an address of the first node {own.host}, which has: "
            + ", ".join(sorted(machine.own_addresses()))
        ]
    server = open_server(address, port, own.host, len(hosts))
    if isinstance(server, str):
        return [server]
    called = _call(server, attempt, own, len(hosts), timeout_s)
    problems = [*called.clashes, *compare(called.reports, hosts, timeout_s)]
    called.tell({"problems": problems})
    return problems


def receive(
    server: socket.socket,
    attempt: str,
    own: Report,
    num_nodes: int,
    timeout_s: float,
    is_here: Callable[[str], bool],
) -> Met:
    """On node 0 of a rendezvous, where nobody knows the others: waits for them, and tells them the attempt's name.

    is_here: whether a node's mark is in this node's run directory.
    """
    called = _call(server, MEETING, own, num_nodes, timeout_s)
    hosts = tuple(called.reports[rank].host if rank in called.reports else "" for rank in range(num_nodes))
    problems = called.clashes or compare(called.reports, hosts, timeout_s)
    deadline = time.monotonic() + MARK_S
    for rank, report in called.reports.items():
        while rank and not problems and not is_here(report.mark):  # a shared disk shows new files after a while
            if time.monotonic() > deadline:
                problems.append(f"{report.host}: its run directory is another one than {own.host}'s; all must share it")
            time.sleep(0.2)
    called.tell({"problems": problems, "attempt": attempt, "hosts": hosts})
    return Met(problems, attempt, hosts, called.own_address)


def join(head: str, port: int, own: Report, timeout_s: float) -> Met:
    """On the other nodes of a rendezvous. head: name or address of node 0; a name may come to be known later."""
    return _report(head, port, MEETING, own, timeout_s)


def open_server(address: str, port: int, host: str, num_nodes: int) -> socket.socket | str:
    """A listening socket on this machine; empty address: on all of its own. Or what is wrong with that."""
    any_kind = not address and socket.has_dualstack_ipv6()
    backlog = num_nodes + MOST_STRANGERS
    family = socket.AF_INET6 if ":" in address or any_kind else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=backlog, dualstack_ipv6=any_kind)
    except OSError as error:
        where = f" on {address}" if address else ""
        return f"port {port}{where} ({host}) cannot be used: {error.strerror}; choose one with --port"


@dataclass
class _Called:
    """Who has reported. clashes: nodes that cannot both be there."""

    reports: dict[int, Report]
    connections: dict[int, socket.socket] = field(default_factory=dict)
    clashes: list[str] = field(default_factory=list)
    clashing: list[socket.socket] = field(default_factory=list)
    own_address: str = ""

    def add(self, report: Report, connection: socket.socket, num_nodes: int) -> None:
        rank = report.node_rank
        if not 0 < rank < num_nodes:
            self.clashes.append(f"{report.host} says that it is node {rank}, but there are {num_nodes} nodes")
            self.clashing.append(connection)
        elif rank in self.connections and _is_open(self.connections[rank]):
            self.clashes.append(f"{self.reports[rank].host} and {report.host} both say that they are node {rank}")
            self.clashing.append(connection)
        else:
            if rank in self.connections:  # it was lost, and the node comes again
                self.connections[rank].close()
            self.reports[rank], self.connections[rank] = report, connection
            self.own_address = connection.getsockname()[0].removeprefix("::ffff:").partition("%")[0]

    def tell(self, answer: Mapping[str, Any]) -> None:
        listening = [*self.connections.values(), *self.clashing]
        for connection in listening:
            connection.settimeout(CONNECT_TIMEOUT_S)
            with suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
        # The other side closes first, so that this port does not linger in TIME_WAIT on the head node.
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        for connection in listening:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            with suppress(OSError):
                connection.recv(1)
            connection.close()


def _call(server: socket.socket, attempt: str, own: Report, num_nodes: int, timeout_s: float) -> _Called:
    """Waits until all nodes have reported, two of them clash, or the time is over.

    Anybody can connect. Nobody is waited for alone: one who sends nothing, or a byte a second, holds up no other.
    """
    called = _Called({own.node_rank: own})
    deadline = time.monotonic() + timeout_s
    callers: dict[socket.socket, _Caller] = {}
    with server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)

        def let_go(connection: socket.socket) -> None:
            selector.unregister(connection)
            del callers[connection]

        while len(called.reports) < num_nodes and not called.clashes and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, 0.5)):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                try:
                    if connection is server:
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ)
                        callers[connection] = _Caller(time.monotonic() + CONNECT_TIMEOUT_S)
                    elif (line := callers[connection].more(connection.recv(4096))) is not None:
                        let_go(connection)
                        called.add(_report_in(line, attempt), connection, num_nodes)
                except BlockingIOError:
                    pass  # it has gone before it was looked at
                except (OSError, ValueError, TypeError, KeyError):
                    # Another program, or a process of an earlier attempt; or no more of them can be open.
                    if connection in callers:
                        let_go(connection)
                    if connection is not server:
                        connection.close()
                if len(called.reports) == num_nodes or called.clashes:
                    break
            overdue = [c for c, caller in callers.items() if caller.until < time.monotonic()]
            for connection in [*overdue, *list(callers)[: max(0, len(callers) - num_nodes - MOST_STRANGERS)]]:
                if connection in callers:
                    let_go(connection)
                    connection.close()
        for connection in list(callers):
            let_go(connection)
            connection.close()
    return called


@dataclass
class _Caller:
    """Somebody who has connected, and has until then to say who it is."""

    until: float
    _said: bytes = b""

    def more(self, part: bytes) -> bytes | None:
        """The line, once it is whole. Raises ValueError where there will be none."""
        self._said += part
        if not part or len(self._said) > LONGEST_LINE:
            raise ValueError("the connection was closed")
        return self._said if self._said.endswith(b"\n") else None


def _report_in(line: bytes, attempt: str) -> Report:
    """Raises ValueError, TypeError or KeyError for what is no report of this attempt."""
    received = _object(line)
    if received.pop("attempt") != attempt:
        raise ValueError("another attempt")
    return _checked(Report(**received))


def _is_open(connection: socket.socket) -> bool:
    if not select.select([connection], [], [], 0)[0]:
        return True  # nothing to read, not even an end
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False


def _checked(report: Report) -> Report:
    """Anybody can connect: raises ValueError where a value is not of its kind."""
    kinds: dict[str, Any] = {"host": str, "versions": dict, "problems": list, "clock": (int, float), "mark": str}
    right = type(report.node_rank) is int  # True and 1.0 would count as node 1
    right &= all(isinstance(getattr(report, name), kind) for name, kind in kinds.items())
    if not right or not all(isinstance(problem, str) for problem in report.problems):
        raise ValueError("not a report")
    return report


def answer(address: str, port: int, attempt: str, own: Report, timeout_s: float) -> list[str]:
    """On the other nodes: reports to node 0 and returns the problems it sends. Tries until `timeout_s` have passed."""
    return _report(address, port, attempt, own, timeout_s).problems


def _report(address: str, port: int, attempt: str, own: Report, timeout_s: float) -> Met:
    deadline, last = time.monotonic() + timeout_s, "not tried"
    message = json.dumps({"attempt": attempt, **own.__dict__}).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(CONNECT_TIMEOUT_S, left)) as connection:
                connection.sendall(message)
                # Node 0 answers when all nodes have reported or its own time is over.
                received = _read_line(connection, time.monotonic() + timeout_s + CONNECT_TIMEOUT_S)
                return Met(
                    [str(problem) for problem in received["problems"]],
                    str(received.get("attempt", "")),
                    tuple(map(str, received.get("hosts", ()))),
                    connection.getpeername()[0].partition("%")[0],
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            last = str(error)
            time.sleep(0.2)
    problem = (
        f"{own.host} cannot reach the head node at {address}:{port} after {timeout_s:.0f} s ({last}); "
        "is there a firewall between the nodes, or is it the wrong interface? Choose another with --head-addr"
    )
    return Met([problem])


def compare(reports: Mapping[int, Report], hosts: Sequence[str], timeout_s: float) -> list[str]:
    """The problems that nodes reported, differences between nodes, and missing nodes."""
    came = [report for _, report in sorted(reports.items())]
    everywhere = set.intersection(*(set(report.problems) for report in came)) if len(came) == len(hosts) else set()
    problems = [f"{EVERY_NODE}{problem}" for problem in reports[0].problems if problem in everywhere]
    problems += [f"{report.host}: {each}" for report in came for each in report.problems if each not in everywhere]
    missing = [
        f"{hosts[rank]} (node {rank})" if hosts[rank] else f"node {rank}"
        for rank in range(len(hosts))
        if rank not in reports
    ]
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


def _read_line(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """Raises OSError at the deadline, however much has come."""
    caller = _Caller(deadline)
    while True:
        connection.settimeout(max(caller.until - time.monotonic(), 0.001))
        line = caller.more(connection.recv(4096))
        if line is not None:
            return _object(line)


def _object(line: bytes) -> dict[str, Any]:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not a report")
    return value
