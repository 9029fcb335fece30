"""Which SLURM job this is, and what it has: as the controller says it.

The environment cannot tell. sbatch and srun pass on the variables of the shell in which they are called, so that a job
submitted from inside another one finds that one's SLURM_ARRAY_JOB_ID, SLURM_RESTART_COUNT or SLURM_CPUS_PER_TASK.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launcher import scontrol
from launcher.errors import Exit, LaunchError
from launcher.launch_plan import checked

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED")
NO_JOB = "not inside a SLURM job: submit with `sbatch slurm/train.sh CONFIG`, or `salloc` first"


@dataclass(frozen=True)
class Share:
    """What a job has of one node."""

    cpus: int
    """Hardware threads; cores where the job asked for one thread on each."""
    gpus: int = 0
    other_gres: tuple[str, ...] = ()
    """Generic resources beside GPUs, such as `nvme:1`."""


@dataclass(frozen=True)
class Job:
    id: str
    """Its plain number."""
    name: str
    """Its id for SLURM's commands. In an array ARRAY_TASK, because the last task's plain id also names the whole array:
    requeueing or cancelling that id would act on every task."""
    hosts: tuple[str, ...]
    shares: Mapping[str, Share] = field(default_factory=dict)
    """By host; empty where the controller does not answer."""
    state: str = ""
    restarts: int = 0
    has_batch_script: bool = False
    """False for jobs of salloc and srun. They cannot be requeued."""
    threads_per_core: int | None = None
    """Asked for with --hint=nomultithread or --threads-per-core."""
    time_limit_s: float | None = None
    partition: str = ""
    account: str = ""
    log: str = ""

    @property
    def array_task(self) -> int:
        """0 outside of arrays."""
        return int(self.name.partition("_")[2] or 0)

    @property
    def cpus_per_task(self) -> int | None:
        """What one task on each node can have: what the smallest node gives. None where it is not known."""
        return min((share.cpus for share in self.shares.values()), default=None)

    def gpus_per_node(self, nproc: int | None) -> int:
        """GPUs for the step on each node; 0: SLURM gave none, or does not say so.

        nproc: processes that were asked for on each node, which may be fewer than GPUs.
        """
        gpus = {host: share.gpus for host, share in self.shares.items()}
        if len(set(gpus.values())) > 1 and (nproc is None or nproc > min(gpus.values())):
            raise LaunchError(
                f"this job has not the same number of GPUs on each node ({_listed(gpus)}), and every node must run as "
                f"many processes: ask for them by node (--gpus-per-node), or use --nproc {min(gpus.values())}",
                Exit.PREFLIGHT,
            )
        return min(gpus.values(), default=0)


def _listed(gpus: Mapping[str, int]) -> str:
    shown = [f"{host}: {count}" for host, count in gpus.items()]
    return ", ".join([*shown[:4], "…"] if len(shown) > 5 else shown)


# ---------------------------------------------------------------------------------------------------------------------
# Finding out


def this_job(environ: Mapping[str, str], *, over: bool = False) -> Job:
    """The job of this shell. LaunchError where there is none, or where it is over, unless it may be (`over`)."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+", job_id):
        raise LaunchError(NO_JOB)
    shown = scontrol.run_query(["scontrol", "-d", "-o", "show", "job", job_id])
    forgotten = shown is not None and "Invalid job id" in shown.stderr
    if not forgotten and (shown is None or shown.returncode):
        return from_environment(environ)
    job = parse_job(shown.stdout, job_id) if shown and not forgotten else None
    if job is None or (job.state in OVER and not over):
        raise LaunchError(f"job {job_id}, to which this shell belongs, is over; {NO_JOB}")
    return job


def from_environment(environ: Mapping[str, str]) -> Job:
    """Where no controller answers, as in most containers: what the variables say. Such a job is never requeued."""
    job_id, array, task = (environ.get(f"SLURM_{key}", "") for key in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    restarts, num_nodes = environ.get("SLURM_RESTART_COUNT", ""), environ.get("SLURM_JOB_NUM_NODES")
    nodelist = environ.get("SLURM_JOB_NODELIST", "")
    host = (environ.get("SLURMD_NODENAME") or nodelist) if num_nodes == "1" else ""
    hosts = (checked("host", host),) if host else scontrol.host_names(nodelist)
    if not hosts:
        raise LaunchError(
            f"the nodes of this job ({nodelist}) cannot be listed: `scontrol` does not answer here. "
            "If this is a container, start slurm/train.sh outside and only the task inside (see slurm/README.md)",
            Exit.PREFLIGHT,
        )
    cpus = [int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_JOB_CPUS_PER_NODE", ""))]
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    share = Share(min(cpus, default=0), int(gpus) if gpus.isdigit() else 0)
    return Job(
        id=job_id,
        name=f"{array}_{task}" if array.isdigit() and task.isdigit() else job_id,
        hosts=hosts,
        shares=dict.fromkeys(hosts, share) if cpus else {},
        restarts=int(restarts) if restarts.isdigit() else 0,  # not set in the first run
        partition=environ.get("SLURM_JOB_PARTITION", ""),
        account=environ.get("SLURM_JOB_ACCOUNT", ""),
    )


Expand = Callable[[str], tuple[str, ...]]


def parse_job(
    description: str,
    job_id: str,
    expand: Expand = scontrol.host_names,
    threads_of_node: Callable[[str], int] = scontrol.threads_per_core,
) -> Job:
    """From `scontrol -d -o show job ID`: one line for a job, and for an array's id one for each of its tasks.

    expand: the hosts of a list such as n[1-2]. threads_of_node: hardware threads of each core of a host.
    """
    line = next((line for line in description.splitlines() if line.startswith(f"JobId={job_id} ")), "")
    first, _, rest = line.partition(" UserId=")  # the job's name before it may hold anything
    fields: dict[str, str] = {}
    for key, value in re.findall(r"\s([A-Z][\w:/]*)=(\S*)", rest):
        fields.setdefault(key, "" if value in ("(null)", "N/A") else value)
    hosts = expand(fields.get("NodeList", ""))
    if not fields.get("Restarts", "").isdigit() or not hosts:
        raise LaunchError(f"`scontrol show job {job_id}` does not describe a running job: {line[:200]}", Exit.PREFLIGHT)
    array = re.match(r"JobId=\d+ ArrayJobId=(\d+) ArrayTaskId=(\d+) ", first)
    threads = fields.get("ReqB:S:C:T", "").rpartition(":")[2]
    threads_per_core = int(threads) if threads.isdigit() and int(threads) else None
    requested = _requested_gpus(fields, len(hosts))
    shares: dict[str, Share] = {}
    for nodes, cpu_ids, gres in re.findall(r"\sNodes=(\S+) CPU_IDs=(\S+) Mem=\S+ GRES=(\S*)", rest):
        for host in expand(nodes):
            cpus = _num_ids(cpu_ids)
            if threads_per_core:
                cpus = max(1, cpus * threads_per_core // max(threads_per_core, threads_of_node(host)))
            gpus, others = _gres(gres)
            shares[host] = Share(cpus, gpus if requested is None else min(gpus, requested), others)
    log = re.search(r"\sStdOut=(.*?)(?: [A-Z][A-Za-z:]*=|\s*$)", rest)
    return Job(
        id=job_id,
        name=f"{array[1]}_{array[2]}" if array else job_id,
        hosts=hosts,
        shares=shares if shares.keys() == set(hosts) else {},
        state=fields.get("JobState", ""),
        restarts=int(fields["Restarts"]),
        has_batch_script=fields.get("BatchFlag", "0") != "0",
        threads_per_core=threads_per_core,
        time_limit_s=scontrol.parse_time_limit(fields.get("TimeLimit", "")),
        partition=fields.get("Partition", ""),
        account=fields.get("Account", ""),
        log=log[1] if log else "",
    )


def _num_ids(text: str) -> int:
    """How many numbers a list such as 0-3,8 holds."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def _gres(text: str) -> tuple[int, tuple[str, ...]]:
    """GPUs, and the rest, of a list such as `gpu:a100:4(IDX:0-3),nvme:1`."""
    entries = [entry for entry in re.sub(r"\([^)]*\)", "", text).split(",") if entry]
    gpus = [re.fullmatch(r"gpu(?:[:/][^:=]*[A-Za-z_.-][^:=]*)?(?:[:=](\d+))?", entry) for entry in entries]
    others = tuple(entry for entry, gpu in zip(entries, gpus, strict=True) if not gpu)
    return sum(int(gpu[1] or 1) for gpu in gpus if gpu), others


def _requested_gpus(fields: Mapping[str, str], num_nodes: int) -> int | None:
    """GPUs on each node that the job asked for; None where it did not.

    A job with --exclusive is given all GPUs of its nodes. Whoever also asks for two wants two.
    """
    tasks = fields.get("NumTasks", "")
    for key, factor in (("TresPerNode", num_nodes), ("TresPerJob", 1), ("TresPerTask", int(tasks or 0))):
        number, _ = _gres(re.sub(r"gres[:/]", "", fields.get(key, "")))
        if number and number * factor % num_nodes == 0:
            return number * factor // num_nodes or None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Whose job it is


def why_not_ours(job: Job, environ: Mapping[str, str]) -> str:
    """Empty where the job is there for this training alone, so that it may be requeued; otherwise the reason.

    It is, if its batch script has become this process: slurm/train.sh, a copy of it, or any script that ends with
    `exec bash slurm/train.sh …`. Where a Jupyter server, a tunnel or a script of several commands is the job, a requeue
    would end these as well.
    """
    if not job.state:
        return "`scontrol` does not answer here"
    if not job.has_batch_script:
        return f"job {job.id} is an interactive one"
    batch_pid, step = environ.get("SLURM_TASK_PID"), environ.get("SLURM_STEP_ID", "")
    mine = str(os.getpid()) == batch_pid or (str(os.getppid()) == batch_pid and _is_single_command(job))
    # In a shell of `srun --pty` SLURM_TASK_PID is that step's. An inherited SLURM_STEP_ID names no step of this job.
    if mine and not (step.isdigit() and scontrol.query(["scontrol", "show", "step", f"{job.id}.{step}"])):
        return ""
    return (
        f"job {job.id} does more than this training (to change that, end its script with `exec bash slurm/train.sh …`)"
    )


def _is_single_command(job: Job) -> bool:
    """Whether the batch script only calls another one, as that of `sbatch --wrap='bash slurm/train.sh …'` does."""
    script = scontrol.query(["scontrol", "write", "batch_script", job.id, "-"]) or ""
    lines = [line.strip() for line in script.splitlines()]
    commands = [line for line in lines if line and not line.startswith("#")]
    return (
        len(commands) == 1 and re.fullmatch(r"((\S*/)?(ba|da|z)?sh\s|\S+\.sh\s)[^;&|`\\$(]*", commands[0]) is not None
    )
