"""tools/fuzz.py: no finding in the readers, its inputs come again, and it notices what it looks for."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import pytest

from simclr_dist.errors import DataError
from tests.conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "fuzz.py"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setenv("SIMCLR_MAX_PIXELS", "4194304")
    import fuzz  # type: ignore[import-not-found]

    return fuzz


def test_a_few_inputs_of_each_target_have_no_finding(fuzz: ModuleType, tmp_path: Path) -> None:
    for name in fuzz.TARGETS:
        for number in range(10):
            fuzz.try_input(name, fuzz.make_input(name, 1, number), tmp_path)


def test_an_input_is_a_function_of_target_seed_and_number(fuzz: ModuleType) -> None:
    for name in ("tar", "yaml"):
        first = [fuzz.make_input(name, 5, number) for number in range(100)]
        fuzz._seeds.cache_clear()
        assert [fuzz.make_input(name, 5, number) for number in range(100)] == first
        assert len(set(first)) > 80
        assert first[:2] == fuzz._seeds(name)[:2]
        assert [fuzz.make_input(name, 6, number) for number in range(10, 20)] != first[10:20]


def test_what_is_no_message_for_people_is_a_finding(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EndlessError(DataError):
        def __str__(self) -> str:
            return "x" * 200_000

    def read(content: bytes, folder: Path) -> None:
        if content == b"message":
            raise DataError("a message")
        raise {b"key": KeyError("x"), b"long": EndlessError()}[content]

    monkeypatch.setitem(fuzz.TARGETS, "planted", fuzz.Target(lambda: [b"message", b"key", b"long"], read))
    fuzz.try_input("planted", b"message", tmp_path)
    for content, error in ((b"key", KeyError), (b"long", RuntimeError)):
        with pytest.raises(error):
            fuzz.try_input("planted", content, tmp_path)
    with pytest.raises(KeyError):
        fuzz.main(["planted", "--input", "1", "--save", str(tmp_path / "saved")])
    assert (tmp_path / "saved").read_bytes() == b"key"
    assert fuzz.main(["planted", "--input", "0"]) == 0
    assert "no finding" in capsys.readouterr().out


FORK = multiprocessing.get_context("fork")


def ends_badly(name: str, seed: int, start: int, wire: Connection) -> None:
    """A worker that crashes at input 2, and has a finding at 4."""
    number = start
    while True:
        wire.send((number, "KeyError" if number == 4 else None))
        if number == 2:
            os.kill(os.getpid(), 9)
        time.sleep(0.01)
        number += 1


def test_a_crash_is_a_finding_and_the_search_goes_on_after_it(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MOST_FINDINGS", 2)
    monkeypatch.setattr(fuzz.multiprocessing, "get_context", lambda kind: FORK)  # which imports nothing anew
    count, findings = fuzz.search("yaml", 0, 60, ends_badly)
    assert findings == [(2, "the process ended with signal 9"), (4, "KeyError")]
    assert count == 5
    assert list(fuzz._lines("yaml", 7, findings))[1] == "    python tools/fuzz.py yaml --seed 7 --input 2"
    assert "more than 20 s of CPU" in fuzz._ended_by(-27)


@pytest.mark.slow
def test_a_minute_of_it_has_no_finding(fuzz: ModuleType) -> None:
    """With another seed each day, so that the inputs of many days are more than those of one."""
    seed = str(int(time.time()) // 86400)
    command = [sys.executable, str(TOOL), "--seconds", "60", "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 findings") == len(fuzz.TARGETS)
