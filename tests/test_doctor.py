"""The doctor names what is broken, with a remedy, and never breaks itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simclr_dist.doctor import checks as doctor
from simclr_dist.doctor import command
from simclr_dist.doctor.data import cpu_quota
from simclr_dist.doctor.environment import examine_environment
from simclr_dist.doctor.finding import Finding
from tests.conftest import REPOSITORY


def hide(folder: Path, *modules: str, code: str = "raise ImportError('hidden')") -> str:
    """A folder for PYTHONPATH in which `modules` do something else than they should."""
    for name in modules:
        (folder / f"{name}.py").write_text(code)
    return str(folder)


def probed() -> list[Finding]:
    return list(doctor.examine_torch({}))


def test_whatever_is_broken_becomes_a_line_and_never_a_traceback(tmp_path: Path) -> None:
    path = hide(tmp_path, "torch", "numpy", "numba", "cv2", "rich", "yaml", "pydantic", "psutil")
    done = subprocess.run(
        [sys.executable, "-m", "simclr_dist.doctor", "configs/smoke.yaml", "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    found = {f["what"]: f for f in json.loads(done.stdout)["findings"]}
    for what in ("torch", "data path", "configs/smoke.yaml", "NUMBA_DISABLE_JIT"):
        assert found[what]["level"] == "problem", what
    assert "hidden" in found["torch"]["found"]
    assert "unset it" in found["WORLD_SIZE"]["advice"]


@pytest.mark.parametrize(
    ("code", "end"),
    [("import os; os.abort()", "ended with signal 6"), ("import time; time.sleep(60)", "hangs: no answer in 2 s")],
    ids=["aborts", "hangs"],
)
def test_a_torch_that_aborts_or_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, end: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", hide(tmp_path, "torch", code=code))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 2.0 if "hangs" in end else 60.0)
    (finding,) = probed()
    assert (finding.level, finding.what) == ("problem", "torch")
    assert finding.found.startswith(end)


def test_rows_are_shown_as_soon_as_they_are_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[str, str]] = []

    def examine(*_: object, tell: Callable[[str], None]) -> Iterator[Finding]:
        yield Finding("ok", "Python", "works")
        tell("torch is being tried")
        shown.append(capsys.readouterr())
        yield Finding("warning", "torch", "slow", "wait")

    monkeypatch.setattr(command, "examine", examine)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 0
    ((out, err),) = shown
    assert "Python" in out
    assert "torch is being tried" in err
    assert capsys.readouterr().out.endswith("0 problems, 1 warnings\n")
    assert command.run(parser.parse_args(["--json"])) == 0
    assert shown[1] == ("", "")


def test_inherited_variables_are_named_with_what_to_do() -> None:
    found = list(examine_environment({"RANK": "3", "NCCL_IB_DISABLE": "1", "OMP_NUM_THREADS": "1", "HOME": "/"}))
    assert [(f.what, f.level) for f in found] == [
        ("NCCL_IB_DISABLE", "warning"),
        ("OMP_NUM_THREADS", "ok"),
        ("RANK", "warning"),
    ]
    assert all(f.advice for f in found)


def test_a_folder_that_cannot_hold_checkpoints_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = doctor.examine_folder("runs_dir", tmp_path / "file" / "runs", 0)
    assert finding.level == "problem"
    (finding,) = doctor.examine_folder("runs_dir", tmp_path / "later" / "runs", 0)
    assert "rename work" in finding.found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]  # nothing stays behind
    (finding,) = doctor.examine_folder("runs_dir", tmp_path, 2**60)
    assert finding.level == "problem"


def test_problems_of_a_configuration_and_its_data_are_in_the_table(tmp_path: Path) -> None:
    smoke = str(REPOSITORY / "configs" / "smoke.yaml")
    wrong = list(doctor.examine_config(smoke, ["train.epoch=3"], {}))
    assert [f.level for f in wrong] == ["problem"]
    assert "did you mean `epochs`" in wrong[0].found
    absent = list(doctor.examine_config(smoke, [f"data.train={tmp_path}/x.beton", f"runs_dir={tmp_path}"], {}))
    (data,) = [f for f in absent if f.what == "data.train"]
    assert (data.level, data.advice) == ("problem", f"simclr-dist prepare SOURCE {tmp_path}/x.beton")


def test_a_containers_share_of_the_cpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path / "cpu.max") == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path / "cpu.max") is None
    assert cpu_quota(tmp_path / "absent") is None
