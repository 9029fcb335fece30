"""`sbatch slurm/train.sh` on a real SLURM of two nodes, with the fake trainer: which jobs stop, and which are requeued.

Run: pytest tests/slurm (needs slurm-wlm and munge; SIMCLR_REQUIRE_SLURM=1 makes their absence a failure)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher_checkout import Checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
LONG = {"steps": 100_000, "every": 100_000}


def submit(cluster: MiniSlurm, checkout: Checkout, *options: str, job_args: tuple[str, ...] = ("fake.yaml",)) -> str:
    cluster.env["SIMCLR_PYTHON"] = sys.executable
    return cluster.submit("--nodes=2", *options, "slurm/train.sh", "--nproc=2", *job_args, cwd=checkout.root)


def log_of(checkout: Checkout, job: str) -> str:
    path = checkout.root / f"slurm-{job}.out"
    return path.read_text() if path.exists() else "no log"


def wait_log(checkout: Checkout, job: str, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    try:
        return wait_for(condition, timeout_s, what)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log_of(checkout, job)}") from None


def wait_running(cluster: MiniSlurm, checkout: Checkout, job: str, attempts: int = 1) -> None:
    """All four workers of the newest attempt train."""
    wait_log(checkout, job, lambda: len(checkout.ranks()) == 4 * attempts and checkout.status(), 60, "four workers")
    newest = checkout.records("start")[-1]["attempt"]
    wait_log(checkout, job, lambda: checkout.status().get("attempt") == newest, 30, "the attempt's status")


def end(cluster: MiniSlurm, checkout: Checkout, job: str, timeout_s: float = 60) -> str:
    try:
        return cluster.wait_state(job, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"], timeout_s)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log_of(checkout, job)}") from None


def finish_soon(checkout: Checkout) -> None:
    checkout.behave(steps=checkout.newest_step() + 3)


def test_trains_on_two_nodes_unedited(cluster: MiniSlurm, checkout: Checkout) -> None:
    job = submit(cluster, checkout, job_args=("fake.yaml", "seed=1", "data.train=synthetic"))
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)
    ranks = {int(worker["env"]["RANK"]): worker for worker in checkout.ranks()}
    assert sorted(ranks) == [0, 1, 2, 3]
    assert [ranks[r]["env"]["SLURMD_NODENAME"] for r in range(4)] == ["n1", "n1", "n2", "n2"]
    for worker in ranks.values():
        assert worker["argv"][1:] == ["seed=1", "data.train=synthetic"]
        assert worker["env"]["SIMCLR_EXPECTED_WORLD_SIZE"] == "4"
        assert worker["env"]["SIMCLR_ATTEMPT"].startswith(f"{job}.0-")
        # --cpus-per-task reached srun: each of the two processes has half of the node's four
        assert worker["env"]["SLURM_CPUS_PER_TASK"] == "4"
    assert "head n1 at 127.0.0.1:" in log_of(checkout, job)


def test_the_warning_before_the_limit_saves_and_requeues(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)
    cluster.wait_state(job, ["PENDING"])
    assert checkout.records("end")[-1]["state"] == "preempted"
    reached = checkout.newest_step()
    assert reached == checkout.records("end")[-1]["step"] > 0
    finish_soon(checkout)
    cluster.release(job)
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)
    assert [entry["step"] for entry in checkout.records("start")] == [0, reached]
    assert checkout.records("start")[1]["attempt"].startswith(f"{job}.1-")


def test_a_request_before_the_workers_listen_is_not_lost(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG, import_s=4)
    job = submit(cluster, checkout)
    wait_log(checkout, job, checkout.ranks, 60, "a worker")
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)
    cluster.wait_state(job, ["PENDING"])
    assert checkout.records("end")[-1]["state"] == "preempted"


def test_an_external_requeue_is_followed_once(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    cluster.run("scontrol", "requeue", job, check=True)
    cluster.wait_state(job, ["PENDING"])
    assert cluster.job(job)["Restarts"] == "1"
    assert checkout.status()["state"] == "preempted"
    finish_soon(checkout)
    cluster.release(job)
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)
    assert cluster.job(job)["Restarts"] == "1"


def test_preemption_by_priority_saves_within_the_grace_time(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout, "--partition=low")
    wait_running(cluster, checkout, job)
    urgent = cluster.submit("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1", cwd=checkout.root)
    cluster.wait_state(job, ["PENDING"])
    assert checkout.records("end")[-1]["state"] == "preempted"
    assert checkout.newest_step() > 0
    assert end(cluster, checkout, urgent) == "COMPLETED"
    finish_soon(checkout)
    cluster.release(job)
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)


def test_a_cancelled_job_stays_cancelled(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    cluster.run("scancel", job, check=True)
    assert end(cluster, checkout, job) == "CANCELLED"
    wait_log(checkout, job, lambda: checkout.records("end"), 20, "the end's record")
    assert checkout.records("end")[-1]["job"] == "cancelled"
    assert cluster.job(job)["Restarts"] == "0"
    assert not checkout.pids_alive()


@pytest.mark.slow
def test_a_crash_is_forgiven_while_there_is_progress(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(steps=12, end={"0": [5, "raise"]})
    job = submit(cluster, checkout)
    cluster.release(job)
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)
    assert [entry["step"] for entry in checkout.records("start")] == [0, 4]


def test_a_killed_rank_ends_the_job_and_a_crash_loop_stops(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(end={"*": [1, "kill"]})
    job = submit(cluster, checkout)
    cluster.release(job)
    assert end(cluster, checkout, job) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("5:")
    assert cluster.job(job)["Restarts"] == "1"
    assert "2 attempts in a row made no progress" in log_of(checkout, job)
    assert "-m launcher resume" in log_of(checkout, job)
    for attempt in (entry["attempt"] for entry in checkout.records("start")):
        own = checkout.run_dir / "logs" / attempt / "rank_00000.log"
        assert own.read_text() == "rank 0: kill as told\n"
        log = log_of(checkout, job)
        assert f"launcher: rank 0 ended by signal 9; {own} ends with:\n  | rank 0: kill as told" in log
    assert not checkout.pids_alive()


def test_a_failure_that_would_come_back_is_not_requeued(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(end={"*": [2, "nan_abort"]})
    job = submit(cluster, checkout)
    assert end(cluster, checkout, job) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("4:")
    assert cluster.job(job)["Restarts"] == "0"


def test_a_wrong_configuration_ends_the_job_at_once(cluster: MiniSlurm, checkout: Checkout) -> None:
    job = submit(cluster, checkout, job_args=("fake.yaml", "train.global_batch_size=6"))
    assert end(cluster, checkout, job) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("2:")
    assert "6 does not divide over 4 processes" in log_of(checkout, job)
    assert not checkout.run_dir.exists()


def test_a_refused_requeue_prints_the_line_that_continues(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout, "--no-requeue")
    wait_running(cluster, checkout, job)
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)
    assert end(cluster, checkout, job) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("75:")
    assert "SLURM does not requeue it" in log_of(checkout, job)
    assert f"launcher resume {checkout.run_dir}" in log_of(checkout, job)
    finish_soon(checkout)
    cluster.env["PYTHONPATH"] = str(checkout.root)
    done = cluster.run(sys.executable, "-m", "launcher", "resume", str(checkout.run_dir), cwd=Path("/"))
    del cluster.env["PYTHONPATH"]
    assert done.returncode == 0, done.stderr
    second = done.stdout.split()[1].rstrip(":")
    assert end(cluster, checkout, second) == "COMPLETED"
    assert checkout.records("start")[-1]["step"] > 0
    assert checkout.status()["state"] == "finished"


def test_a_stop_file_ends_the_job_without_requeue(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    assert checkout.launch("stop", str(checkout.run_dir), env=cluster.env).returncode == 0
    assert end(cluster, checkout, job) == "COMPLETED"
    assert checkout.records("end")[-1]["state"] == "stopped"
    shown = checkout.launch("status", str(checkout.run_dir), env=cluster.env).stdout
    assert "stopped at step" in shown
    assert f"{job}.0-" in shown


@pytest.mark.slow
def test_another_number_of_nodes_goes_on_with_the_same_global_batch(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    cluster.run("scancel", "--signal=USR1", "--batch", job, check=True)
    cluster.wait_state(job, ["PENDING"])
    finish_soon(checkout)
    cluster.run("scancel", job, check=True)
    job = submit(cluster, checkout, "--nodes=1")
    assert end(cluster, checkout, job) == "COMPLETED", log_of(checkout, job)
    assert [entry["num_nodes"] for entry in checkout.records("start")] == [2, 1]


def test_two_jobs_do_not_share_a_run_directory(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout, "--nodes=1")
    wait_log(checkout, job, lambda: len(checkout.ranks()) == 2, 60, "two workers")
    second = cluster.submit("--nodes=1", "slurm/train.sh", "fake.yaml", cwd=checkout.root)
    assert end(cluster, checkout, second) == "FAILED"
    assert f"job {job} still holds this run (running)" in log_of(checkout, second)
    assert cluster.state(job) == "RUNNING"


@pytest.mark.slow
def test_a_dead_agent_ends_the_job(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    worker = next(entry for entry in checkout.ranks() if entry["env"]["SLURMD_NODENAME"] == "n2")
    agent = int(Path(f"/proc/{worker['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    cluster.wait_state(job, ["PENDING"], 30)
    assert checkout.records("end")[-1]["action"] == "requeue"
    assert not checkout.pids_alive()
