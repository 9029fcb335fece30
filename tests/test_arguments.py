"""A slip on the command line is answered in plain words."""

from __future__ import annotations

import re
import subprocess

import pytest

from launcher import arguments
from simclr_dist import __version__, cli
from simclr_dist.argument_types import Parser
from simclr_dist.training import main
from tests.conftest import REPOSITORY

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
