"""benchmarks/gpu.sh runs end to end at toy sizes, goes on where it was, and says when a part fails."""

from __future__ import annotations

import json
import os
import re
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
        timeout=1100,
        check=False,
    )


def folders(tmp_path: Path) -> tuple[str, ...]:
    return "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dry_run_measures_every_part_and_a_second_call_repeats_none(tmp_path: Path) -> None:
    first = gpu_sh("--dry-run", *folders(tmp_path), "--minutes", "16", "--commit", "abc1234")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "computed ones of the size of Imagenette's" in first.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    parts = ["tests", "loss", "step-resnet18", "step-resnet50", "step-vit-s16", "cifar"]
    assert found["states"] == dict.fromkeys(parts, "done")
    assert found["commit"] == "abc1234"
    assert set(found["results"]) == set(parts[1:])
    assert found["results"]["step-resnet18"]["images_per_s"] > 0
    assert "augment" in found["results"]["step-vit-s16"]["computed_by"]
    assert found["results"]["step-vit-s16"]["settings"]["data"].endswith("computed_pictures.beton")
    assert 0 <= found["results"]["cifar"]["linear"] <= 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.txt", "gpu.json", "logs.txt"}
    second = gpu_sh("--dry-run", *folders(tmp_path))
    assert second.returncode == 0
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["states"] == dict.fromkeys(parts, "done before")


def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *benchmarks.loss*) exit 7;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = gpu_sh("--dry-run", *folders(tmp_path), "loss", "tests", PYTHON=str(python))
    assert done.returncode == 1
    states = json.loads((tmp_path / "out" / "gpu.json").read_text())["states"]
    assert states == {"loss": "FAILED (7)", "tests": "done"}


def test_what_cannot_be_imported_is_named_first_with_the_way_to_carry_it(tmp_path: Path) -> None:
    """On a machine without pydantic and ffcv: nothing has run yet when it is said."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDES)
    done = gpu_sh("--dry-run", *folders(tmp_path), "loss", PYTHONPATH=str(tmp_path / "hidden"))
    assert done.returncode == 2
    assert "missing for" in done.stderr
    assert ": pydantic, pydantic-core." in done.stderr
    assert re.search(r"pip download .*--dest wheels pydantic==\S+ pydantic-core==\S+$", done.stderr, re.MULTILINE)
    assert "bash tools/build_ffcv_wheel.sh wheels" in done.stderr
    assert "benchmarks/gpu.sh --wheels wheels" in done.stderr
    assert done.stdout == ""


HIDES = """
import sys
for name in ("pydantic", "pydantic_core", "ffcv"):
    sys.modules[name] = None
"""


def test_git_ignores_what_the_script_writes_by_itself() -> None:
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    script = (REPOSITORY / "benchmarks" / "gpu.sh").read_text()
    for option in ("out", "work"):
        folder = re.search(rf"\b{option}=(\w+)", script)
        assert folder is not None
        assert f"/{folder.group(1)}/" in ignored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--minutes", "soon"), "--minutes: expected a number"), (("everything",), "unknown argument: everything")],
)
def test_a_slip_on_the_command_line_is_named(arguments: tuple[str, ...], message: str) -> None:
    done = gpu_sh(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
