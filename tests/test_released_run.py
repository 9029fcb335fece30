"""A run directory that release 0.1.0 wrote (commit d359088) is continued as that release would have continued it.

tests/golden/released_run holds steps 3 and 6 of one run on an AVX2 CPU with torch 2.15: synthetic images, LARS, an
online probe. Here its step 3 is continued to step 6.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simclr_dist.config import load_config
from tests.conftest import REPOSITORY

RELEASED = REPOSITORY / "tests" / "golden" / "released_run"
SAME_ARITHMETIC = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.__version__.startswith("2.15.")


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(RELEASED, folder / "released")
    shutil.rmtree(folder / "released" / "checkpoints" / "step_00000006")
    command = [sys.executable, "-m", "simclr_dist.train", str(RELEASED / "config.yaml"), f"runs_dir={folder}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=200, cwd=REPOSITORY, env=environment)
    return folder / "released"


def test_a_checkpoint_of_release_0_1_is_continued_to_the_same_state(continued: Path) -> None:
    """The same bytes where the CPU rounds like the one of the fixture, else the same numbers to rounding."""
    for name in ("model.safetensors", "optimizer.safetensors", "online_probe.safetensors"):
        ours, theirs = (run / "checkpoints" / "step_00000006" / name for run in (continued, RELEASED))
        if SAME_ARITHMETIC:
            assert ours.read_bytes() == theirs.read_bytes(), name
        expected = load_file(theirs)
        found = load_file(ours)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_the_log_of_release_0_1_goes_on_without_a_point_twice(continued: Path) -> None:
    steps = [
        line["step"]
        for line in map(json.loads, (continued / "log.jsonl").read_text().splitlines())
        if "train/loss" in line
    ]
    assert steps == [2, 4, 6]


def test_the_configuration_of_release_0_1_is_read() -> None:
    assert load_config(RELEASED / "config.yaml").name == "released"
