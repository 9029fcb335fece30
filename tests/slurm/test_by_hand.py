"""slurm/train.sh in an allocation of one's own, in a terminal, and in wrong places. On a real SLURM.

Run: pytest tests/slurm/test_by_hand.py
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.launcher_checkout import Checkout, clean_environment, is_running, wait_for
from tests.slurm.mini_slurm import MiniSlurm
from tests.slurm.test_step_requests import pretend
from tests.slurm.test_train_script import LONG, end

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


class Terminal:
    """A program in a terminal of its own, where Ctrl-C reaches it and what it has started."""

    def __init__(self, *argv: str, cwd: Path, env: dict[str, str]) -> None:
        self._keys, screen = os.openpty()
        with os.fdopen(screen, "rb") as theirs:
            self.process = subprocess.Popen(
                argv, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )  # fmt: skip
        os.set_blocking(self._keys, False)
        self._shown = b""

    def shown(self) -> str:
        with suppress(OSError):
            while part := os.read(self._keys, 65536):
                self._shown += part
        return self._shown.decode().replace("\r\n", "\n")

    def ctrl_c(self) -> None:
        os.write(self._keys, b"\x03")

    def wait(self, timeout_s: float = 60) -> int:
        wait_for(lambda: self.shown() is None or self.process.poll() is not None, timeout_s, "the program's end")
        return self.process.returncode


@contextmanager
def training_by_hand(cluster: MiniSlurm, checkout: Checkout, python: Path) -> Iterator[Terminal]:
    cluster.env["SIMCLR_PYTHON"] = str(python)
    checkout.behave(**LONG)
    options = ("--nodes=2", "--ntasks-per-node=1", "--exclusive")
    terminal = Terminal(
        "salloc",
        *options,
        "bash",
        "slurm/train.sh",
        "fake.yaml",
        "--nproc=1",
        cwd=checkout.root,
        env=cluster.env,
    )
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_ctrl_c_saves_and_ends_the_step_and_a_second_start_is_refused(cluster: MiniSlurm, checkout: Checkout) -> None:
    with training_by_hand(cluster, checkout, Path(sys.executable)) as terminal:
        wait_for(lambda: terminal.shown() and checkout.status().get("state") == "running", 60, "the training")
        job = checkout.records("start")[0]["job"]
        # In another terminal of the same job; also for another run, which would share the GPUs.
        inside = {**cluster.env, "SLURM_JOB_ID": job}
        second = subprocess.run(
            ["bash", "slurm/train.sh", "fake.yaml", "name=other", "--nproc=1"],
            env=inside, cwd=checkout.root, text=True, capture_output=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2
        assert f"job {job} already trains, in step {job}.0: end it first" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        terminal.ctrl_c()
        assert terminal.wait() == 75, terminal.shown()
    assert checkout.status()["state"] == "preempted"
    assert checkout.newest_step() == checkout.records("end")[0]["step"] > 0
    assert not checkout.pids_alive()
    for text in ("saving, then stopping; Ctrl-C kills at once", f"not requeued: job {job} is an interactive one"):
        assert text in terminal.shown()
    assert f"launcher resume {checkout.run_dir}" in terminal.shown()


def test_a_second_ctrl_c_kills(cluster: MiniSlurm, checkout: Checkout) -> None:
    with training_by_hand(cluster, checkout, pretend(checkout, 'echo "pid $$"; exec sleep 1000')) as terminal:
        wait_for(lambda: terminal.shown().count("pid ") == 2, 60, "both nodes")
        terminal.ctrl_c()
        wait_for(lambda: "saving, then stopping; Ctrl-C kills at once" in terminal.shown(), 20, "an answer")
        terminal.ctrl_c()
        assert terminal.wait() == 75, terminal.shown()
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", terminal.shown())]
    assert not any(map(is_running, pids))
    assert checkout.records("end")[0]["action"] == "leave"


def test_cancel_ends_the_training_and_not_the_job_around_it(cluster: MiniSlurm, checkout: Checkout) -> None:
    python = pretend(checkout, 'echo "pid $$"; exec sleep 1000')
    cluster.env["SIMCLR_PYTHON"] = str(python)
    (checkout.root / "tunnel.sh").write_text(
        "#!/bin/bash\nbash slurm/train.sh fake.yaml name=kept\necho code $?\nsleep 1000\n"
    )
    job = cluster.submit("--nodes=1", "--output=tunnel.out", "tunnel.sh", cwd=checkout.root)
    log, run_dir = checkout.root / "tunnel.out", checkout.root / "runs" / "kept"
    wait_for(lambda: log.exists() and "pid " in log.read_text(), 60, "the training")
    done = checkout.launch("cancel", str(run_dir), env=cluster.env)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: "code 75" in log.read_text(), 30, "the training's end")
    assert cluster.state(job) == "RUNNING"
    # That job goes on; the run is free for another one.
    again = checkout.launch("slurm", "fake.yaml", "name=kept", "--nodes=1", "--sbatch-arg=--hold", env=cluster.env)
    assert again.returncode == 0, again.stderr


def test_a_task_of_srun_can_start_it_too(cluster: MiniSlurm, checkout: Checkout) -> None:
    cluster.env["SIMCLR_PYTHON"] = str(pretend(checkout, "exit 0"))
    words = ("bash", "slurm/train.sh", "fake.yaml", "--nproc=1")
    done = cluster.run("srun", "--nodes=1", "--ntasks=1", "--exclusive", *words, cwd=checkout.root)
    assert "ended without a status (exit code 0)" in done.stderr
    assert (checkout.run_dir / "n1").read_text() == " cpus=4 tasks=1\n", done.stderr


# -- wrong places -----------------------------------------------------------------------------------------------------


def run_script(checkout: Checkout, *argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, env={**clean_environment(), **env}, text=True, capture_output=True, timeout=60)


def test_in_a_wrong_place_one_line_says_what_to_type(cluster: MiniSlurm, checkout: Checkout, tmp_path: Path) -> None:
    train = str(checkout.root / "slurm" / "train.sh")
    outside = run_script(checkout, "bash", train, "fake.yaml", cwd=checkout.root, SIMCLR_PYTHON=sys.executable)
    assert outside.returncode == 2
    assert outside.stderr.startswith("launcher: not inside a SLURM job: submit with `sbatch slurm/train.sh CONFIG`")
    assert len(outside.stderr.splitlines()) == 1, outside.stderr
    # From elsewhere, with an interpreter in which nothing is installed.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    cluster.env["SIMCLR_PYTHON"] = str(bare)
    job = cluster.submit("--nodes=1", train, "fake.yaml", cwd=tmp_path)
    assert end(cluster, checkout, job) == "FAILED"
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert log == (
        f"slurm/train.sh: {bare} has no launcher in {tmp_path}: submit from the repository's root, or export "
        "SIMCLR_PYTHON\n"
    )
