"""tools/mutate.py: its table fits the code, a broken promise is noticed, and a promise without a test is named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

TOOL = REPOSITORY / "tools" / "mutate.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


TABLE = load_tool().read_table()


def mutate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.promise)
def test_every_row_fits_the_code_and_names_tests_that_exist(row) -> None:  # type: ignore[no-untyped-def]
    sound, broken = row.texts(REPOSITORY)
    assert sound != broken
    for test in row.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (REPOSITORY / file).read_text()


def test_promises_have_different_names() -> None:
    assert len({row.promise for row in TABLE}) == len(TABLE)


@pytest.mark.slow
def test_broken_promises_are_noticed() -> None:
    done = mutate("--only", "order:")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "3 of 3 broken promises were noticed"


@pytest.mark.slow
def test_a_promise_that_no_test_keeps_is_named(tmp_path: Path) -> None:
    row = '[[mutation]]\npromise = "{}"\nfile = "simclr_dist/data/order.py"\nold = "{}"\nnew = "x"\ntests = ["{}"]\n'
    table = tmp_path / "table.toml"
    table.write_text(row.format("says what it does", "a pure function", "tests/test_order.py"))
    done = mutate("--table", str(table))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SURVIVED  says what it does" in done.stdout
    table.write_text(row.format("is gone", "no such text", "tests/test_order.py"))
    done = mutate("--table", str(table))
    assert done.returncode == 2
    assert "is gone: found 0 times in simclr_dist/data/order.py" in done.stderr
