"""Where this node stands in a training that another scheduler has spread: Kubernetes, PBS, LSF, Flux, MPI, by hand.

`read_place` is a function of the environment, some files, and what the command line says. Each variable that is read
has a row here. The command line wins. Sources that contradict each other and readings that are not certain are refused.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher import machine
from launcher.errors import LaunchError
from launcher.launch_plan import checked

RANK, NODES, HEAD, PORT = "node rank", "number of nodes", "head node", "port"
OPTIONS = {RANK: "--node-rank R", NODES: "--nodes N", HEAD: "--rendezvous HOST:PORT"}
ONCE = "Start `python -m launcher node` once on each node: it starts the node's processes itself"


@dataclass(frozen=True)
class Place:
    """head: name or address of node 0. job: the scheduler's name of the job, empty where there is none.

    said: for the person who looks at the log: what was read from where, and what is set and not used.
    """

    node_rank: int
    num_nodes: int
    head: str
    port: int
    job: str = ""
    said: Sequence[str] = ()


@dataclass
class _Claims:
    """What the sources say, by kind: {value: the sources that say so}."""

    found: dict[str, dict[str | int, list[str]]] = field(default_factory=dict)

    def add(self, kind: str, value: str | int, source: str) -> None:
        self.found.setdefault(kind, {}).setdefault(value, []).append(source)

    def one(self, kind: str) -> str | int | None:
        values = self.found.get(kind, {})
        if len(values) > 1:
            sides = "; ".join(f"{value} ({', '.join(sources)})" for value, sources in values.items())
            raise LaunchError(
                f"the {kind} is not certain: {sides}. Say it: {OPTIONS.get(kind, '--rendezvous HOST:PORT')}"
            )
        return next(iter(values), None)

    def sources(self, kind: str) -> str:
        return ", ".join(source for sources in self.found.get(kind, {}).values() for source in sources)


def split_address(text: str) -> tuple[str, int | None]:
    """HOST, HOST:PORT, [IPV6]:PORT or IPV6 as host and port. Raises LaunchError."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(\d{1,5}))?|([^:\[\]]+)(?::(\d{1,5}))?", text)
    if match:
        host, port = match[1] or match[3], match[2] or match[4]
    elif machine.is_ip(text):
        host, port = text, None
    else:
        raise LaunchError(f"{text!r}: expected HOST:PORT, or [IPV6]:PORT")
    return checked("address", host), int(port) if port else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows: names of variables, and what they mean

NAMED: tuple[tuple[str, str], ...] = (
    ("PET_NODE_RANK", RANK),  # torchrun's own options: Kubeflow's Trainer and PyTorchJob set them
    ("PET_NNODES", NODES),
    ("PET_MASTER_ADDR", HEAD),
    ("PET_MASTER_PORT", PORT),
    ("NODE_RANK", RANK),
    ("GROUP_RANK", RANK),
    ("NNODES", NODES),
    ("NUM_NODES", NODES),
    ("GROUP_WORLD_SIZE", NODES),
    ("MASTER_ADDR", HEAD),
    ("MASTER_PORT", PORT),
    ("JOB_COMPLETION_INDEX", RANK),  # an indexed Job of Kubernetes
)
TASKS: tuple[tuple[str, str, str, str, str], ...] = (
    # who starts tasks, this task, all tasks, tasks on this node: where the last says 1, a task is a node
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "--map-by ppr:1:node"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "-ppn 1"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "-ppn 1"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE", "--ppn 1"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_SIZE", "-r 1"),
)
JOBS = ("PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "SLURM_JOB_ID")


def _named(environ: Mapping[str, str], claims: _Claims) -> Iterator[str]:
    for name, kind in NAMED:
        value = environ.get(name, "").strip()
        if not value:
            continue
        if kind == HEAD:
            claims.add(kind, checked("address", value), f"{name}={value}")
        elif match := re.fullmatch(r"(\d+)(?::\1)?", value):
            claims.add(kind, int(match[1]), f"{name}={value}")
        elif name == "PET_NNODES" and re.fullmatch(r"\d+:\d+", value):
            yield f"PET_NNODES={value}: the number of nodes does not change while it trains; not used"
        else:
            raise LaunchError(f"{name}={value} is not a whole number")
    endpoint = environ.get("PET_RDZV_ENDPOINT", "").strip()
    if endpoint and HEAD not in claims.found:
        host, port = split_address(endpoint)
        claims.add(HEAD, host, f"PET_RDZV_ENDPOINT={endpoint}")
        if port is not None and PORT not in claims.found:
            claims.add(PORT, port, f"PET_RDZV_ENDPOINT={endpoint}")


def _tasks(environ: Mapping[str, str], claims: _Claims) -> None:
    """Starters of tasks. One task on each node is a node; more would be several launchers on one node."""
    for who, rank, size, local_size, option in TASKS:
        if all(environ.get(name, "").isdecimal() for name in (rank, size, local_size)) and int(environ[size]) > 1:
            if environ[local_size] != "1":
                raise LaunchError(f"{local_size}={environ[local_size]}: {who} starts several here. {ONCE} ({option})")
            claims.add(RANK, int(environ[rank]), f"{rank}={environ[rank]}")
            claims.add(NODES, int(environ[size]), f"{size}={environ[size]}")
    tasks, nodes = environ.get("FLUX_JOB_SIZE", ""), environ.get("FLUX_JOB_NNODES", "")
    if tasks.isdecimal() and nodes.isdecimal() and "FLUX_TASK_RANK" in environ:
        if tasks != nodes:
            raise LaunchError(
                f"FLUX_JOB_SIZE={tasks} tasks on FLUX_JOB_NNODES={nodes} nodes. {ONCE} (-N {nodes} -n {nodes})"
            )
        claims.add(RANK, int(environ["FLUX_TASK_RANK"]), f"FLUX_TASK_RANK={environ['FLUX_TASK_RANK']}")
        claims.add(NODES, int(nodes), f"FLUX_JOB_NNODES={nodes}")
    if "SLURM_STEP_ID" in environ and environ.get("SLURM_NODEID", "").isdecimal():
        nodes = environ.get("SLURM_STEP_NUM_NODES", "")
        if nodes.isdecimal() and environ.get("SLURM_STEP_NUM_TASKS", nodes) != nodes:
            tasks = environ["SLURM_STEP_NUM_TASKS"]
            raise LaunchError(f"SLURM_STEP_NUM_TASKS={tasks} on {nodes} nodes. {ONCE} (--ntasks-per-node=1)")
        claims.add(RANK, int(environ["SLURM_NODEID"]), f"SLURM_NODEID={environ['SLURM_NODEID']}")
        if nodes.isdecimal():
            claims.add(NODES, int(nodes), f"SLURM_STEP_NUM_NODES={nodes}")


def _hosts(environ: Mapping[str, str], read: Callable[[str], str | None]) -> tuple[list[str], str]:
    """The hosts of a PBS or LSF job, and the variable that tells them."""
    for name in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        if path := environ.get(name):
            text = read(path)
            if text is not None:
                return list(dict.fromkeys(text.split())), f"{name}={path}"
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    if words:
        return list(dict.fromkeys(words[::2])), "LSB_MCPU_HOSTS"  # host and its number of CPUs, by turns
    return list(dict.fromkeys(environ.get("LSB_HOSTS", "").split())), "LSB_HOSTS"


def _from_hosts(hosts: list[str], source: str, own_names: Sequence[str], claims: _Claims) -> Iterator[str]:
    own = {name.partition(".")[0] for name in own_names}
    places = [index for index, host in enumerate(hosts) if host in own_names or host.partition(".")[0] in own]
    if len(places) != 1 and RANK not in claims.found:
        yield f"{source}: {'several of its hosts are' if places else 'none of its hosts is'} this one ({own_names[0]})"
        return
    if places and RANK not in claims.found:
        claims.add(RANK, places[0], f"{own_names[0]} in {source}")
    if NODES not in claims.found:
        claims.add(NODES, len(hosts), f"hosts in {source}")
    if HEAD not in claims.found:
        claims.add(HEAD, checked("address", hosts[0]), f"first in {source}")


# ---------------------------------------------------------------------------------------------------------------------


def read_place(
    environ: Mapping[str, str],
    own_names: Sequence[str],
    procs: int,
    *,
    rendezvous: str | None = None,
    node_rank: int | None = None,
    num_nodes: int | None = None,
    read: Callable[[str], str | None] = lambda path: _read(Path(path)),
) -> Place:
    """own_names: of this machine. procs: processes that this node starts. The rest is what the command line says.

    Raises LaunchError where something is missing, contradictory or ambiguous; it names the option to give.
    """
    _refuse_ranks(environ)
    claims, given = _Claims(), _Claims()
    said = list(_named(environ, claims))
    _tasks(environ, claims)
    hosts, source = _hosts(environ, read)
    if hosts:
        said += _from_hosts(hosts, source, own_names, claims)
    if rendezvous is not None:
        host, port = split_address(rendezvous)
        given.add(HEAD, host, f"--rendezvous {rendezvous}")
        if port is not None:
            given.add(PORT, port, f"--rendezvous {rendezvous}")
    if node_rank is not None:
        given.add(RANK, node_rank, f"--node-rank {node_rank}")
    if num_nodes is not None:
        given.add(NODES, num_nodes, f"--nodes {num_nodes}")
    known = (given if NODES in given.found else claims).one(NODES)
    said += _rank_and_world_size(environ, procs, known, claims)

    values: dict[str, str | int | None] = {}
    used = []
    for kind in (RANK, NODES, HEAD, PORT):
        side = given if kind in given.found else claims
        values[kind] = side.one(kind)
        used += [f"{kind} {values[kind]} ({side.sources(kind)})"] if values[kind] is not None else []
        if kind in given.found and claims.sources(kind):
            said.append(f"not used: {claims.sources(kind)}; the command line says {kind} {values[kind]}")
    nodes = int(values[NODES] or 0)
    if nodes == 1:  # alone there is nothing to find
        values |= {RANK: values[RANK] or 0, HEAD: values[HEAD] or "127.0.0.1"}
    if missing := [f"the {kind}: give {OPTIONS[kind]}" for kind in OPTIONS if values[kind] is None]:
        notes = "".join(f"\n  - {sentence}" for sentence in said)
        raise LaunchError(f"nothing here says {'; '.join(missing)}{notes}")
    rank = int(values[RANK] or 0)
    if nodes < 1 or not 0 <= rank < nodes:
        raise LaunchError(f"node rank {rank} of {nodes} nodes: {'; '.join(used)}. Ranks are 0 to {max(nodes - 1, 0)}")
    job = next((environ[name] for name in JOBS if environ.get(name)), "")
    port = int(values[PORT] or 0) or _port_of(job)
    return Place(rank, nodes, str(values[HEAD]), port, job, (f"read {', '.join(used)}", *said))


def refuse_to_be_alone(environ: Mapping[str, str]) -> None:
    """For a backend that trains on this machine only: LaunchError where something has started it on several."""
    claims = _Claims()
    list(_named(environ, claims))
    _tasks(environ, claims)
    if HEAD in claims.found:
        list(_rank_and_world_size(environ, 1, claims.one(NODES), claims))
    if RANK in claims.found and int(claims.one(NODES) or 1) > 1:
        sources = f"{claims.sources(RANK)}, {claims.sources(NODES)}"
        raise LaunchError(
            f"this is one of several: {sources}. Each would be a training of its own; `python -m launcher node CONFIG` "
            "makes them one. To train alone, unset these variables"
        )


def _refuse_ranks(environ: Mapping[str, str]) -> None:
    """Another launcher has started this process as one of several on this node."""
    several = environ.get("LOCAL_WORLD_SIZE", "1") != "1" or environ.get("LOCAL_RANK", "0") != "0"
    if several or "TORCHELASTIC_RUN_ID" in environ:
        names = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID") if name in environ]
        found = ", ".join(f"{name}={environ[name]}" for name in names)
        raise LaunchError(f"torchrun or another launcher has started this process as one of several ({found}). {ONCE}")


def _rank_and_world_size(
    environ: Mapping[str, str], procs: int, nodes: str | int | None, claims: _Claims
) -> Iterator[str]:
    """RANK and WORLD_SIZE count nodes or processes. Here they are believed where they can only be nodes."""
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if not size.isdecimal():
        return
    both = f"RANK={rank}, WORLD_SIZE={size}" if rank else f"WORLD_SIZE={size}"
    if nodes is None and procs > 1 and int(size) % procs == 0:
        yield f"{both} may count nodes, or processes ({procs} on each node)"
        return
    if nodes is None:
        claims.add(NODES, int(size), f"WORLD_SIZE={size}, read as nodes")
        nodes = int(size)
    if RANK not in claims.found and rank.isdecimal() and int(size) == nodes:
        claims.add(RANK, int(rank), f"RANK={rank}")
    elif f"WORLD_SIZE={size}" not in claims.sources(NODES):
        yield f"not used: {both}"


def _port_of(job: str) -> int:
    """A port on which all nodes of a job agree without a word."""
    return machine.FIRST_PORT + zlib.crc32(job.encode()) % machine.NUM_PORTS


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
