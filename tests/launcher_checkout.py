"""A small checkout with the real launcher, whose trainer is `fake_trainer.py`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.processes import die_with_this_process

REPOSITORY = Path(__file__).resolve().parent.parent
NEEDED_BY_THE_LAUNCHER = (
    *("config", "parallel", "run"),
    *("__init__.py", "argument_types.py", "atomic.py", "errors.py", "safe_text.py", "streams.py"),
)
"""Of simclr_dist. Without the rest, a launcher that imports more of it fails in every test."""
CONFIG = """\
name: fake
data: {train: synthetic, image_size: 32}
model: {encoder: resnet_small}
train: {global_batch_size: 8, epochs: 20}
"""
FAKE_PREFLIGHT = """\
class check_training:
    def __init__(self, config):
        pass
    def to_environment(self):
        pass
"""


def clean_environment() -> dict[str, str]:
    """This process's environment, without variables of a SLURM job, a test run or a launcher around it."""
    foreign = ("SLURM_", "SBATCH_", "SRUN_", "SIMCLR_", "PYTHONPATH", "PYTEST_", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


@dataclass
class Checkout:
    root: Path
    env: dict[str, str]

    @property
    def run_dir(self) -> Path:
        return self.root / "runs" / "fake"

    def behave(self, **behaviour: Any) -> None:
        (self.root / "fake.json").write_text(json.dumps(behaviour))

    def launch(
        self, *words: str, timeout_s: float = 90, env: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=self.root,
            env={**self.env, **env},
            text=True,
            capture_output=True,
            timeout=timeout_s,
        )

    def start(
        self, *words: str, env: Mapping[str, str] = {}, log: str = "launcher.log", enter: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """enter: the command that leads to another node."""
        with (self.root / log).open("w") as file:
            return subprocess.Popen(
                [*enter, sys.executable, "-m", "launcher", *words],
                cwd=self.root,
                env={**self.env, **env},
                stdout=file,
                stderr=file,
                text=True,
                preexec_fn=die_with_this_process(),
            )

    def log(self, name: str = "launcher.log") -> str:
        return (self.root / name).read_text()

    def ranks(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        """What each worker saw, over all attempts."""
        return [json.loads(path.read_text()) for path in sorted(((run_dir or self.run_dir) / "ranks").glob("*.json"))]

    def status(self) -> dict[str, Any]:
        path = self.run_dir / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def records(self, event: str, run_dir: Path | None = None) -> list[dict[str, Any]]:
        path = (run_dir or self.run_dir) / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def newest_step(self, run_dir: Path | None = None) -> int:
        folders = ((run_dir or self.run_dir) / "checkpoints").glob("step_*")
        return max((int(path.name[5:]) for path in folders if path.name[5:].isdigit()), default=0)

    def pids_alive(self) -> list[int]:
        return [rank["pid"] for rank in self.ranks() if is_running(rank["pid"])]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def make_checkout(root: Path) -> Checkout:
    root.mkdir(parents=True)
    (root / "simclr_dist").mkdir()
    for name in ("launcher", "slurm", *(f"simclr_dist/{name}" for name in NEEDED_BY_THE_LAUNCHER)):
        copy_from_repository(name, root)
    shutil.copy(REPOSITORY / "tests" / "fake_trainer.py", root / "simclr_dist" / "train.py")
    (root / "simclr_dist" / "training").mkdir()
    for name in ("__init__.py", "agent.py"):
        copy_from_repository(f"simclr_dist/training/{name}", root)
    (root / "simclr_dist" / "training" / "preflight.py").write_text(FAKE_PREFLIGHT)
    (root / "fake.yaml").write_text(CONFIG)
    return Checkout(root, clean_environment())


def make_real_checkout(root: Path) -> Checkout:
    """With the real trainer and its configurations."""
    checkout = make_checkout(root)
    shutil.rmtree(root / "simclr_dist")
    for name in ("simclr_dist", "configs"):
        copy_from_repository(name, root)
    return checkout


def copy_from_repository(name: str, root: Path) -> None:
    source = REPOSITORY / name
    if source.is_dir():
        shutil.copytree(source, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, root / name)


# Acts like ssh -tt: a shell runs the words on the host, and gets SIGHUP when the connection ends.
FAKE_SSH = """\
import json, os, signal, subprocess, sys
options, host, words = sys.argv[1:-2], sys.argv[-2], sys.argv[-1]
assert options == ["-tt", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30", "--"], options
if host == "unreachable":
    sys.exit(f"ssh: connect to host {host} port 22: Connection refused")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup here has no effect there
enter = json.loads(open(sys.path[0] + "/fake_ssh.json").read()).get(host, [])
env = os.environ | {"HOST": host}
remote = subprocess.Popen([*enter, "/bin/sh", "-c", f"exec {words}"], cwd="/", env=env, start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(remote.pid, signal.SIGHUP))
sys.exit(remote.wait())
"""


def write_fake_ssh(checkout: Checkout, enter: Mapping[str, list[str]] = {}) -> str:
    """The --ssh-cmd of the fake ssh. enter: for hosts that are not this machine, the command that leads there."""
    (checkout.root / "fake_ssh.py").write_text(FAKE_SSH)
    (checkout.root / "fake_ssh.json").write_text(json.dumps(enter))
    return shlex.join([sys.executable, str(checkout.root / "fake_ssh.py")])


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.05)
    return value
