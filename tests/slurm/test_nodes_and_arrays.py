"""Submitting, arrays, checking nodes, and losing them, on a real SLURM. Run: pytest tests/slurm"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_train_script import LONG, end, finish_soon, log_of, submit, wait_running

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_launcher_slurm_submits_and_status_and_cancel_follow(cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(**LONG)
    env = {**cluster.env, "HF_TOKEN": "secret"}
    words = ("fake.yaml", "runs_dir=it''s 100%x", "--nodes=1", "--nproc=2", "--env", "NOTE=a,b c")
    done = checkout.launch("slurm", *words, env=env)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    run_dir = checkout.root / "it''s 100%x" / "fake"
    wait_for(lambda: (run_dir / "ranks").exists() and len(checkout.ranks(run_dir)) == 2, 60, "two workers")
    worker = checkout.ranks(run_dir)[0]["env"]
    assert worker["NOTE"] == "a,b c"
    assert "HF_TOKEN" not in worker
    assert (run_dir / "logs" / f"slurm-{job}.out").exists()
    shown = checkout.launch("status", str(run_dir), env=cluster.env).stdout
    assert f"SLURM job   {job}: RUNNING" in shown
    assert "2 processes on cpu" in checkout.launch("logs", str(run_dir), env=cluster.env).stdout
    again = checkout.launch("slurm", *words, env=env)
    assert again.returncode == 2
    assert f"job {job} still holds this run" in again.stderr
    assert checkout.launch("cancel", str(run_dir), env=cluster.env).returncode == 0
    assert end(cluster, checkout, job) == "CANCELLED"


def test_wrong_settings_are_refused_before_the_queue(cluster: MiniSlurm, checkout: Checkout) -> None:
    done = checkout.launch("slurm", "fake.yaml", "--nodes=2", "--nproc=3", "model.widht=3", env=cluster.env)
    assert done.returncode == 2
    assert "8 does not divide over 6 processes" in done.stderr
    assert "did you mean `width`?" in done.stderr
    for option in ("--time=00:02:00", "--sbatch-arg=--time=2"):
        done = checkout.launch("slurm", "fake.yaml", "--nodes=1", option, env=cluster.env)
        assert done.returncode == 2
        assert "the time limit of 120 s leaves no time to train where SLURM asks to save 180 s before it" in done.stderr
    assert not cluster.run("squeue", "--noheader").stdout.strip()


def test_an_array_runs_each_point_and_requeues_only_its_own_task(cluster: MiniSlurm, checkout: Checkout) -> None:
    (checkout.root / "sweep.yaml").write_text("grid: {seed: [1, 2]}")
    checkout.behave(steps=100_000, every=100_000)
    done = checkout.launch("slurm", "fake.yaml", "--sweep=sweep.yaml", "--nodes=1", env=cluster.env)
    assert done.returncode == 0, done.stderr
    array = done.stdout.split()[1].rstrip(":")
    run_dirs = [checkout.root / "runs" / f"fake-00{index}" for index in range(2)]
    wait_for(lambda: all((path / "status.json").exists() for path in run_dirs), 90, "both runs")
    # The last task carries the array's own number.
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_1", check=True)
    wait_for(lambda: checkout.records("end", run_dirs[1]), 60, "the second run's end")
    cluster.wait_state(f"{array}_1", ["PENDING"])
    assert cluster.state(f"{array}_0") == "RUNNING"
    assert not checkout.records("end", run_dirs[0])
    assert [worker["argv"][1:] for worker in checkout.ranks(run_dirs[1])] == [["seed=2", "name=fake-001"]]


def test_check_nodes_finds_good_nodes_good(cluster: MiniSlurm, checkout: Checkout) -> None:
    cluster.env["SIMCLR_PYTHON"] = sys.executable
    job = cluster.submit("--nodes=2", "slurm/check_nodes.sh", "--nproc=1", cwd=checkout.root)
    assert end(cluster, checkout, job, 90) == "COMPLETED", log_of(checkout, job)
    for host in ("n1", "n2"):
        assert f"ok       {host}: 1 processes gathered" in log_of(checkout, job)


def test_check_nodes_names_the_bad_node(cluster: MiniSlurm, checkout: Checkout) -> None:
    # On n2 the interpreter hangs, as with a dead network disk.
    python = checkout.root / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exec sleep 1000\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    cluster.env["SIMCLR_PYTHON"] = str(python)
    job = cluster.submit("--nodes=2", "slurm/check_nodes.sh", "--preflight-s=3", cwd=checkout.root)
    assert end(cluster, checkout, job, 90) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("3:")
    assert "no word from n2 (node 1)" in log_of(checkout, job)


def test_a_deep_check_from_the_login_node_names_the_bad_node(cluster: MiniSlurm, checkout: Checkout) -> None:
    python = checkout.root / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exec sleep 1000\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    words = ("check", "slurm", "--deep", "--nproc=1", "--preflight-s=3", "--runs-dir=else where")
    words = (*words, f"--node-python={python}", "--setup=echo set up")
    done = checkout.launch(*words, env=cluster.env)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no word from n2 (node 1)" in done.stdout
    assert done.stdout.count(": set up\n") == 2
    assert list((checkout.root / "else where" / ".check").iterdir())


def test_sweep_sh_gives_each_point_a_directory_and_one_can_be_resumed(cluster: MiniSlurm, checkout: Checkout) -> None:
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2, optim.base_lr: 0.1}]")
    cluster.env["SIMCLR_PYTHON"] = sys.executable
    words = ("slurm/sweep.sh", "sweep.yaml", "fake.yaml", "--nproc=1", "train.epochs=30")
    array = cluster.submit("--array=0-1", *words, cwd=checkout.root)
    settings = [["seed=1"], ["seed=2", "optim.base_lr=0.1"]]
    for index in range(2):
        log = checkout.root / f"slurm-{array}_{index}.out"
        assert end(cluster, checkout, f"{array}_{index}") == "COMPLETED", log.read_text()
        (worker,) = checkout.ranks(checkout.root / "runs" / f"fake-00{index}")
        assert worker["argv"][1:] == ["train.epochs=30", *settings[index], f"name=fake-00{index}"]
        assert "finished at step" in log.read_text()
    # That point alone, and not the array.
    done = checkout.launch("resume", "runs/fake-001", "--dry-run", env=cluster.env)
    assert done.returncode == 0, done.stderr
    assert "fake.yaml train.epochs=30 seed=2 optim.base_lr=0.1 name=fake-001" in done.stdout
    assert "--array" not in done.stdout
    assert "--sweep" not in done.stdout
    assert "--job-name=fake-001 " in done.stdout


def test_a_job_that_still_waits_is_seen_stopped_and_cancelled(cluster: MiniSlurm, checkout: Checkout) -> None:
    def submit_held() -> str:
        words = ("fake.yaml", "--nodes=1", "--nproc=1", "--sbatch-arg=--hold")
        done = checkout.launch("slurm", *words, env=cluster.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    job = submit_held()
    assert f"SLURM job   {job}: PENDING" in checkout.launch("status", "runs/fake", env=cluster.env).stdout
    assert "no log yet" in checkout.launch("logs", "runs/fake", env=cluster.env).stderr
    again = checkout.launch("slurm", "fake.yaml", "--nodes=1", env=cluster.env)
    assert again.returncode == 2
    assert f"job {job} still holds this run (pending)" in again.stderr
    assert checkout.launch("stop", "runs/fake", env=cluster.env).returncode == 0
    cluster.run("scontrol", "release", job, check=True)
    assert end(cluster, checkout, job) == "COMPLETED"
    log = checkout.run_dir / "logs" / f"slurm-{job}.out"
    assert "a stop was requested while the job was waiting; not started" in log.read_text()
    assert not checkout.ranks()
    # It never had a plan: what it was asked to be is in the record of its submission.
    resumed = checkout.launch("resume", "runs/fake", "--dry-run", env=cluster.env)
    assert resumed.returncode == 0, resumed.stderr
    assert "--nodes=1" in resumed.stdout
    job = submit_held()
    assert checkout.launch("cancel", "runs/fake", env=cluster.env).returncode == 0
    assert end(cluster, checkout, job) == "CANCELLED"


def test_a_wrong_head_address_is_named_in_seconds(cluster: MiniSlurm, checkout: Checkout) -> None:
    job = submit(
        cluster, checkout, job_args=("fake.yaml", "--head-addr=192.0.2.99", "--max-failures=0", "--preflight-s=5")
    )
    assert end(cluster, checkout, job, 30) == "FAILED"
    assert cluster.job(job)["ExitCode"].startswith("3:")
    assert "192.0.2.99 is not an address of the first node n1" in log_of(checkout, job)


@pytest.mark.slow
def test_a_lost_node_brings_the_job_back(own_cluster: MiniSlurm, checkout: Checkout) -> None:
    cluster = own_cluster
    checkout.behave(steps=100_000)
    job = submit(cluster, checkout)
    wait_running(cluster, checkout, job)
    cluster.kill_node(2)
    cluster.wait(lambda: cluster.state(job) == "PENDING" and cluster.job(job)["Restarts"] == "1", 90, "SLURM's requeue")
    finish_soon(checkout)
    cluster.start_node(2)
    cluster.wait(cluster.all_idle, 60, "both nodes' return")
    cluster.wait(cluster.no_steps, 60, "the end of the lost step")
    cluster.release(job)
    assert end(cluster, checkout, job, 90) == "COMPLETED", log_of(checkout, job)
    assert len(checkout.records("start")) == 2


@pytest.mark.slow
def test_the_true_time_limit_saves_and_requeues(own_cluster: MiniSlurm, checkout: Checkout) -> None:
    checkout.behave(steps=100_000, every=100_000)
    job = submit(own_cluster, checkout, "--time=1", "--signal=B:USR1@20")
    wait_running(own_cluster, checkout, job)
    own_cluster.wait(lambda: own_cluster.state(job) == "PENDING", 120, "the requeue")
    assert checkout.records("end")[-1]["state"] == "preempted"
    assert checkout.newest_step() > 0


def test_salloc_and_the_script_by_hand(cluster: MiniSlurm, checkout: Checkout) -> None:
    cluster.env["SIMCLR_PYTHON"] = sys.executable
    done = cluster.run(
        *("salloc", "--nodes=2", "--ntasks-per-node=1", "bash", "slurm/train.sh", "fake.yaml", "--nproc=1"),
        cwd=Path(checkout.root),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(checkout.ranks()) == 2
