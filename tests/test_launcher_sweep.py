"""Sweeps: what a file of settings means, and which GPUs each run gets. Run: pytest tests/test_launcher_sweep.py"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from launcher import __main__ as cli
from launcher import gpus, sweep
from launcher.errors import LaunchError
from tests.launcher_checkout import make_checkout


def test_a_grid_and_a_list_give_one_group_of_settings_a_run(tmp_path: Path) -> None:
    (tmp_path / "grid").write_text("grid: {a.b: [1, 2], c: [x, 0.00001]}")
    assert sweep.read_points(tmp_path / "grid") == [
        ["a.b=1", "c=x"],
        ["a.b=1", "c=1.0e-05"],
        ["a.b=2", "c=x"],
        ["a.b=2", "c=1.0e-05"],
    ]
    (tmp_path / "list").write_text("list: [{a: true}, {a: null, b: [1, 2]}]")
    assert sweep.read_points(tmp_path / "list") == [["a=true"], ["a=null", "b=[1, 2]"]]


@pytest.mark.parametrize(
    "text", ["", "grid: {}", "grid: {a: 1}", "list: []", "list: [1]", "x: 1", "a: [", "grid: {a: [1]}\nlist: []"]
)
def test_a_sweep_with_mistakes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep").write_text(text)
    with pytest.raises(LaunchError):
        sweep.read_points(tmp_path / "sweep")


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_mistake_in_any_point_is_found_before_the_first_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    monkeypatch.chdir(checkout.root)
    (checkout.root / "sweep.yaml").write_text("list: [{seed: 1}, {model.widht: 3}]")
    assert cli.main(["show", backend, "fake.yaml", "--sweep=sweep.yaml", "--device=cpu"]) == 2
    assert "did you mean `width`?" in capsys.readouterr().err


def pretend_four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "".join(f"GPU {index}: pretended\n" for index in range(4))
    monkeypatch.setattr(gpus, "here", lambda: gpus.examine(gpus.View(os.environ, lambda argv: (0, listing))))


@pytest.mark.parametrize(
    ("jobs", "nproc", "visible", "expected"),
    [(1, None, None, (4, 4)), (2, None, None, (2, 2)), (3, 1, None, (1, 1)), (2, None, "3,1", (1, 1))],
)
def test_runs_side_by_side_get_their_share(
    monkeypatch: pytest.MonkeyPatch, jobs: int, nproc: int | None, visible: str | None, expected: tuple[int, int]
) -> None:
    pretend_four_gpus(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep._share(argparse.Namespace(device="auto", nproc=nproc, jobs=jobs)) == expected


def test_more_runs_side_by_side_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_four_gpus(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for jobs, nproc in ((5, None), (3, 2)):
        with pytest.raises(LaunchError, match="there are 4 GPUs here"):
            sweep._share(argparse.Namespace(device="auto", nproc=nproc, jobs=jobs))
    assert sweep._share(argparse.Namespace(device="cpu", nproc=2, jobs=8)) == (0, 2)


def test_a_slot_keeps_its_gpus() -> None:
    assert [sweep.devices_of_slot(slot, 2, {})["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["0,1", "2,3"]
    assert sweep.devices_of_slot(1, 1, {"CUDA_VISIBLE_DEVICES": "5,GPU-ab"}) == {"CUDA_VISIBLE_DEVICES": "GPU-ab"}
    assert sweep.devices_of_slot(1, 1, {"HIP_VISIBLE_DEVICES": "5,6"})["HIP_VISIBLE_DEVICES"] == "6"
    assert sweep.devices_of_slot(1, 0, {}) == {}
