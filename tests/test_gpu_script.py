"""benchmarks/gpu.sh runs end to end at toy sizes, goes on where it was, and says when a part fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def gpu_sh(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_measures_every_part_and_a_second_call_repeats_none(tmp_path: Path) -> None:
    first = gpu_sh("--dry-run", "--out", str(tmp_path), "--minutes", "4", "--commit", "abc1234")
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    parts = ["tests", "loss", "step-resnet18", "step-resnet50", "cifar"]
    assert found["states"] == dict.fromkeys(parts, "done")
    assert found["commit"] == "abc1234"
    assert set(found["results"]) == set(parts[1:])
    assert found["results"]["step-resnet18"]["images_per_s"] > 0
    assert 0 <= found["results"]["cifar"]["linear"] <= 1
    second = gpu_sh("--dry-run", "--out", str(tmp_path))
    assert second.returncode == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["states"] == dict.fromkeys(parts, "done before")


def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *benchmarks.loss*) exit 7;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = gpu_sh("--dry-run", "--out", str(tmp_path / "out"), "loss", "tests", PYTHON=str(python))
    assert done.returncode == 1
    states = json.loads((tmp_path / "out" / "gpu.json").read_text())["states"]
    assert states == {"loss": "FAILED (7)", "tests": "done"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--minutes", "soon"), "--minutes: expected a number"), (("everything",), "unknown argument: everything")],
)
def test_a_slip_on_the_command_line_is_named(arguments: tuple[str, ...], message: str) -> None:
    done = gpu_sh(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
