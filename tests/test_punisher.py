"""tools/punisher.py: a punished run is the undisturbed one, and the tool would say so if it were not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SMALL = ("train.epochs=10", "data.test=null", "evaluation.knn_every_epochs=null")


def punisher(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "punisher.py"), str(REPOSITORY / "configs" / "smoke.yaml")]
    return subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )


def test_three_faults_leave_no_trace(tmp_path: Path) -> None:
    done = punisher(*SMALL, "--faults", "3", "--seed", "1", "--keep", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("over after") == 3
    assert "the same bytes" in done.stdout


def test_a_configuration_that_cannot_run_is_said(tmp_path: Path) -> None:
    done = punisher("train.epoch=3", "--faults", "1", "--keep", str(tmp_path))
    assert done.returncode == 2
    assert "the undisturbed run failed" in done.stderr
