"""Which job it is, what its step asks for, and what of the environment counts: without SLURM, from what it printed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher import allocation, scontrol, step
from launcher.allocation import Job, Share
from launcher.errors import LaunchError
from launcher.launch_plan import LaunchPlan
from launcher.slurm import time_limit_problem

JOB = (
    "JobId={id} {array}JobName=a b Restarts=9 UserId=me(1000) GroupId=me(1000) MCS_label=N/A Account=physics "
    "JobState=RUNNING Reason=None Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 RunTime=00:00:01 TimeLimit=1-00:00:00 "
    "Partition=gpu NodeList=n[1-2] BatchHost=n1 NumNodes=2 NumTasks={tasks} CPUs/Task=1 ReqB:S:C:T=0:0:*:{threads} "
    "NtasksPerN:B:S:C=1:0:*:* JOB_GRES=gpu:8 {nodes} MinCPUsNode=1 OverSubscribe=NO Command=/a b/train.sh "
    "WorkDir=/a b StdOut=/a b/slurm 1.out Power= {requested}"
)
ALIKE = "  Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:4(IDX:0-3)"


def expand(nodelist: str) -> tuple[str, ...]:
    return ("n1", "n2") if nodelist == "n[1-2]" else (nodelist,)


def parsed(nodes: str = ALIKE, requested: str = "", threads: str = "*", tasks: int = 2, array: str = "") -> Job:
    text = JOB.format(id=805, nodes=nodes, requested=requested, threads=threads, tasks=tasks, array=array)
    others = "".join(JOB.format(id=n, nodes=ALIKE, requested="", threads="*", tasks=1, array="") for n in (80, 8050))
    return allocation.parse_job(f"{others}\n{text}\n", "805", expand, lambda host: 2)


def test_a_job_is_what_the_controller_says() -> None:
    job = parsed()
    assert (job.id, job.name, job.hosts, job.restarts, job.has_batch_script) == ("805", "805", ("n1", "n2"), 2, True)
    assert (job.partition, job.account, job.log, job.time_limit_s) == ("gpu", "physics", "/a b/slurm 1.out", 86400)
    # The last task's plain number is the array's: requeueing that would requeue every task.
    task = parsed(array="ArrayJobId=804 ArrayTaskId=3 ")
    assert (task.name, task.array_task) == ("804_3", 3)


@pytest.mark.parametrize(
    ("nodes", "requested", "gpus", "cpus"),
    [
        (ALIKE, "", 4, 8),
        (ALIKE, "TresPerNode=gres:gpu:2", 2, 8),  # --exclusive gives all, --gres asks for two
        (ALIKE, "TresPerNode=gres/gpu:a100:2", 2, 8),
        (ALIKE, "TresPerJob=gres:gpu:4", 2, 8),
        (ALIKE, "TresPerTask=gres:gpu:1", 1, 8),
        (ALIKE, "TresPerNode=gres:nvme:1", 4, 8),
        (" Nodes=n1 CPU_IDs=0-7 Mem=0 GRES=gpu:h:2(IDX:0-1) Nodes=n2 CPU_IDs=0-1,4 Mem=0 GRES=gpu:2(IDX:0,3)", "", 2, 3),  # noqa: E501
        (" Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES=gpu:1g.5gb:2(CNT:2),gpu:2g.10gb:1(CNT:1)", "", 3, 1),
        (" Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=", "", 0, 8),
        (" Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=shard:4(0/4)", "", 0, 8),
    ],
)  # fmt: skip
def test_gpus_and_cpus_are_counted_as_the_step_can_have_them(nodes: str, requested: str, gpus: int, cpus: int) -> None:
    job = parsed(nodes, requested)
    assert (job.gpus_per_node(None), job.cpus_per_task) == (gpus, cpus)


def test_with_one_thread_a_core_there_are_half_as_many_cpus() -> None:
    assert parsed(threads="1").cpus_per_task == 4
    assert parsed(threads="1").threads_per_core == 1


def test_different_numbers_of_gpus_are_refused_by_name_and_fewer_can_be_chosen() -> None:
    job = parsed(" Nodes=n1 CPU_IDs=0 Mem=0 GRES=gpu:4(IDX:0-3)   Nodes=n2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)")
    with pytest.raises(LaunchError, match=re.escape("(n1: 4, n2: 2)") + ".*--nproc 2"):
        job.gpus_per_node(None)
    assert job.gpus_per_node(2) == 2


INSIDE_ANOTHER = {
    "SLURM_JOB_ID": "805", "SLURM_ARRAY_JOB_ID": "804", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2",
    "SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_CPU": "5", "SLURM_GPUS_PER_TASK": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_EXPORT_ENV": "NONE",
    "SLURM_HINT": "nomultithread",
    "SLURM_GRES": "gpu:1", "SBATCH_EXPORT": "NONE", "SRUN_CPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu:1",
}  # fmt: skip


def test_the_step_gets_no_option_of_another_job_but_what_a_site_has_added() -> None:
    site = {"PATH": "/bin", "SLURM_CONF": "/etc/s", "SLURM_TMPDIR": "/scratch/805", "SLURM_SUBMIT_DIR": "/x", "A": "b"}
    kept = step.environment(INSIDE_ANOTHER | site)
    assert kept.keys() - site.keys() == {
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
    }
    assert site.items() <= kept.items()
    assert step.environment({})["PATH"]  # srun finds no program without it


def test_srun_is_told_everything(tmp_path: Path) -> None:
    plan = LaunchPlan(
        backend="slurm", attempt="804_3.0-abcdef", run_dir=str(tmp_path / "a b"), workdir="/", python="/bin/python",
        command=(), resume_argv=(), device="cuda", num_nodes=2, procs_per_node=4,
    )  # fmt: skip
    job = Job("805", "804_3", ("n1", "n2"), {"n1": Share(8, 4, ("nvme:1",)), "n2": Share(4, 4, ("nvme:1", "x:2"))})
    words = step.srun_command(plan, job)
    for word in (
        *("--jobid=805", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--mem=0"),
        *("--gres=gpu:4,nvme:1", "--export=ALL", "--mpi=none", "--kill-on-bad-exit=1", "--wait=0", "--overlap"),
    ):
        assert word in words
    assert f"-m launcher node --plan '{tmp_path}/a b/plan.json'" in words[-2]
    # Where the controller does not answer, what is not known is left to srun.
    assert not {"--gres", "--cpus-per-task"} & {
        word.partition("=")[0] for word in step.srun_command(plan, Job("7", "7", ("n1",)))
    }


# -- whose job --------------------------------------------------------------------------------------------------------


def whose(
    monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], script: str = "", steps: str = "", **job: object
) -> str:
    """script: the job's; steps: which of its steps there are."""

    def query(argv: list[str]) -> str | None:
        if argv[1] == "write":
            return script
        return "State=RUNNING" if argv[-1] in steps.split() else None

    monkeypatch.setattr(scontrol, "query", query)
    values = {"state": "RUNNING", "has_batch_script": True, **job}
    return allocation.why_not_ours(Job("805", "805", ("n1",), **values), environ)  # type: ignore[arg-type]


def test_a_job_is_ours_if_its_batch_script_became_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    me, parent = {"SLURM_TASK_PID": str(os.getpid())}, {"SLURM_TASK_PID": str(os.getppid())}
    assert not whose(monkeypatch, me)
    assert not whose(monkeypatch, me | {"SLURM_STEP_ID": "0"})  # inherited: this job has no such step
    assert "more than this training" in whose(monkeypatch, me | {"SLURM_STEP_ID": "0"}, steps="805.0")  # srun --pty
    assert "more than this training" in whose(monkeypatch, {"SLURM_TASK_PID": "1"})
    assert "more than this training" in whose(monkeypatch, {})
    assert "interactive" in whose(monkeypatch, me, has_batch_script=False)
    assert "does not answer" in whose(monkeypatch, me, state="")
    # `sbatch --wrap=…` makes a script that does nothing else.
    wrapped = "#!/bin/sh\n# This script was created by sbatch --wrap.\n\nbash slurm/train.sh configs/a.yaml name=x\n"
    assert not whose(monkeypatch, parent, wrapped)
    for more in (
        "#!/bin/bash\njupyter lab &\nbash slurm/train.sh a.yaml\n",
        "#!/bin/bash\nbash slurm/train.sh a.yaml; bash slurm/train.sh b.yaml\n",
        "#!/bin/bash\nexec jupyter lab\n",
        "#!/bin/bash\npython many_trainings.py\n",
        "",
    ):
        assert "more than this training" in whose(monkeypatch, parent, more), more


def test_without_a_controller_the_variables_say_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scontrol, "run_query", lambda argv: None)
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1", "SLURM_GPUS_ON_NODE": "4"}
    job = allocation.this_job(
        environ | {"SLURM_JOB_CPUS_PER_NODE": "8(x2),4", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    )
    assert (job.name, job.hosts, job.shares, job.state) == ("7_3", ("n1",), {"n1": Share(4, 4)}, "")
    with pytest.raises(LaunchError, match=r"the nodes of this job .* cannot be listed"):
        allocation.this_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"})
    with pytest.raises(LaunchError, match="not inside a SLURM job"):
        allocation.this_job({})


# -- time limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("2", 120), ("2:30", 150), ("00:02:00", 120), ("1-0", 86400), ("1-2:30", 95400), ("1-2:3:4", 93784)),
        ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: float | None) -> None:
    assert scontrol.parse_time_limit(text) == seconds


def test_a_limit_within_the_signals_lead_and_a_save_is_a_problem() -> None:
    assert "120 s leaves no time" in time_limit_problem(120, lead_s=180, save_budget_s=60)
    assert "240 s leaves no time" in time_limit_problem(240, lead_s=180, save_budget_s=60)
    assert not time_limit_problem(241, lead_s=180, save_budget_s=60)
    assert not time_limit_problem(None, lead_s=180, save_budget_s=60)


GONE = "slurmstepd-n1: error: *** STEP 310.0 ON n1 CANCELLED AT 2026-11-26T03:35:36 ***"


@pytest.mark.parametrize(
    ("messages", "cancelled"),
    [
        ([f"0: {GONE}", "srun: error: n1: task 0: Terminated", "srun: Force Terminated StepId=310.0"], True),
        ([GONE.replace(" ***", " DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***")], True),
        (["srun: error: n2: task 1: Exited with exit code 2", GONE], False),  # the step's own fault
        (["srun: error: Unable to create step for job 310: More processors requested than permitted"], False),
        ([GONE.replace("STEP 310.0", "JOB 310").replace(" ***", " DUE TO JOB REQUEUE ***")], False),
        ([f"0: a picture is named {GONE}"], False),
    ],
)
def test_a_step_that_slurm_cancelled_is_not_one_that_it_could_not_start(
    messages: list[str], cancelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "job.log", "w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        print("srun: error: of an earlier attempt", GONE, sep="\n", file=log, flush=True)
        said = step.SrunMessages()
        print(*messages, sep="\n", file=log, flush=True)
        assert said.cancelled == cancelled
        assert "earlier" not in str(said)
