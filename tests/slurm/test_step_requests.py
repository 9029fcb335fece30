"""What the step of a job gets, however the job was asked for: on a real SLURM whose nodes differ, with pretended GPUs.

Run: pytest tests/slurm/test_step_requests.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_train_script import end, log_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
# In place of Python on the nodes: writes down what the task sees, and trains nothing.
LOOKS = """\
#!/bin/sh
case " $* " in *" launcher node "*) ;; *) exec "{python}" "$@" ;; esac
for plan in "$@"; do :; done
run="${{plan%/plan.json}}"
attempt=$(sed -n 's/.*"attempt": "\\(.*\\)".*/\\1/p' "$plan")
echo "$CUDA_VISIBLE_DEVICES cpus=$SLURM_CPUS_PER_TASK tasks=$SLURM_STEP_NUM_TASKS" > "$run/$SLURMD_NODENAME"
touch "$run/.started.$attempt"
{then}
"""


def pretend(checkout: Checkout, then: str = "exit 1") -> Path:
    """An interpreter that is found without any variable, with which nodes do this (shell) instead of training."""
    python = checkout.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(LOOKS.format(python=sys.executable, then=then))
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def gpu_cluster(_slurm_installed: None) -> Iterator[MiniSlurm]:
    with MiniSlurm(cpus=(8, 4), gpus=4) as running:
        yield running


OUTER = {
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "5",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_ARRAY_JOB_ID": "1",
    "SLURM_ARRAY_TASK_ID": "1",
}
"""As sbatch finds it in a step of an array task of another job."""
REQUESTS: tuple[tuple[str, int, int, dict[str, str]], ...] = (
    # options, GPUs of each node, CPUs of each node, environment of sbatch
    ("", 4, 4, {}),
    ("--gres=gpu:2", 2, 4, {}),
    ("--gres=gpu:fast:2", 2, 4, {}),
    ("--gpus-per-node=2", 2, 4, {}),
    ("--gpus=4", 2, 4, {}),
    ("--gpus-per-task=1 --ntasks-per-node=4 --cpus-per-task=1", 4, 4, {}),
    ("--exclusive=user --gpus-per-task=3 --cpus-per-task=2", 3, 2, {}),
    ("--mem-per-cpu=10", 4, 4, {}),
    ("--mem-per-gpu=10 --gpus-per-node=4", 4, 4, {}),
    ("--export=NONE", 4, 4, {}),
    ("--export=FOO=1", 4, 4, {}),
    ("--hint=nomultithread --gpu-bind=none --cpus-per-gpu=1 --gres=gpu:4", 4, 4, {}),
    ("", 4, 4, OUTER),
)


# Thirteen jobs take some 30 s, whatever they ask for: SLURM runs them one after the other.
def test_the_step_gets_what_was_asked_for(gpu_cluster: MiniSlurm, checkout: Checkout) -> None:
    pretend(checkout, "exit 0")  # with another code the other node would be ended before it writes
    jobs = []
    for number, (options, _, _, env) in enumerate(REQUESTS):
        words = ("--no-requeue", "fake.yaml", f"name=r{number}", "resume=none", "train.global_batch_size=24")
        gpu_cluster.env |= env
        jobs.append(gpu_cluster.submit("--nodes=2", *options.split(), "slurm/train.sh", *words, cwd=checkout.root))
        for name in env:
            del gpu_cluster.env[name]
    for number, (job, (options, gpus, cpus, env)) in enumerate(zip(jobs, REQUESTS, strict=True)):
        what = f"{options} {env}"
        assert end(gpu_cluster, checkout, job) == "FAILED", what
        run_dir = checkout.root / "runs" / f"r{number}"
        seen = {host: (run_dir / host).read_text() for host in ("n1", "n2") if (run_dir / host).exists()}
        devices = ",".join(map(str, range(gpus)))
        expected = f"{devices} cpus={cpus} tasks=2\n"
        assert seen == {"n1": expected, "n2": expected}, what + log_of(checkout, job)
        plan = json.loads((run_dir / "plan.json").read_text())
        assert (plan["device"], plan["procs_per_node"]) == ("cuda", gpus), what
        assert plan["attempt"].startswith(f"{job}.0-"), what
        assert plan["command"][-1] != "resume=auto", what  # nobody has restarted this job


def test_allocated_gpus_that_no_node_can_use_end_the_job_at_once(gpu_cluster: MiniSlurm, checkout: Checkout) -> None:
    gpu_cluster.env["SIMCLR_PYTHON"] = sys.executable
    job = gpu_cluster.submit("--nodes=2", "slurm/train.sh", "fake.yaml", cwd=checkout.root)
    assert end(gpu_cluster, checkout, job) == "FAILED"
    log = log_of(checkout, job)
    assert gpu_cluster.job(job)["ExitCode"].startswith("3:"), log
    assert gpu_cluster.job(job)["Restarts"] == "0"
    assert "every node: SLURM_GPUS_ON_NODE=4: 4 GPUs allocated, but 0 usable here" in log
    assert "--device cpu" in log
    assert not checkout.ranks()


RELEASED_SCRIPT = """\
#!/bin/bash
RUN_DIR="$("$SIMCLR_PYTHON" -m launcher plan "$@")" || exit $?
srun --kill-on-bad-exit=1 --ntasks-per-node=1 "$SIMCLR_PYTHON" -m launcher node --plan "$RUN_DIR/plan.json" &
wait $!
exec "$SIMCLR_PYTHON" -m launcher finish --run-dir "$RUN_DIR" --rc $?
"""


def test_a_copy_of_the_released_script_still_trains_and_requeues_its_job(
    gpu_cluster: MiniSlurm, checkout: Checkout
) -> None:
    gpu_cluster.env["SIMCLR_PYTHON"] = str(pretend(checkout, "exit 0"))
    (checkout.root / "mine.sh").write_text(RELEASED_SCRIPT)
    job = gpu_cluster.submit("--nodes=2", "--exclusive", "mine.sh", "fake.yaml", cwd=checkout.root)
    gpu_cluster.wait(lambda: gpu_cluster.job(job)["Restarts"] == "1", 60, "its requeue", lambda: log_of(checkout, job))
    assert (checkout.run_dir / "n2").read_text().endswith("tasks=2\n")


def test_a_step_that_srun_cannot_start_is_said_and_not_tried_again(gpu_cluster: MiniSlurm, checkout: Checkout) -> None:
    gpu_cluster.env["SIMCLR_PYTHON"] = sys.executable
    refuses = checkout.root / "bin" / "srun"
    refuses.parent.mkdir()
    message = "srun: error: Unable to create step for job 7: More processors requested than permitted"
    refuses.write_text(f'#!/bin/sh\necho "{message}" >&2\nexit 1\n')
    refuses.chmod(0o755)
    path = gpu_cluster.env["PATH"]
    gpu_cluster.env["PATH"] = f"{refuses.parent}:{path}"
    job = gpu_cluster.submit("--nodes=1", "slurm/train.sh", "--device=cpu", "fake.yaml", cwd=checkout.root)
    gpu_cluster.env["PATH"] = path
    assert end(gpu_cluster, checkout, job) == "FAILED"
    assert gpu_cluster.job(job)["Restarts"] == "0"
    assert f"srun could not start the step: {message}" in log_of(checkout, job)
    assert f"launcher resume {checkout.run_dir}" in log_of(checkout, job)
    wait_for(lambda: checkout.records("end"), 5, "the end's record")
    assert checkout.records("end")[0]["action"] == "fail"
