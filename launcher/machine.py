"""What this machine has: GPUs, CPUs, addresses, a free port. Without torch; only `resolve` asks the name service."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from launcher import gpus
from launcher.errors import Exit, LaunchError

FIRST_PORT, NUM_PORTS = 20000, 10000  # below Linux's ephemeral range (32768 and up)


def num_gpus() -> int:
    """The number of GPUs that processes started here can use, one each; gpus.here() also says how it is known."""
    return gpus.here().usable


def num_cpus() -> int:
    """CPUs this process may use (an allocation is often smaller than the machine)."""
    return len(os.sched_getaffinity(0))


def port_is_free(address: str, port: int) -> bool:
    try:
        with socket.create_server((address, port), family=_family(address)):
            return True
    except OSError as error:
        # An address of another machine (inside salloc) cannot be tried here; node 0 will try it.
        return error.errno == errno.EADDRNOTAVAIL


def free_port(address: str, start: int) -> int:
    """The first free port at or after `start` (wrapping inside 20000–29999) on an address of this machine.

    Attempts use different `start`s, so that a process left over from the last attempt cannot connect to this one.
    """
    for offset in range(100):
        port = FIRST_PORT + (start + offset) % NUM_PORTS
        if port_is_free(address, port):
            return port
    raise LaunchError(f"no free port among 100 tried on {address}; choose one with --port", Exit.PREFLIGHT)


def resolve(name: str) -> str:
    """`name` as an IP address (IPv4 first). OSError where it cannot be resolved."""
    if is_ip(name):
        return name
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    return is_ip(address) and ipaddress.ip_address(address).is_loopback


def own_addresses() -> dict[str, str]:
    """{address: interface} of this machine."""
    import psutil  # type: ignore[import-untyped]

    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def interface_towards(address: str) -> str:
    """The interface whose address the kernel would use as source towards `address`. No packet is sent.

    (`ip route get` would answer `lo` for this machine's own addresses.)
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise LaunchError(
                f"no route from {socket.gethostname()} to the head node {address}: {error.strerror}; "
                "choose a reachable one with --head-addr",
                Exit.PREFLIGHT,
            ) from None
        source = probe.getsockname()[0]
    name = own_addresses().get(source.partition("%")[0])
    if name is None:
        raise LaunchError(f"no interface has the address {source}; name one with --ifname", Exit.PREFLIGHT)
    return name


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_virtual(interface: str) -> bool:
    """Whether it is a bridge or tunnel of containers and virtual machines, which does not lead to other nodes."""
    return interface.startswith(("lo", "docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "tun", "tap"))


def is_public(address: str) -> bool:
    return is_ip(address) and ipaddress.ip_address(address).is_global
