"""Whoever asks a training to stop, and however: it saves, says so, and the next start is not stopped by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import processes
from launcher.runs import is_over
from simclr_dist.run import stop_signals
from simclr_dist.run.owner import claim
from simclr_dist.run.status import write_status
from simclr_dist.run.stop_signals import StopSignals
from tests.conftest import REPOSITORY
from tests.training import Training

LONG = ("train.epochs=100", "train.max_steps=150", "checkpoint.every_min=null", "monitor.image_pairs=0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "closed terminal"])
def test_ctrl_c_saves_and_says_so(images: Path, tmp_path: Path, number: signal.Signals) -> None:
    training = Training(images, tmp_path, "run", *LONG)
    training.wait_until(lambda: training.has_logged(2))
    training.ranks[0].send_signal(number)
    assert training.wait() == [0], training.output
    status = training.status()
    assert status["state"] == "preempted"
    assert (training.run_dir / "checkpoints" / f"step_{status['step']:08d}").is_dir()
    assert not (training.run_dir / "owner.json").exists()
    again = Training(images, tmp_path, "run", *LONG, f"train.max_steps={status['step'] + 1}")
    assert again.wait() == [0], again.output
    assert again.status()["state"] == "finished"


def test_torchruns_copy_of_a_ctrl_c_is_not_a_second_one(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", *LONG, world_size=2, TORCHELASTIC_RUN_ID="x")
    training.wait_until(lambda: training.has_logged(2))
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        for rank in training.ranks:
            rank.send_signal(number)
    assert training.wait() == [0, 0], training.output
    assert training.status()["state"] == "preempted"


def test_a_signal_while_the_parts_are_built_ends_the_training_before_its_first_step(
    images: Path, tmp_path: Path
) -> None:
    training = Training(images, tmp_path, "run", *LONG)
    training.wait_until(lambda: "starting 1 process" in training.ranks[0].output())
    training.ranks[0].send_signal(signal.SIGTERM)
    assert training.wait() == [0], training.output
    assert (training.status()["state"], training.status()["step"]) == ("preempted", 0)


def test_a_second_ctrl_c_ends_at_once_and_a_save_cannot_hide_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # within SECOND_AFTER_S
        assert signals.heard
        monkeypatch.setattr(stop_signals, "SECOND_AFTER_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with signals:  # an inner user of the same signals
            pass
        assert signals.heard
    assert signal.getsignal(signal.SIGINT) == before
    assert not signals.heard


def test_what_runs_in_the_background_or_under_nohup_ignores_the_terminal() -> None:
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)]
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.heard
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_a_stop_from_an_earlier_life_does_not_end_the_next_start(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("STOP", "SAVE", "STOP_REQUEST.local_1.0-abcdef"):
        (run_dir / name).touch()
        os.utime(run_dir / name, (time.time() - 60,) * 2)
    training = Training(images, tmp_path, "run", "train.max_steps=2", "monitor.image_pairs=0")
    assert training.wait() == [0], training.output
    assert (training.status()["state"], training.status()["step"]) == ("finished", 2)
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(("STOP", "SAVE"))]


def test_a_stop_for_this_start_is_heard_before_its_first_step(images: Path, tmp_path: Path) -> None:
    training = Training(images, tmp_path, "run", *LONG)
    training.wait_until(lambda: training.run_dir.is_dir())
    (training.run_dir / "STOP").touch()
    assert training.wait() == [0], training.output
    assert training.status()["state"] == "stopped"
    assert not (training.run_dir / "STOP").exists()


def test_a_killed_training_is_over_although_its_status_says_that_it_runs(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=3)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from pathlib import Path; import simclr_dist.run.owner as o; o.claim(Path('{tmp_path}'))",
        ],
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0
    assert is_over(tmp_path)
    claim(tmp_path)
    assert not is_over(tmp_path)


def test_the_first_process_of_a_container_can_start_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """There getppid() of a child is 1, as it is for an orphan elsewhere."""
    monkeypatch.setattr(processes, "_prctl", lambda *_: None)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    in_child = processes.die_with_this_process()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    in_child()
    assert left == []
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    processes.die_with_this_process()()  # its parent, 4711, has ended: init is its parent now
    assert left == [1]


STREAMS = """
import os, subprocess, sys
from simclr_dist.streams import make_output_safe
make_output_safe()
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream, flush=True)
    stream.isatty(), stream.fileno()
opened = os.open(os.devnull, os.O_RDONLY)
assert opened > 2, opened
subprocess.run([sys.executable, "-c", "print(1)"], check=False)
open("done", "w").close()
"""


@pytest.mark.parametrize("how", ["closed", "a pipe without reader", "a full disk"])
def test_output_that_goes_nowhere_ends_no_program(tmp_path: Path, how: str) -> None:
    def redirect() -> None:
        for number in (1, 2):
            if how == "closed":
                os.close(number)
                continue
            if how == "a full disk":
                target = os.open("/dev/full", os.O_WRONLY)
            else:
                reader, target = os.pipe()
                os.close(reader)
            os.dup2(target, number)

    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", STREAMS], cwd=tmp_path, env=env, preexec_fn=redirect, check=False, timeout=60
    )
    assert done.returncode == 0
    assert (tmp_path / "done").exists()
