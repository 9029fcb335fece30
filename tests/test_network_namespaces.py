"""Two nodes with networks of their own, one cable between them, and no name service. Needs root.

Run: pytest tests/test_network_namespaces.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, make_checkout, make_real_checkout, wait_for, write_fake_ssh

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEP_TIMEOUT_S = 6
NODES = ("node1", "node2")


class Lab:
    """Network namespaces that live as long as a sleeping process in each, so that nothing is left to clean up."""

    def __init__(self) -> None:
        self.sleepers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Lab:
        try:
            for node in NODES:
                unshare = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "sleep", "infinity")
                self.sleepers[node] = subprocess.Popen(unshare, stderr=subprocess.PIPE)
            for node in NODES:
                wait_for(lambda node=node: self._is_apart(node), 10, f"the network of {node}")
            first, second = (str(self.sleepers[node].pid) for node in NODES)
            _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for number, node in enumerate(NODES, 1):
                self.run(node, "ip", "address", "add", f"10.77.0.1{number}/24", "dev", "eth0")
                self.run(node, "ip", "link", "set", "lo", "up")
                self.run(node, "ip", "link", "set", "eth0", "up")
                self.run(node, "sh", "-c", f"echo {node} > /proc/sys/kernel/hostname")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for sleeper in self.sleepers.values():
            sleeper.kill()
            sleeper.communicate()

    def _is_apart(self, node: str) -> bool:
        pid = self.sleepers[node].pid
        if self.sleepers[node].poll() is not None:
            error = self.sleepers[node].stderr
            raise OSError(error.read().decode() if error else "")
        own, apart = Path("/proc/self/ns"), Path(f"/proc/{pid}/ns")
        return all(os.readlink(own / kind) != os.readlink(apart / kind) for kind in ("net", "uts"))

    def enter(self, node: str) -> list[str]:
        return ["nsenter", "--net", "--uts", f"--target={self.sleepers[node].pid}", "--"]

    def run(self, node: str, *argv: str) -> None:
        _run(*self.enter(node), *argv)

    def cut_link(self) -> None:
        self.run(NODES[1], "ip", "link", "set", "eth0", "down")

    def restore_link(self) -> None:
        self.run(NODES[1], "ip", "link", "set", "eth0", "up")

    def processes(self) -> list[int]:
        """What runs in either network, except for the sleepers."""
        networks = {os.readlink(f"/proc/{sleeper.pid}/ns/net") for sleeper in self.sleepers.values()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inside = os.readlink(folder / "ns" / "net") in networks
            except OSError:
                continue
            if inside and int(folder.name) not in {sleeper.pid for sleeper in self.sleepers.values()}:
                found.append(int(folder.name))
        return found


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")


@pytest.fixture
def lab() -> Iterator[Lab]:
    missing = [name for name in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"networks of their own need {', '.join(missing) or 'root'}")
    with ExitStack() as stack:
        try:
            running = stack.enter_context(Lab())
        except OSError as error:
            pytest.skip(f"networks cannot be made here: {error}")
        yield running


def hosts_words(lab: Lab, checkout: Checkout, config: str) -> list[str]:
    (checkout.root / "hosts.txt").write_text("node1 addr=10.77.0.11\nnode2\n")
    ssh = write_fake_ssh(checkout, {node: lab.enter(node) for node in NODES})
    return ["hosts", config, "--hostfile=hosts.txt", f"--ssh-cmd={ssh}", "--device=cpu"]


def logged_steps(run_dir: Path) -> list[int]:
    path = run_dir / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_cut_link_is_noticed_and_the_run_goes_on_when_it_is_back(lab: Lab, tmp_path: Path) -> None:
    checkout = make_real_checkout(tmp_path / "checkout")
    run_dir = checkout.root / "runs" / "cut"
    settings = ("name=cut", "train.epochs=100000", f"timeout.step_s={STEP_TIMEOUT_S}", "checkpoint.every_epochs=1")
    words = (*hosts_words(lab, checkout, "configs/smoke.yaml"), *settings, "evaluation.knn_every_epochs=null")
    launcher = checkout.start(*words)
    wait_for(lambda: checkout.newest_step(run_dir) or launcher.poll() is not None, 120, "a checkpoint")
    assert launcher.poll() is None, checkout.log()
    assert "head node1 at 10.77.0.11:" in checkout.log()
    assert "over eth0" in checkout.log()
    lab.cut_link()
    cut = time.time()
    assert launcher.wait(90) == 4, checkout.log()
    # The time-out is a timer in a process that waits: a busy machine does not make it late by seconds.
    assert (run_dir / "status.json").stat().st_mtime - cut < STEP_TIMEOUT_S + 5
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert "continue with:" in checkout.log()
    wait_for(lambda: not lab.processes(), 10, "the end of every process on both nodes")

    lab.restore_link()
    reached = checkout.newest_step(run_dir)
    launcher = checkout.start("resume", str(run_dir))
    wait_for(lambda: checkout.newest_step(run_dir) > reached or launcher.poll() is not None, 120, "a later checkpoint")
    assert launcher.poll() is None, checkout.log()
    assert checkout.launch("stop", str(run_dir)).returncode == 0
    assert launcher.wait(60) == 0, checkout.log()
    assert [entry["step"] for entry in checkout.records("start", run_dir)] == [0, reached]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


def test_a_link_that_is_down_at_the_start_is_named_in_seconds(lab: Lab, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    lab.cut_link()
    done = checkout.launch(*hosts_words(lab, checkout, "fake.yaml"), "--preflight-s=3")
    assert done.returncode == 3, done.stderr
    assert "no word from node2" in done.stderr or "node2 cannot reach the head node" in done.stderr
    assert "Traceback" not in done.stderr
    assert not lab.processes()


def test_nodes_of_another_scheduler_meet_at_a_rendezvous(lab: Lab, tmp_path: Path) -> None:
    """Node 0 knows itself as localhost, as in a PyTorchJob; the other one finds its rank in a list of PBS."""
    checkout = make_real_checkout(tmp_path / "checkout")
    run_dir = checkout.root / "runs" / "met"
    (checkout.root / "nodefile").write_text("node1\nnode1\nnode2\nnode2\n")
    settings = ("name=met", "train.max_steps=3", "evaluation.knn_every_epochs=null", "monitor.image_pairs=0")
    words = ("node", "configs/smoke.yaml", *settings, "--device=cpu", "--nproc=1")
    kubeflow = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "2"}
    pbs = {"PBS_NODEFILE": str(checkout.root / "nodefile")}
    head = checkout.start(*words, env=kubeflow, enter=lab.enter("node1"))
    other = checkout.start(*words, "--rendezvous=10.77.0.11:29511", env=pbs, enter=lab.enter("node2"), log="other.log")
    assert (head.wait(180), other.wait(30)) == (0, 0), checkout.log() + checkout.log("other.log")
    assert "read node rank 1 (node2 in PBS_NODEFILE=" in checkout.log("other.log")
    for log in (checkout.log(), checkout.log("other.log")):
        assert "starting 2 nodes x 1 process on cpu; head node1 at 10.77.0.11:29511 over eth0" in log
    assert logged_steps(run_dir)[-1] == 3
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"

    lab.cut_link()
    alone = ("--rendezvous=10.77.0.11:29511", "--preflight-s=2")
    waits = checkout.start(*words, *alone, env=pbs, enter=lab.enter("node1"))
    cut = checkout.start(*words, *alone, env=pbs, enter=lab.enter("node2"), log="other.log")
    assert (waits.wait(60), cut.wait(60)) == (3, 3)
    assert "no word from node 1 within 2 s" in checkout.log()
    assert "node2 cannot reach the head node at 10.77.0.11:29511" in checkout.log("other.log")
    # Two nodes that both believe to be the first one.
    wrong = checkout.start(*words, *alone, "--node-rank=0", env=pbs, enter=lab.enter("node2"))
    assert wrong.wait(60) == 3
    assert "node2 is node 0, but the rendezvous 10.77.0.11 is 10.77.0.11, which is not an address" in checkout.log()
    assert "Traceback" not in checkout.log() + checkout.log("other.log")
    assert not lab.processes()
