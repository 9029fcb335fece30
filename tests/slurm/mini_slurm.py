"""A real SLURM cluster for tests, with munge, controller and node daemons of its own, all in one temporary folder.

Needs the programs of Debian's slurm-wlm and munge, but neither root nor anything in /etc. All nodes are this machine;
nothing is enforced (no cgroups), so CPUs and GPUs are numbers only.

Nothing of a cluster stays behind, even if pytest is killed: a guard (this file as a program) waits on a pipe from
pytest. When the pipe closes, it kills every process of the cluster and removes the folder. The kernel's
PR_SET_PDEATHSIG cannot do this, because slurmd detaches the daemons that run the steps of jobs (slurmstepd).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.launcher_checkout import REPOSITORY, clean_environment

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
FirstJobId={first_job}
JobRequeue=1
KillWait=30
SlurmdTimeout=10
SlurmctldTimeout=10
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
"""
PREEMPTION = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def program(name: str) -> str | None:
    return shutil.which(name, path=SEARCH_PATH)


def why_not() -> str | None:
    """None where a cluster can be started; otherwise what is missing."""
    missing = [name for name in PROGRAMS if not program(name)]
    return f"no SLURM here: {', '.join(missing)} missing (as root: bash tools/install_slurm.sh)" if missing else None


class MiniSlurm:
    def __init__(self, num_nodes: int = 2, cpus: int | Sequence[int] = 4, gpus: int = 0, extra: str = "") -> None:
        """cpus: of all nodes, or of each. gpus: of each node, of a type called `fast`."""
        self.num_nodes, self.gpus, self.extra = num_nodes, gpus, extra
        self.cpus = [cpus] * num_nodes if isinstance(cpus, int) else list(cpus)
        # Not pytest's tmp_path: the path of munge's socket may have 107 characters at most.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = clean_environment() | {"SLURM_CONF": str(config_file(self.root))}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> MiniSlurm:
        guard = [sys.executable, "-m", "tests.slurm.mini_slurm", str(self.root)]
        self.guard = subprocess.Popen(guard, cwd=REPOSITORY, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # -- the cluster --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.root.chmod(0o755)
        for name in ("log", "state", "munge", *(f"spool-n{i}" for i in self.node_numbers())):
            (self.root / name).mkdir()
        munge = self.root / "munge"
        munge.chmod(0o711)
        with open(os.open(munge / "key", os.O_CREAT | os.O_WRONLY, 0o400), "wb") as key:
            key.write(os.urandom(128))
        ports = free_ports(self.num_nodes + 1)
        host = socket.gethostname().partition(".")[0]
        # Jobs derive their ports from their numbers: two clusters on one machine should number jobs differently.
        first_job = 1 + secrets.randbelow(900)
        names = {"host": host, "user": getpass.getuser(), "first_job": first_job}
        lines = [CONFIG.format(root=self.root, ctld_port=ports[0], **names)]
        gres = ""
        if self.gpus:
            devices = ["/dev/zero", "/dev/null", "/dev/full", "/dev/random"][: self.gpus]
            (self.root / "gres.conf").write_text(
                f"NodeName=n[1-{self.num_nodes}] Name=gpu Type=fast File={','.join(devices)}\n"
            )
            lines.append("GresTypes=gpu\n")
            gres = f" Gres=gpu:fast:{self.gpus}"
        for i in self.node_numbers():
            lines.append(
                f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs={self.cpus[i - 1]} "
                f"RealMemory=1000{gres} State=UNKNOWN\n"
            )
        lines += [f"PartitionName=main Nodes=n[1-{self.num_nodes}] Default=YES MaxTime=INFINITE State=UP\n", self.extra]
        config_file(self.root).write_text("".join(lines))
        self._daemon(
            *("munged", "munged", "-F", "--force", f"--key-file={munge}/key", f"--socket={munge}/sock"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self.wait((munge / "sock").exists, 30, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
        for i in self.node_numbers():
            self.start_node(i)
        self.wait(self.all_idle, 30, "idle nodes")

    def node_numbers(self) -> range:
        return range(1, self.num_nodes + 1)

    def all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%T").stdout.split()
        return states == ["idle"] * self.num_nodes

    def all_sent(self) -> bool:
        """Whether the controller has no message left. What a lost node did not take is sent again after a minute,
        and so a signal to a step can reach that of the job's next attempt, which has the same number."""
        queued = re.search(r"Agent queue size:\s*(\d+)", self.run("sdiag", check=True).stdout)
        assert queued
        return queued[1] == "0"

    def no_steps(self) -> bool:
        """Whether all daemons of steps have ended. On a node that returns, that of a lost step still ends its tasks,
        and those of a new step that has the same number."""
        names = []
        for pid in processes_of(self.root):
            with contextlib.suppress(OSError):
                names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return "slurmstepd" not in names

    def _daemon(self, name: str, *argv: str) -> None:
        executable = program(argv[0])
        assert executable
        with open(self.root / "log" / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [executable, *argv[1:]],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_node(self, number: int) -> None:
        self._daemon(f"slurmd-n{number}", "slurmd", "-D", "-N", f"n{number}", "-f", self.env["SLURM_CONF"])

    def kill_node(self, number: int) -> None:
        """The node's daemon is gone; what it started runs on, as on a node that lost its network."""
        daemon = self.daemons[f"slurmd-n{number}"]
        daemon.kill()
        daemon.wait()

    def lose_node(self, number: int) -> None:
        """The node is gone with everything on it, as when its power fails."""
        self.kill_node(number)
        mark, log = f"SLURMD_NODENAME=n{number}".encode(), str(self.root / "log" / f"slurmd-n{number}.log")
        daemons, tasks = [], []
        for pid in processes_of(self.root):
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    tasks.append(pid)
                elif log in {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}:
                    daemons.append(pid)
        for pid in [*daemons, *tasks]:  # the steps' daemons first: they would report their tasks' end
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reset(self) -> None:
        """For a cluster that several tests share: ends all jobs of the last test."""
        self.run("scancel", "-u", getpass.getuser())
        self.wait(lambda: not self.run("squeue", "--noheader").stdout.strip(), 60, "an empty queue")
        self.wait(self.all_idle, 30, "idle nodes")

    def stop(self) -> None:
        self.guard.communicate()
        for daemon in self.daemons.values():
            daemon.wait()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def run(self, *argv: str, cwd: Path | None = None, check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=self.env, text=True, capture_output=True, timeout=60, cwd=cwd, check=check)

    def submit(self, *argv: str, cwd: Path) -> str:
        done = self.run("sbatch", "--parsable", *argv, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        out = self.run("scontrol", "-o", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", out))

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "")

    # Asks again and again: `sbatch --wait` answers up to ten seconds late.
    def wait_state(self, job: str, states: Sequence[str], timeout_s: float = 60) -> str:
        self.wait(lambda: self.state(job) in states, timeout_s, f"job {job} {'/'.join(states)}", lambda: self.job(job))
        return self.state(job)

    def release(self, job: str) -> None:
        """After a requeue SLURM holds a job back for two minutes, and one that starts within two seconds dies of a
        revoked credential."""
        self.wait(
            lambda: self.state(job) == "PENDING" and self.job(job)["Restarts"] != "0",
            60,
            "a requeue",
            lambda: self.job(job),
        )
        time.sleep(2)
        done = self.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        # After a node's loss it may be held back for less, and have started in the meantime.
        assert done.returncode == 0 or self.state(job) != "PENDING", done.stderr

    def wait(
        self, condition: Callable[[], Any], timeout_s: float, what: str, details: Callable[[], Any] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if what in ("munged", "idle nodes"):
                for name, daemon in self.daemons.items():
                    if daemon.poll() is not None and not name.startswith("slurmd-"):
                        raise RuntimeError(f"{name} died: " + (self.root / "log" / f"{name}.out").read_text()[-500:])
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s:.0f} s {details()}")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(entry.getsockname()[1]) for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


def config_file(root: Path) -> Path:
    return root / "slurm.conf"


def processes_of(root: Path) -> list[int]:
    """All processes of the cluster in `root`, known by their environment: daemons, steps and tasks."""
    mark, found = f"SLURM_CONF={config_file(root)}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def guard(root: Path) -> None:
    sys.stdin.read()
    while pids := processes_of(root):  # again, until none of them has started another one
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
