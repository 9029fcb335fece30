"""Backends and commands for runs: hosts over a fake ssh, sweeps, check, status, cancel, resume.

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

from launcher import machine
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


def test_nodes_that_another_scheduler_started_are_one_training(checkout: Checkout) -> None:
    """Here Kubeflow's variables on one node, the command line on the other; a request to either reaches both."""
    checkout.behave(steps=100_000, every=100_000)
    kubeflow = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(machine.free_port("127.0.0.1", os.getpid()))}
    words = ("node", CONFIG, "--device=cpu", "--nproc=1", "--preflight-s=60")
    head = checkout.start(*words, env=kubeflow | {"RANK": "0", "WORLD_SIZE": "2", "PBS_JOBID": "12.pbs"})
    wait_for(lambda: "waiting for 1 more" in checkout.log() or head.poll() is not None, 60, "the head node")
    at = f"--rendezvous=127.0.0.1:{kubeflow['MASTER_PORT']}"
    same = checkout.launch(*words, "seed=1", at, "--node-rank=1", "--nodes=2")
    assert same.returncode == 3
    assert "has configuration" in same.stderr
    assert head.wait(60) == 3
    assert "(node 1) has configuration" in checkout.log()

    head = checkout.start(*words, env=kubeflow | {"RANK": "0", "WORLD_SIZE": "2", "PBS_JOBID": "12.pbs"})
    other = checkout.start(*words, at, "--node-rank=1", "--nodes=2", log="other.log")
    wait_for(lambda: len(checkout.ranks()) == 2 and checkout.status().get("state") == "running", 90, "two workers")
    assert "read node rank 0 (RANK=0), number of nodes 2 (WORLD_SIZE=2, read as nodes)" in checkout.log()
    other.terminate()
    assert (head.wait(60), other.wait(60)) == (75, 75), checkout.log()
    assert checkout.status()["state"] == "preempted"
    assert not checkout.pids_alive()
    refused, trained = checkout.records("end")
    assert (refused["reason"], trained["state"]) == ("preflight", "preempted")
    assert trained["attempt"].startswith("node_12_pbs.1-")
    folder = checkout.run_dir / "logs" / trained["attempt"]
    assert [path.name for path in sorted(folder.iterdir())] == ["rank_00000.log", "rank_00001.log"]
    assert "continue with: on each node the command" in checkout.log()
    resumed = checkout.launch("resume", "runs/fake")
    assert resumed.returncode == 2
    assert "on each node the command" in resumed.stderr
    assert not list(checkout.run_dir.glob(".node-*"))


SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin")


@pytest.mark.skipif(SSHD is None, reason="sshd is not installed")
def test_hosts_over_a_real_sshd(checkout: Checkout, tmp_path: Path) -> None:
    assert SSHD
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what its service would have made
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
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
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


def test_a_sweep_prints_json_before_and_after_its_runs(checkout: Checkout) -> None:
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2, optim.base_lr: 0.1}]")
    words = ("local", CONFIG, "--nproc=1", "--sweep", "sweep.yaml", "--json")
    shown = json.loads(checkout.launch(*words, "--dry-run").stdout)
    assert not (checkout.root / "runs").exists()
    assert [(run["name"], run["settings"], run["state"]) for run in shown] == [
        ("fake-000", ["seed=1"], None),
        ("fake-001", ["seed=2", "optim.base_lr=0.1"], None),
    ]
    assert shown[1]["command"][3:8] == ["local", CONFIG, "seed=2", "optim.base_lr=0.1", "name=fake-001"]
    log = checkout.root / "runs" / "fake-000" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "train/loss": 5.5}\n{"step": 2, "train/loss": 4.5, "eval/knn": 0.5, "speed/x": 1}\n')
    done = checkout.launch(*words)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert [(run["state"], run["step"]) for run in ended] == [("finished", 5)] * 2
    assert ended[0]["results"] == {"train/loss": 4.5, "eval/knn": 0.5}
    assert ended[0]["run_dir"] == str(checkout.root / "runs" / "fake-000")


def test_a_failed_run_does_not_end_the_sweep_but_shows_in_its_table(checkout: Checkout) -> None:
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2}]")
    checkout.behave(end={"*": [2, "data_error"]})
    done = checkout.launch("local", CONFIG, "--sweep", "sweep.yaml")
    assert done.returncode == 4
    assert done.stdout.count("data_error") == 2
    assert "fake-001 ended with exit code 4" in done.stderr


@pytest.mark.skipif(any(Path("/proc/driver/nvidia/gpus").glob("*")), reason="plays a machine with two GPUs")
def test_runs_side_by_side_share_the_gpus(checkout: Checkout) -> None:
    smi = checkout.root / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: pretended'\necho 'GPU 1: pretended'\n")
    smi.chmod(0o755)
    environment = {"PATH": f"{checkout.root}:{checkout.env['PATH']}"}
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2}]")
    words = ("local", CONFIG, "--sweep", "sweep.yaml", "--jobs=2")
    done = checkout.launch(*words, env=environment)
    assert done.returncode == 0, done.stderr
    workers = [worker for index in range(2) for worker in checkout.ranks(checkout.root / "runs" / f"fake-00{index}")]
    assert [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0", "1"]
    refused = checkout.launch(*words[:-1], "--jobs=3", env=environment)
    assert refused.returncode == 2
    assert "there are 2 GPUs here" in refused.stderr


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


def test_stop_asks_a_local_run_and_is_refused_where_nothing_runs(checkout: Checkout) -> None:
    checkout.behave(steps=100_000)
    launcher = checkout.start("local", CONFIG, "--nproc=2")
    wait_for(lambda: checkout.newest_step() >= 2, 60, "two steps")
    assert checkout.launch("stop", "runs/fake").returncode == 0
    assert launcher.wait(40) == 0, checkout.log()
    assert checkout.status()["state"] == "stopped"
    again = checkout.launch("stop", "runs/fake")
    assert again.returncode == 2
    assert "nothing runs there" in again.stderr


def test_the_commands_for_a_run_work_on_hosts(checkout: Checkout) -> None:
    checkout.behave(steps=100_000)
    launcher = checkout.start(*hosts_words(checkout, "n1 addr=127.0.0.1", "n2"))
    wait_for(lambda: len(checkout.ranks()) == 2 and checkout.newest_step() >= 2, 60, "two steps of two workers")
    shown = checkout.launch("status", "runs/fake").stdout
    assert "running at step" in shown
    assert "2 x 1" in shown
    (checkout.run_dir / "log.jsonl").write_text('{"step": 1}\n')
    assert checkout.launch("logs", "runs/fake").stdout == '{"step": 1}\n'
    assert checkout.launch("stop", "runs/fake").returncode == 0
    assert launcher.wait(40) == 0, checkout.log()
    reached = checkout.newest_step()
    launcher = checkout.start("resume", "runs/fake")
    wait_for(lambda: checkout.newest_step() > reached, 60, "a later step")
    assert [entry["step"] for entry in checkout.records("start")] == [0, reached]
    assert {worker["env"]["HOST"] for worker in checkout.ranks()} == {"n1", "n2"}
    cancelled = checkout.launch("cancel", "runs/fake")
    assert cancelled.returncode == 0, cancelled.stderr
    assert launcher.wait(20) in (4, 75)
    wait_for(lambda: not checkout.pids_alive(), 5, "the workers' end")


def test_records_that_others_can_write_are_not_resumed(checkout: Checkout) -> None:
    checkout.run_dir.mkdir(parents=True)
    records = checkout.run_dir / "attempts.jsonl"
    entry = {"event": "submit", "attempt": "7.0-000000", "job": "7", "workdir": "/", "again": ["check"]}
    records.write_text(json.dumps(entry) + "\n")
    records.chmod(0o666)
    done = checkout.launch("resume", "runs/fake")
    assert done.returncode == 2
    assert "others may write to it" in done.stderr


@pytest.mark.parametrize("command", ["status", "logs", "stop", "cancel", "resume"])
def test_a_folder_without_a_run_is_named(checkout: Checkout, command: str) -> None:
    done = checkout.launch(command, "runs/nothing")
    assert done.returncode == 2
    assert f"{checkout.root}/runs/nothing: no run there" in done.stderr
    (checkout.root / "runs" / "one").mkdir(parents=True)
    (checkout.root / "runs" / "one" / "status.json").write_text("{}")
    assert "for the runs in it: simclr-dist runs list runs" in checkout.launch(command, "runs").stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_that_cannot_be_written_is_an_error_before_anything_starts(checkout: Checkout) -> None:
    (checkout.root / "runs").mkdir(mode=0o555)
    assert checkout.launch("local", CONFIG).returncode == 2


def test_a_run_directory_below_a_file_is_an_error_before_anything_starts(checkout: Checkout) -> None:
    (checkout.root / "runs").write_text("")
    done = checkout.launch("local", CONFIG)
    assert done.returncode == 2
    assert "the run directory cannot be made" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_and_saves(checkout: Checkout, number: signal.Signals) -> None:
    checkout.behave(steps=100_000)
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {seed: 2}]")
    launcher = checkout.start("local", CONFIG, "--sweep", "sweep.yaml")
    first = checkout.root / "runs" / "fake-000"
    wait_for(lambda: (first / "checkpoints").exists(), 60, "a step")
    launcher.send_signal(number)
    assert launcher.wait(30) == 75
    assert json.loads((first / "status.json").read_text())["state"] == "preempted"
    assert not (checkout.root / "runs" / "fake-001" / "status.json").exists()
