"""One run directory, one training: who is refused, who takes over, and what the one that lost finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simclr_dist.errors import OwnershipError
from simclr_dist.run import owner
from simclr_dist.run.owner import claim
from simclr_dist.run.process import Process


def edit(run_dir: Path, **changes: object) -> None:
    """As if somebody else had written the owner's file."""
    path = run_dir / "owner.json"
    values = json.loads(path.read_text())
    values["process"] |= changes.pop("process", {})  # type: ignore[operator]
    path.write_text(json.dumps(values | changes))


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def process_of(pid: int) -> Process:
    found = Process.this()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(found, pid=pid, start=started)


def test_a_living_owner_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    first = claim(tmp_path)
    before = (tmp_path / "owner.json").read_bytes()
    with pytest.raises(OwnershipError, match=f"process {os.getpid()} on .*STOP"):
        claim(tmp_path)
    assert (tmp_path / "owner.json").read_bytes() == before
    first.check()


def test_a_released_directory_is_free(tmp_path: Path) -> None:
    claim(tmp_path).release()
    claim(tmp_path).touch()


def test_a_dead_owner_on_this_machine_is_followed_at_once(tmp_path: Path, sleeper) -> None:
    earlier = claim(tmp_path)
    edit(tmp_path, process=vars(process_of(sleeper.pid)))
    with pytest.raises(OwnershipError):
        claim(tmp_path)
    sleeper.communicate()
    claim(tmp_path)
    with pytest.raises(OwnershipError, match="taken over"):
        earlier.check()


def test_a_number_that_belongs_to_another_process_by_now_is_no_owner(tmp_path: Path) -> None:
    claim(tmp_path)
    edit(tmp_path, process={"start": "1"})
    claim(tmp_path)


def test_an_owner_elsewhere_is_believed_for_a_minute(tmp_path: Path) -> None:
    claim(tmp_path)
    edit(tmp_path, process={"machine": "another boot", "host": "node7"})
    with pytest.raises(OwnershipError, match="on node7"):
        claim(tmp_path)
    stale = (tmp_path / "owner.json").stat().st_mtime - owner.STALE_S - 1
    os.utime(tmp_path / "owner.json", (stale, stale))
    claim(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "mine", "allowed"),
    [
        ("812.0-aaaaaa", "812.1-bbbbbb", True),
        ("812.1-aaaaaa", "812.0-bbbbbb", False),
        ("812.0-aaaaaa", "813.1-bbbbbb", False),
        ("pid77", "812.1-bbbbbb", False),
    ],
)
def test_only_a_later_attempt_of_the_same_job_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str, mine: str, allowed: bool
) -> None:
    monkeypatch.setenv("SIMCLR_ATTEMPT", theirs)
    earlier = claim(tmp_path)
    monkeypatch.setenv("SIMCLR_ATTEMPT", mine)
    if not allowed:
        with pytest.raises(OwnershipError):
            claim(tmp_path)
        return
    claim(tmp_path)
    with pytest.raises(OwnershipError, match=f"attempt {mine}"):
        earlier.touch()
    earlier.release()  # of somebody else's: does nothing
    assert (tmp_path / "owner.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"session": 1}'])
def test_an_unreadable_file_owns_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "owner.json").write_text(text)
    claim(tmp_path)


def test_a_vanished_directory_is_an_os_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ownership = claim(run)
    run.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="No such file"):
        ownership.check()
