"""A log file for each rank: nothing of it is lost, and it costs no training. Run: pytest tests/test_output.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.run import output
from simclr_dist.run.layout import RunDir
from simclr_dist.run.output import Recorder
from tests.conftest import REPOSITORY

ATTEMPT = "7.0-abcdef"


def worker(folder: Path, code: str, rank: int = 0, **streams: object) -> subprocess.Popen[bytes]:
    """A worker as an agent starts it, whose trainer is `code`."""
    (folder / f"trainer{rank}.py").write_text(f"import os, signal, sys\n{code}\n")
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{folder}", "RANK": str(rank), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "simclr_dist.run.output", f"trainer{rank}", "an", "argument"]
    return subprocess.Popen(command, env=environment, **streams)  # type: ignore[call-overload]


def log_of(folder: Path, rank: int = 0) -> str:
    return RunDir(folder).rank_log(ATTEMPT, rank).read_text()


def test_each_rank_has_its_file_and_all_is_seen_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('out', os.environ['RANK'], sys.argv[1:]); os.write(2, b'err from C\\n'); os.system('echo a child')"
    with Recorder(tmp_path, ATTEMPT):
        workers = [worker(tmp_path, code, rank) for rank in range(2)]
        assert [each.wait(60) for each in workers] == [0, 0]
    seen = capfd.readouterr()
    for rank in range(2):
        line = f"out {rank} ['an', 'argument']"
        assert sorted(log_of(tmp_path, rank).splitlines()) == ["a child", "err from C", line]
        assert line in seen.out
    assert seen.err == "err from C\n" * 2
    assert RunDir(tmp_path).rank_log(ATTEMPT, 0).stat().st_mode & 0o007 == 0


def test_a_killed_worker_leaves_its_last_words_in_order(tmp_path: Path) -> None:
    code = "for i in range(20000): print(i, file=(sys.stdout, sys.stderr)[i % 2])\nos.kill(os.getpid(), signal.SIGKILL)"
    with Recorder(tmp_path, ATTEMPT), open(os.devnull, "wb") as one:
        assert worker(tmp_path, code, stdout=one, stderr=one).wait(60) == -signal.SIGKILL
    assert log_of(tmp_path).split() == [str(i) for i in range(20000)]


def test_a_trainer_that_cannot_be_imported_is_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path, ATTEMPT):
        assert worker(tmp_path, "import no_such_thing", rank=3).wait(60) == 1
    assert "No module named 'no_such_thing'" in log_of(tmp_path, 3)


def test_a_file_does_not_grow_without_limit_and_keeps_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "LARGEST_BYTES", 100_000)
    with Recorder(tmp_path, ATTEMPT):
        assert worker(tmp_path, "for i in range(50000): print(f'{i:9d}')").wait(60) == 0
    newest = RunDir(tmp_path).rank_log(ATTEMPT, 0)
    assert newest.stat().st_size <= 100_000
    assert os.stat(f"{newest}.1").st_size <= 100_000
    assert newest.read_text().split()[-1] == "49999"
    assert len(capfd.readouterr().out.splitlines()) == 50_000


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, ATTEMPT):
        RunDir(tmp_path).rank_log(ATTEMPT, 0).mkdir()
        assert worker(tmp_path, "print('goes on')").wait(60) == 0
    seen = capfd.readouterr()
    assert seen.out == "goes on\n"
    assert "rank_00000.log: not recorded any longer: Is a directory" in seen.err
    (tmp_path / "file").touch()
    with Recorder(tmp_path / "file", ATTEMPT):
        assert worker(tmp_path, "print('goes on')").wait(60) == 0
    assert "the output of each rank is not recorded" in capfd.readouterr().err


def test_a_process_that_is_left_behind_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_WAIT_S", 0.5)
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    start = time.monotonic()
    with Recorder(tmp_path, ATTEMPT):
        assert worker(tmp_path, code).wait(60) == 0
    assert time.monotonic() - start < 50
    os.kill(int(log_of(tmp_path)), signal.SIGKILL)


def test_rank_0_keeps_its_terminal(tmp_path: Path) -> None:
    terminal, inside = os.openpty()
    code = "print(os.isatty(1), os.isatty(2)); print('error', file=sys.stderr)"
    with Recorder(tmp_path, ATTEMPT):
        workers = [worker(tmp_path, code, rank, stdout=inside, stderr=inside) for rank in range(2)]
        assert [each.wait(60) for each in workers] == [0, 0]
    os.close(inside)
    assert os.read(terminal, 100).splitlines() == [b"True False"]
    os.close(terminal)
    assert log_of(tmp_path, 0) == "error\n"
    assert log_of(tmp_path, 1) == "False False\nerror\n"


def test_a_late_request_to_stop_kills_no_worker_on_its_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMCLR_STOP_SIGNAL", "USR1")
    code = """
signal.signal(signal.SIGUSR1, lambda number, frame: None)
class Late:  # what is left at the end of the interpreter
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)
sys.modules["late"] = Late()
"""
    assert worker(tmp_path, code).wait(60) == 0


def test_without_an_agent_that_records_all_is_as_it_was(tmp_path: Path) -> None:
    done = worker(tmp_path, "print('plain')", stdout=subprocess.PIPE)
    assert done.communicate(timeout=60)[0] == b"plain\n"
