"""A slip on the command line is answered in plain words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import arguments
from simclr_dist import __version__, cli
from simclr_dist.argument_types import Parser
from simclr_dist.training import main
from tests.conftest import REPOSITORY

LOCK = [line for line in (REPOSITORY / "requirements.lock").read_text().splitlines() if re.match(r"\w", line)]
PROGRAMS = {"simclr-dist": cli.parser, "launcher": arguments.parser, "train": main.parser}


def answer(program: str, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    parse = arguments.parse if program == "launcher" else PROGRAMS[program]().parse_args
    with pytest.raises(SystemExit) as left:
        parse(command.split())
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "command", "expected"),
    [
        ("simclr-dist", "evalute knn runs/a", "did you mean evaluate?"),
        ("simclr-dist", "evaluate nkn runs/a", "did you mean knn?"),
        ("simclr-dist", "export runs/a --fromat onnx", "did you mean --format?"),
        ("simclr-dist", "export runs/a --format onx", "did you mean onnx?"),
        ("launcher", "lokal configs/smoke.yaml", "did you mean local?"),
        ("launcher", "local configs/smoke.yaml --nprocs 2", "did you mean --nproc?"),
        ("launcher", "local", "missing: CONFIG;"),
        ("simclr-dist", "export", "missing: RUN_OR_WEIGHTS;"),
        ("train", "", "missing: config;"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_word_or_what_is_missing(
    program: str, command: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(program, command, capsys)
    assert expected in said
    assert "key=value" not in said.splitlines()[-1]


def test_what_resembles_nothing_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in answer("simclr-dist", "frobnicate", capsys)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_its_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = PROGRAMS[program]()
    assert isinstance(parser, Parser)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--version"])
    assert left.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["-h"], 0), ([], 2), (["--hlep"], 2)])
def test_the_installer_makes_no_folder_of_an_option(words: list[str], code: int) -> None:
    done = subprocess.run(
        ["bash", "tools/install.sh", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == code
    assert re.match("usage: bash tools/install.sh FOLDER", done.stdout)
    assert not (REPOSITORY / "--help").exists()


@pytest.mark.parametrize("index", ["https://download.pytorch.org/whl/cpu", "https://mirror.example/cpu"])
def test_an_installation_for_cpus_asks_for_nothing_of_cuda(index: str, tmp_path: Path) -> None:
    """A stand-in for the virtual environment's Python writes down what pip is asked for."""
    (tmp_path / "bin").mkdir()
    stand_in, asked = tmp_path / "bin" / "python", tmp_path / "asked"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    stand_in.chmod(0o755)
    chosen = {} if "pytorch.org" in index else {"TORCH_INDEX": index}
    environment = {**os.environ, "PYTHON": sys.executable, "TORCH": "cpu", "SIMCLR_WITHOUT_FFCV": "1", **chosen}
    command = ["bash", "tools/install.sh", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=60)
    calls = asked.read_text().splitlines()
    versions = [line for line in LOCK if re.match(r"torch(vision)?==", line)]
    (of_torch,) = [call for call in calls if "--index-url" in call]
    assert of_torch.endswith(f"--no-deps --index-url {index} {' '.join(versions)}")
    (lock,) = [call.split()[-1] for call in calls if " -r " in call]
    kept = Path(lock).read_text().splitlines()
    assert {line.partition("==")[0] for line in LOCK} - {line.partition("==")[0] for line in kept} >= {"triton"}
    assert not any(line.startswith(("nvidia", "cuda", "triton==")) for line in kept)
    assert all(line in kept for line in LOCK if not line.startswith(("nvidia", "cuda", "triton==")))


def test_an_unknown_build_of_torch_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH": "gpu", "PYTHON": sys.executable}
    command = ["bash", "tools/install.sh", str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TORCH=gpu: the one choice is TORCH=cpu" in done.stderr
