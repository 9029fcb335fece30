"""The step of a SLURM job: one task on every node, asked for with everything that it shall have.

srun takes what its command line does not say from SLURM_* variables, and those may be another job's, or mean something
else to a step than to its job: with --gpus-per-task=1 the one task would get one of the node's GPUs.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping

from launcher import gpus, node_script, processes
from launcher.allocation import Job
from launcher.launch_plan import LaunchPlan
from launcher.local import POLL_S, Requests

NAME = "simclr-train"
"""Steps of this name are ours."""
IMMEDIATE_S = 120

# Variables that srun, sbatch and salloc read as options, or set for those.
_OPTIONS = re.compile(
    r"(SRUN|SBATCH|SALLOC)_\w+|SLURM_("
    r"ACCOUNT|ACCTG_FREQ|BCAST\w*|BURST_BUFFER|COMPRESS|CONSTRAINT|CORE_SPEC|CPU\w*|DELAY_BOOT|DEPENDENCY|DIST\w*|EPILOG"
    r"|EXACT|EXCLUSIVE|EXIT_\w+|EXPORT_ENV|GPU\w*|GRES\w*|HINT|IMMEDIATE|JOB_(CPUS_PER_NODE|NODELIST|NUM_NODES)"
    r"|KILL_BAD_EXIT|LABELIO|MEM_\w+|MPI_TYPE|NCORES\w*|NNODES|NODELIST|NO_KILL|NPROCS|NSOCKETS\w*|NTASKS\w*|OPEN_MODE"
    r"|OVERCOMMIT|OVERLAP|PARTITION|PROFILE|PROLOG|QOS|RELATIVE|REMOTE_CWD|REQ_SWITCH|RESERVATION|RESV_PORTS|SIGNAL"
    r"|SPREAD_JOB|STD\w+MODE|STEP\w*|SRUN_\w+|TASK\w*|THREADS\w*|TIMELIMIT|TRES\w*|UMASK|UNBUFFEREDIO|USE_MIN_NODES"
    r"|WAIT\w*|WCKEY|WHOLE|WORKING_DIR)"
)


def srun_command(plan: LaunchPlan, job: Job) -> list[str]:
    """The command that starts every node of the plan."""
    options = {
        "jobid": job.id,
        "job-name": NAME,
        "nodes": plan.num_nodes,
        "ntasks": plan.num_nodes,
        "ntasks-per-node": 1,  # one launcher on each node, which starts a process for each GPU
        # All of the allocation's CPUs, also where the job was asked for with other tasks in mind. Since SLURM 22.05
        # srun takes no --cpus-per-task from its job, and one core would feed all GPUs.
        "cpus-per-task": job.cpus_per_task,
        "threads-per-core": job.threads_per_core,
        "mem": 0,  # all that the job has
        "gres": gres(job),
        "export": "ALL",
        "mpi": "none",
        # If a node was lost between allocation and start, srun would retry for ever.
        "immediate": IMMEDIATE_S,
        # Without it the other nodes wait for a dead one for 5 minutes and more.
        "kill-on-bad-exit": 1,
        "wait": 0,  # nodes may end at different times
    }
    words = [f"--{name}={value}" for name, value in options.items() if value not in (None, "")]
    rocm = plan.container != "" and plan.device == "cuda" and gpus.here().kind == "AMD"
    # overlap: in a shell of `srun --pty` that shell's step holds everything.
    return ["srun", *words, "--overlap", "--label", *node_script.step_words(plan, rocm)]


def gres(job: Job) -> str:
    """The generic resources of each node that the step asks for; empty where it should get what it gets."""
    num_gpus = job.gpus_per_node(nproc=1)
    others = set.intersection(*(set(share.other_gres) for share in job.shares.values())) if job.shares else set()
    return ",".join([f"gpu:{num_gpus}", *sorted(others)]) if num_gpus else ""


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """srun's, which is that of the tasks: this process's without other jobs' options. What a site has added stays."""
    env = {name: value for name, value in environ.items() if not _OPTIONS.fullmatch(name)}
    return {"PATH": os.defpath} | env  # `sbatch --export=NAME=value` leaves no PATH


def run(plan: LaunchPlan, job: Job, requests: Requests) -> int:
    """Starts the step and waits for its end; passes on requests to stop. Returns srun's exit code."""
    if requests.stop:
        return 0  # the request came before there was anything to stop
    # In a session of its own: a terminal's Ctrl-C, which would make srun kill the step, reaches this process only. If
    # this process is killed, srun ends the step.
    srun = subprocess.Popen(
        srun_command(plan, job),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=processes.die_with_this_process(signal.SIGTERM),
        env=environment(os.environ),
    )
    asked = killed = False
    while (code := srun.poll()) is None:
        time.sleep(POLL_S)
        if requests.stop and not asked:
            asked = True
            # srun gives the signal to this step only; scancel would give it to all steps of the job. Before there are
            # tasks, srun would die of it.
            if plan.files.started(plan.attempt).exists():
                srun.send_signal(getattr(signal, f"SIG{plan.stop_signal}"))
            # Workers that still import torch ignore the signal, and find the file. It comes second, because a worker
            # that has found it may be about to end, without its handler.
            plan.files.stop_request(plan.job).touch()
            again = "" if job.has_batch_script else "; Ctrl-C kills at once"
            print(f"launcher: saving, then stopping{again}", file=sys.stderr, flush=True)
        if requests.kill and not killed:
            killed = True
            srun.terminate()  # it ends the step
    return code


class SrunMessages:
    """What srun itself says while this is open, where stderr is a file, as in batch jobs."""

    def __init__(self) -> None:
        status = os.fstat(sys.stderr.fileno())
        self._start = status.st_size if stat.S_ISREG(status.st_mode) else None

    def __str__(self) -> str:
        if self._start is None:
            return "its message stands above"
        return "; ".join(self._lines()[:3]) or "it said nothing"

    @property
    def cancelled(self) -> bool:
        """Whether SLURM ended the step for another's sake: `scancel JOB.STEP`, or a node that is back and ends what has
        the number of its old step. A task that fails has the rest cancelled, too, and its exit code is named."""
        lines = self._lines()
        return any(re.search(r"\*\*\* STEP \S+ ON \S+ CANCELLED", line) for line in lines) and not any(
            "exit code" in line for line in lines
        )

    def _lines(self) -> list[str]:
        if self._start is None:
            return []
        with open(f"/proc/self/fd/{sys.stderr.fileno()}", encoding="utf-8", errors="replace") as file:
            file.seek(self._start)
            lines = [line.strip() for line in file]
        return [line for line in lines if re.match(r"(\d+: )?(srun|slurmstepd\S*): (error|fatal)", line)]
