"""The launch plan of one attempt: everything that the nodes must agree on, in a file that only its owner can write."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from launcher.errors import LaunchError
from simclr_dist.bounded_json import MOST_BYTES, parse_json
from simclr_dist.run.layout import RunDir
from simclr_dist.safe_text import looks_secret, masked

Backend = Literal["local", "slurm", "hosts", "rendezvous"]
Device = Literal["cpu", "cuda"]

TRAINER = "simclr_dist.train"
STOP_SIGNALS = ("USR1", "USR2")  # NCCL may use USR1 itself on some systems, hence the choice

# What a field may hold. Nothing that matches can start a new line, an option or a shell word.
PATTERNS = {
    "attempt": r"[A-Za-z0-9_]{1,32}\.\d{1,6}-[0-9a-f]{6}",
    "job name": r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    "host": r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|[0-9A-Fa-f:]{2,45}(%[A-Za-z0-9._-]{1,32})?",
    "user": r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}",
    "address": r"[A-Za-z0-9:][A-Za-z0-9.:%_-]{0,252}",
    "interface": r"[A-Za-z0-9][A-Za-z0-9._@-]{0,31}",
    "environment variable": r"[A-Za-z_][A-Za-z0-9_]{0,127}",
}
# Variables by which the launcher and torch talk to their processes: set from outside they would break the rendezvous.
_RESERVED = re.compile(
    r"SIMCLR_(EXPECTED_WORLD_SIZE|ATTEMPT|STOP_SIGNAL|CHECKED|OUTPUT|NODE_SCRIPT)"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|NODE_RANK"
    r"|MASTER_(ADDR|PORT)|PET_.*|TORCHELASTIC_.*|ACCELERATE_.*|PMIX?_.*|OMPI_.*|MV2_.*"
    r"|SLURM_STEP_NUM_TASKS|FLUX_JOB_SIZE|JSM_NAMESPACE_SIZE"
)


def checked(kind: str, value: str) -> str:
    """`value`, if it has the form of a `kind` (see PATTERNS); otherwise LaunchError."""
    if not re.fullmatch(PATTERNS[kind], value):
        raise LaunchError(f"{kind} {value!r} cannot be used: it must match {PATTERNS[kind]}")
    return value


def one_line(what: str, value: str) -> str:
    """`value`, if it has no control characters (newlines, terminal escapes) and is not empty; otherwise LaunchError."""
    if not value or not value.isprintable():
        raise LaunchError(f"{what} {value!r} cannot be used: it is empty or has control characters")
    return value


def shell_text(command: str) -> str:
    """`command`, if it is text: a set-up line may have several lines, but no terminal escapes."""
    for line in command.split("\n"):
        if not line.replace("\t", " ").isprintable():
            raise LaunchError(f"set-up line {line!r} cannot be used: it has control characters")
    for name, value in re.findall(r"(?<!\w)([A-Za-z_]\w*)=([^\s;&|]+)", command):
        # What the line reads from elsewhere when it runs stands in no file.
        if re.search(r"[$`]", value) is None and looks_secret(name, value):
            raise LaunchError(
                f"set-up line: {name} looks like a secret, and set-up lines are shown to all users of the cluster; "
                f"keep it in a file that only you can read: {name}=$(cat FILE)"
            )
    return command


def is_reserved(name: str) -> bool:
    return re.fullmatch(_RESERVED, name) is not None


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's variables without the reserved ones: PMI_SIZE and the like, too, which accelerate would follow."""
    return {name: value for name, value in environ.items() if not is_reserved(name)}


def checked_env(settings: list[str]) -> dict[str, str]:
    """`NAME=value` settings as a dictionary. Secrets are refused: the launch plan is a file and can be shown."""
    env = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        checked("environment variable", name)
        if not equals:
            raise LaunchError(f"--env {setting}: expected NAME=value")
        if is_reserved(name):
            raise LaunchError(f"--env {name}: the launcher sets this variable itself")
        if looks_secret(name, value):
            raise LaunchError(
                f"--env {name}: looks like a secret, and launch plans are written to disk; "
                "keep it in a file that only you can read"
            )
        env[name] = one_line(f"--env {name}", value) if value else ""
    return env


# resume_argv has this key in plan.json, so that all versions of the launcher read each other's files.
_FILE_KEYS = {"resume_argv": "again"}


@dataclass(frozen=True)
class LaunchPlan:
    """All paths absolute. `head_addr` is empty and `port` 0 while they can only be known on the machine itself."""

    backend: Backend
    attempt: str
    """JOB.RESTART-NONCE, the name of this attempt in records and in temporary names of checkpoints."""
    run_dir: str
    workdir: str
    """Where relative paths of the configuration start."""
    python: str
    command: tuple[str, ...]
    """What each process runs, after the interpreter: -m simclr_dist.train CONFIG key=value …"""
    resume_argv: tuple[str, ...]
    """Arguments of `python -m launcher` that continue this run."""
    device: Device
    num_nodes: int
    procs_per_node: int
    hosts: tuple[str, ...] = ()
    """Names of the nodes, by rank, where they are known."""
    head_addr: str = ""
    port: int = 0
    ifname: str = ""
    """Network interface; empty: the one that leads to head_addr, found on each node."""
    env: Mapping[str, str] = None  # type: ignore[assignment]
    stop_signal: str = "USR1"
    max_failures: int = 3
    requeue: bool = True
    save_budget_s: float = 60.0
    """How long an agent that was asked to end waits for its workers before it kills them."""
    preflight_s: float = 60.0
    """How long node 0 waits for the others to report."""
    rendezvous_s: float = 120.0
    code: str = ""
    """The folder of the program that was kept for the job (snapshot.py); empty: the one that is installed."""
    setup: tuple[str, ...] = ()
    """Shell commands that each node runs before Python."""
    container: str = ""
    """apptainer:FILE or pyxis:IMAGE"""
    binds: tuple[str, ...] = ()
    """FOLDER:INSIDE of the container"""
    node_python: str = ""
    """The interpreter on the nodes; empty: `python`, in a container python3."""
    shared: bool = False
    """Whether the nodes may run other jobs, too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "env", dict(self.env or {}))
        for name in ("command", "resume_argv", "hosts", "setup", "binds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        checked("attempt", self.attempt)
        for host in self.hosts:
            checked("host", host)
        for name in ("run_dir", "workdir", "python", *(["code"] if self.code else [])):
            path = one_line(name, getattr(self, name))
            if not Path(path).is_absolute():
                raise LaunchError(f"launch plan: {name} {path!r} is not an absolute path")
        for word in (*self.command, *self.resume_argv, *self.binds, self.container or "-", self.node_python or "-"):
            one_line("argument", word)
        for command in self.setup:
            shell_text(command)
        if self.head_addr:
            checked("address", self.head_addr)
        if self.ifname:
            checked("interface", self.ifname)
        if self.stop_signal not in STOP_SIGNALS:
            raise LaunchError(f"stop signal {self.stop_signal!r}: choose {' or '.join(STOP_SIGNALS)}")
        if self.num_nodes < 1 or self.procs_per_node < 1:
            raise LaunchError(f"{self.num_nodes} nodes x {self.procs_per_node} processes: both must be at least 1")
        if not (self.port == 0 or 1024 <= self.port <= 65535):
            raise LaunchError(f"port {self.port}: choose one between 1024 and 65535")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.procs_per_node

    @property
    def python_on_nodes(self) -> str:
        """A path or a name; the same that started the launcher, unless another was chosen."""
        return self.node_python or ("python3" if self.container else self.python)

    @property
    def files(self) -> RunDir:
        return RunDir(Path(self.run_dir))

    @property
    def path(self) -> Path:
        return self.files.launch_plan

    @property
    def job(self) -> str:
        """The SLURM job, or one call of the launcher: the same in all its attempts."""
        return job_of(self.attempt)

    def as_json(self) -> dict[str, Any]:
        """For display, with secrets hidden."""
        return self._fields() | {"env": masked(self.env)}

    def _fields(self) -> dict[str, Any]:
        return {_FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}


def new_attempt(job: str, restart: int) -> str:
    return f"{job}.{restart}-{secrets.token_hex(3)}"


def job_of(attempt: str) -> str:
    """JOB of an attempt's name JOB.RESTART-NONCE."""
    return attempt.partition(".")[0]


def restart_of(attempt: str) -> int:
    """RESTART of an attempt's name JOB.RESTART-NONCE."""
    return int(attempt.rpartition(".")[2].partition("-")[0])


def prepare_run_dir(run_dir: Path) -> None:
    """Make the run directory, closed to all but the owner and their group. Raises LaunchError if it is not writable."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise LaunchError(f"{run_dir}: the run directory cannot be made: {error.strerror}") from None
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise LaunchError(f"{run_dir}: the run directory cannot be written to; choose another: runs_dir=… or name=…")


def write_launch_plan(plan: LaunchPlan) -> Path:
    """Write RUN/plan.json, readable by its owner only. The file appears complete or not at all."""
    prepare_run_dir(Path(plan.run_dir))
    temporary = plan.path.with_name(f".{plan.path.name}.{plan.attempt}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(plan._fields(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(plan.path)
    return plan.path


def refuse_foreign(path: Path, status: os.stat_result) -> None:
    """LaunchError unless this user alone can have written the file at `path`, because its commands will be run."""
    if not stat.S_ISREG(status.st_mode):
        raise LaunchError(f"{path}: not a plain file")
    if status.st_uid != os.geteuid():
        raise LaunchError(f"{path}: belongs to user {status.st_uid}, not to you ({os.geteuid()}); refused")
    if status.st_mode & 0o022:
        raise LaunchError(
            f"{path}: others may write to it (mode {stat.S_IMODE(status.st_mode):o}); refused. "
            "If you trust its content: chmod go-w on it"
        )


def read_launch_plan(path: Path) -> LaunchPlan:
    """The launch plan at `path`. LaunchError where it cannot be read, or another user could have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise LaunchError(f"{path}: the launch plan cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, encoding="utf-8") as file:
        refuse_foreign(path, os.fstat(file.fileno()))
        try:
            values = parse_json(file.read(MOST_BYTES + 1))
            names = {_FILE_KEYS.get(field.name, field.name): field.name for field in fields(LaunchPlan)}
            if unknown := values.keys() - names.keys():
                raise ValueError(f"unknown entries {sorted(unknown)}")
            return LaunchPlan(**{names[key]: value for key, value in values.items()})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LaunchError(f"{path}: not a launch plan of this version of the launcher: {error}") from None
