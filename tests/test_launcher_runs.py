"""Backends and commands around runs: hosts over a pretended ssh, sweeps, check, status, cancel, resume.

Run: pytest tests/test_launcher_runs.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, make_checkout, wait_for, write_fake_ssh

pytestmark = pytest.mark.distributed
CONFIG = "fake.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "check out")


def hosts_words(checkout: Checkout, *hosts: str) -> list[str]:
    (checkout.root / "hosts.txt").write_text("\n".join(hosts))
    return ["hosts", CONFIG, "--hostfile", "hosts.txt", "--ssh-cmd", write_fake_ssh(checkout)]


def test_hosts_trains_on_every_host(checkout: Checkout) -> None:
    words = hosts_words(checkout, "n1 slots=1 addr=127.0.0.1", "n2 slots=1")
    done = checkout.launch(*words, "seed=1")
    assert done.returncode == 0, done.stderr
    ranks = {worker["env"]["RANK"]: worker for worker in checkout.ranks()}
    assert [ranks[rank]["env"]["HOST"] for rank in "01"] == ["n1", "n2"]
    assert all(worker["cwd"] == str(checkout.root) for worker in ranks.values())


def test_hosts_stops_all_when_asked(checkout: Checkout) -> None:
    checkout.behave(steps=100_000, every=100_000)
    launcher = checkout.start(*hosts_words(checkout, "n1 addr=127.0.0.1", "n2"))
    wait_for(lambda: len(checkout.ranks()) == 2 and checkout.status(), 60, "two workers")
    launcher.terminate()
    assert launcher.wait(40) == 75, checkout.log()
    assert checkout.status()["state"] == "preempted"
    assert not checkout.pids_alive()


def test_a_host_that_cannot_be_reached_ends_the_others(checkout: Checkout) -> None:
    done = checkout.launch(*hosts_words(checkout, "n1 addr=127.0.0.1", "unreachable"), "--preflight-s", "30")
    assert done.returncode == 4
    assert "Connection refused" in done.stderr
    assert not checkout.ranks() if (checkout.run_dir / "ranks").exists() else True


@pytest.mark.skipif(shutil.which("sshd", path="/usr/sbin:/usr/bin") is None, reason="sshd is not installed")
def test_hosts_over_a_real_sshd(checkout: Checkout, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    shutil.copy(keys / "user.pub", keys / "authorized")
    from tests.slurm.mini_slurm import free_ports

    (port,) = free_ports(1)
    config = keys / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized\n"
        f"PidFile {keys}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
    )
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        if sshd.poll() is not None:
            pytest.skip("sshd does not start here")
        words = hosts_words(checkout, "127.0.0.1 addr=127.0.0.1")
        ssh = f"ssh -p {port} -i {keys}/user -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile={keys}/known"
        done = checkout.launch(*words[:-1], ssh)
        assert done.returncode == 0, done.stdout + done.stderr
        assert checkout.status()["state"] == "finished"
    finally:
        sshd.kill()
        sshd.wait()


def test_a_sweep_runs_every_point_and_ends_with_a_table(checkout: Checkout) -> None:
    (checkout.root / "sweep.yaml").write_text("grid: {seed: [1, 2], optim.base_lr: [0.1]}")
    done = checkout.launch("local", CONFIG, "--sweep", "sweep.yaml", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    for index in range(2):
        run_dir = checkout.root / "runs" / f"fake-00{index}"
        (worker,) = checkout.ranks(run_dir)
        assert worker["argv"][1:] == [f"seed={index + 1}", "optim.base_lr=0.1", f"name=fake-00{index}"]
        assert f"fake-00{index}" in done.stdout
        assert "finished" in (run_dir / "logs" / "local.out").read_text()
    assert done.stdout.count("finished") == 2
    again = checkout.launch("local", CONFIG, "--sweep", "sweep.yaml")
    assert again.returncode == 0
    assert len(checkout.ranks(checkout.root / "runs" / "fake-000")) == 1  # finished runs are not run again


def test_check_looks_at_this_machine(checkout: Checkout) -> None:
    done = checkout.launch("check", "--json")
    assert done.returncode == 0, done.stdout
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert {"torch", "GPUs", "run folder", "open files"} <= found.keys()
    (checkout.root / "file").write_text("")
    done = checkout.launch("check", "--runs-dir", "file/runs")
    assert done.returncode == 3
    assert "PROBLEM" in done.stdout


def test_a_deep_check_lets_all_ranks_meet(checkout: Checkout) -> None:
    done = checkout.launch("check", "--deep", "--nproc", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes gathered" in done.stdout
    assert list((checkout.root / "runs" / ".check").iterdir()) == []


def test_status_logs_cancel_and_resume(checkout: Checkout) -> None:
    checkout.behave(steps=100_000)
    launcher = checkout.start("local", CONFIG, "resume=none")
    wait_for(lambda: checkout.newest_step() >= 2, 60, "two steps")
    shown = checkout.launch("status", "runs/fake")
    assert "running at step" in shown.stdout
    assert "no end recorded" in shown.stdout
    cancelled = checkout.launch("cancel", "runs/fake")
    assert cancelled.returncode == 0, cancelled.stderr
    assert launcher.wait(20) in (4, 75)
    assert not checkout.pids_alive()
    assert checkout.launch("cancel", "runs/fake").returncode == 2
    reached = checkout.newest_step()
    checkout.behave(steps=reached + 2)
    (checkout.run_dir / "STOP").touch()
    # From elsewhere: the plan knows where the run was started.
    resumed = subprocess.run(
        [sys.executable, "-m", "launcher", "resume", str(checkout.run_dir)],
        cwd="/",
        env=checkout.env | {"PYTHONPATH": str(checkout.root)},
        text=True,
        capture_output=True,
        timeout=90,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert checkout.ranks()[-1]["argv"][-1] == "resume=auto" or checkout.ranks()[0]["argv"][-1] == "resume=auto"
    assert checkout.status()["state"] == "finished"
    (checkout.run_dir / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert checkout.launch("logs", "runs/fake", "-n", "1").stdout == '{"step": 2}\n'


@pytest.mark.parametrize("command", ["status", "logs", "stop", "cancel", "resume"])
def test_a_folder_without_a_run_is_named(checkout: Checkout, command: str) -> None:
    done = checkout.launch(command, "runs/nothing")
    assert done.returncode == 2
    assert f"{checkout.root}/runs/nothing: no run there" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_that_cannot_be_written_is_an_error_before_anything_starts(checkout: Checkout) -> None:
    (checkout.root / "runs").mkdir(mode=0o555)
    assert checkout.launch("local", CONFIG).returncode == 2


def test_a_run_directory_below_a_file_is_an_error_before_anything_starts(checkout: Checkout) -> None:
    (checkout.root / "runs").write_text("")
    done = checkout.launch("local", CONFIG)
    assert done.returncode == 2
    assert "the run directory cannot be made" in done.stderr


def test_ctrl_c_ends_a_sweep_and_saves(checkout: Checkout) -> None:
    checkout.behave(steps=100_000)
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2}]")
    launcher = checkout.start("local", CONFIG, "--sweep", "sweep.yaml")
    first = checkout.root / "runs" / "fake-000"
    wait_for(lambda: (first / "checkpoints").exists(), 60, "a step")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) == 75
    assert json.loads((first / "status.json").read_text())["state"] == "preempted"
    assert not (checkout.root / "runs" / "fake-001" / "status.json").exists()
