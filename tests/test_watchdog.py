"""The watchdog's rules and messages, without a training: tests that need one are in test_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.run.heartbeat import Heartbeats
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.timed

PROGRAM = """
import signal, sys, time
from pathlib import Path
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.watchdog import Watchdog
signal.signal(signal.SIGUSR1, lambda *_: None)
run, work = Path(sys.argv[1]), sys.argv[2]
def on_hang(message): (run / "hang").write_text(message)
with Watchdog(Heartbeats(run, "s", 0, 1, 0.8), stop_signals={signal.SIGUSR1}, stop_s=0.5, on_hang=on_hang) as dog:
    exec(work)
print("went on")
"""


def under_watch(run: Path, work: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), work],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_rank_that_makes_progress_is_left_alone_and_leaves_no_file(tmp_path: Path) -> None:
    done = under_watch(tmp_path, "for i in range(8): dog.doing('training', i, 0.6, 'step_s'); time.sleep(0.2)")
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert not (tmp_path / "heartbeat").exists()


def test_a_limit_that_passed_ends_the_process_with_stacks_and_reason(tmp_path: Path) -> None:
    done = under_watch(tmp_path, "dog.doing('training', 7, 0.3, 'step_s'); time.sleep(60)")
    assert done.returncode == 1
    message = (tmp_path / "hang").read_text()
    assert "no progress for 0.3 s (timeout.step_s): step 7, training" in message
    assert 'File "<string>"' in done.stderr  # where the main thread was
    assert "went on" not in done.stdout


def test_a_busy_activity_has_its_own_limit_and_then_the_old_one_counts_again(tmp_path: Path) -> None:
    work = "dog.doing('training', 7, 0.3, 'step_s')\nwith dog.busy('saving', 30, 'save_s'): time.sleep(1)\n"
    assert under_watch(tmp_path, work).returncode == 0
    done = under_watch(tmp_path, work + "time.sleep(60)")  # and afterwards the old one again
    assert done.returncode == 1
    assert "training" in (tmp_path / "hang").read_text()


def test_a_stop_signal_ends_a_step_that_does_not_end_but_not_a_save(tmp_path: Path) -> None:
    interrupt = "import os; os.kill(os.getpid(), signal.SIGUSR1)\n"
    stuck = "dog.doing('training', 7, 600, 'step_s', stoppable=True)\n" + interrupt + "time.sleep(60)"
    assert under_watch(tmp_path, stuck).returncode == 1
    assert "0.5 s after a stop signal" in (tmp_path / "hang").read_text()
    saving = "dog.doing('saving', 7, 600, 'save_s')\n" + interrupt + "time.sleep(1.5)"
    assert under_watch(tmp_path, saving).returncode == 0


def test_an_unwritable_run_directory_does_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file where the folder should be")
    assert under_watch(tmp_path, "dog.doing('training', 0, 30, 'step_s'); time.sleep(0.5)").returncode == 0


def test_the_report_names_the_silent_the_late_and_the_odd_rank(tmp_path: Path) -> None:
    world, here = 6, 5
    for rank, (step, where) in enumerate([(9, "loss.py:1"), (9, "loss.py:1"), (8, "loader.py:2"), (9, "loss.py:1")]):
        Heartbeats(tmp_path, "s", rank, world, 4.0).write(step, "training", where)
    own = Heartbeats(tmp_path, "s", here, world, 4.0)
    own.write(9, "training", "augment.py:3")
    silent = tmp_path / "heartbeat" / "s" / "rank_00001.json"
    long_ago = time.time() - 100
    os.utime(silent, (long_ago, long_ago))
    assert json.loads(silent.read_text())["rank"] == 1
    lines = own.describe_ranks().splitlines()
    assert "rank 1 " in lines[0]
    assert "no sign of life for 100 s; it was at step 9, training, in loss.py:1" in lines[0]
    assert lines[1].strip() == "rank 4 has given no sign of life at all"
    assert [line.strip() for line in lines[2:]] == [
        "rank 2: at step 8, training, in loader.py:2",
        "rank 5: at step 9, training, in augment.py:3",
        "ranks 0, 3: at step 9, training, in loss.py:1",
    ]


def test_all_ranks_together_do_not_flood_the_file_system(tmp_path: Path) -> None:
    for world in (1, 64, 1024):
        heartbeats = Heartbeats(tmp_path, "s", 0, world, 120.0)
        assert world / heartbeats.interval_s <= 20.0
        assert heartbeats.interval_s < 60
