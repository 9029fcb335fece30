"""What people and programs read while a training runs: on a terminal of any width, in a file, in a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simclr_dist.config import load_config
from simclr_dist.monitor.terminal import Quiet, TerminalStyle, build_terminal
from simclr_dist.network.simclr import build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.parallel.distributed import World
from simclr_dist.training.summary import kept_bytes, learning_rate_formula, split_of_batch
from tests.conftest import REPOSITORY
from tests.training import TINY, Training

ROWS = {"global batch": "64 = 1 device x 64 images", "run directory": "runs/" + 60 * "x"}
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


def play(terminal: Quiet) -> None:
    """A training of 16 steps, as the monitor tells it."""
    terminal.start()
    terminal.summarize("start", "mine: starts at step 0 of 16", ROWS)
    for step in range(1, 17):
        terminal.advance(step)
        terminal.log({"step": step, "samples_seen": 64 * step, "train/loss": 4.5, "speed/images_per_s": 1234.0})
        if step == 8:
            terminal.log({"step": step, "samples_seen": 64 * step, "eval/knn_top1": 0.5})
            terminal.log({"step": step, "samples_seen": 64 * step, "speed/checkpoint_s": 0.1})
            print("a foreign package's word")
            terminal.warn("[careful]")
    terminal.summarize("end", "finished at step 16 of 16", {"loss": "4.5000"})
    terminal.close()


def played(style: TerminalStyle) -> None:
    play(build_terminal(style, total_steps=16, first_step=0, steps_per_epoch=8))


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls something with stdout and stderr on a pseudo-terminal; what appeared there."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def call(action: Callable[[], None], width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        main, terminal = pty.openpty()
        shown: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # Linux's word for: the other end is closed
                while part := os.read(main, 65536):
                    shown.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            with os.fdopen(terminal, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                action()
        finally:
            reader.join()
            os.close(main)
        return b"".join(shown).decode()

    return call


def lines_of(shown: str) -> list[str]:
    """Each state that a line was in, without escape sequences."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_wider_than_the_terminal(on_terminal: Callable[..., str], width: int) -> None:
    lines = lines_of(on_terminal(lambda: played("auto"), width))
    foreign = [line for line in lines if "careful" not in line]  # warnings are for the eye, the terminal breaks them
    assert max(map(len, foreign)) <= width
    last = [line for line in lines if "16/16" in line][-1]
    assert "eta 0:00:0" in last
    assert "loss 4.5" in last
    assert ("kNN 50.00%" in last) == (width >= 80)
    assert ("━" in last) == (width >= 60)
    text = "".join(line.strip() for line in lines)
    assert 60 * "x" in text  # folded, not cut
    assert lines[-2:] == ["  loss  4.5000", ""]  # the table is what stays in sight


def test_no_color_takes_the_colours_away(on_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert COLOUR.search(on_terminal(lambda: played("auto"), 80))
    monkeypatch.setenv("NO_COLOR", "1")
    without = on_terminal(lambda: played("auto"), 80)
    assert "\x1b[" in without  # the bar still moves
    assert not COLOUR.search(without)


def test_a_dumb_terminal_gets_lines(on_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_terminal(lambda: played("auto"), 80)


@pytest.mark.parametrize("force", ["", "1"])
def test_a_pipe_gets_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, force: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", force)  # CI systems set it
    monkeypatch.setenv("COLUMNS", "40")
    played("auto")
    out, err = capsys.readouterr()
    assert "\r" not in out
    assert "\x1b[?25l" not in out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert lines[:3] == [
        "mine: starts at step 0 of 16",
        "  global batch   64 = 1 device x 64 images",
        "  run directory  runs/" + 60 * "x",
    ]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 17  # a checkpoint's time alone is no news
    assert steps[7].startswith("step 8/16  loss 4.5000  1,234 images/s  eta ")
    assert steps[-1].startswith("step 16/16  loss 4.5000  kNN 50.00%  1,234 images/s  eta 0:00:00")
    assert "warning: [careful]" in re.sub(r"\x1b\[[0-9;]*m", "", err)


def test_quiet_says_nothing_but_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as foreign:
        played("quiet")
    assert foreign.getvalue() == "a foreign package's word\n"
    assert capsys.readouterr().err == "warning: [careful]\n"


def test_json_lines_are_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    played("json")
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["start", *["log"] * 18, "end"]
    assert events[0]["global batch"] == ROWS["global batch"]
    assert events[1]["train/loss"] == 4.5
    assert err.splitlines() == ["a foreign package's word", "warning: [careful]"]
    print("again")
    assert capsys.readouterr().out == "again\n"


# ---------------------------------------------------------------------------------------------------------------------
# The tables' content


@pytest.mark.parametrize(
    ("world", "micro_batch_size", "text"),
    [
        (World(0, 1, 0, 1), None, "4,096 = 1 device x 4,096 images"),
        (World(0, 8, 0, 8), None, "4,096 = 8 devices x 512 images"),
        (World(0, 64, 0, 8), 32, "4,096 = 8 nodes x 8 devices x 64 images, in micro-batches of 32"),
        (World(0, 4, 0, 1), 1024, "4,096 = 4 nodes x 1 device x 1,024 images"),
    ],
)
def test_the_batch_is_split_over_nodes_devices_and_micro_batches(
    world: World, micro_batch_size: int | None, text: str
) -> None:
    assert split_of_batch(4096, world, micro_batch_size) == text
    assert eval(re.sub(r"[^\d x]", "", text.partition("=")[2].partition(" in ")[0]).replace("x", "*")) == 4096


@pytest.mark.parametrize(
    ("scaling", "text"), [("linear", "0.1 x 64/256 = 0.025"), ("sqrt", "0.1 x sqrt(64) = 0.8"), ("none", "0.1")]
)
def test_the_learning_rate_comes_with_its_formula(scaling: str, text: str) -> None:
    config = load_config(REPOSITORY / "configs" / "smoke.yaml", [f"optim.lr_scaling={scaling}"])
    assert learning_rate_formula(config) == text


def test_kept_memory_is_that_of_a_real_step() -> None:
    config = load_config(REPOSITORY / "configs" / "smoke.yaml", ["optim.optimizer=adamw"])
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim)
    model(torch.randn(2, 3, 32, 32))[1].sum().backward()
    optimizer.step()
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    held += [x for state in optimizer.state.values() for x in state.values()]
    assert kept_bytes(config, model) == sum(x.nbytes for x in held if x is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Real trainings


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path("synthetic")


@pytest.mark.distributed
def test_ranks_but_the_first_are_silent_and_json_is_json(images: Path, tmp_path: Path) -> None:
    training = Training(
        images, tmp_path, "json", "--json", "train.max_steps=2", "model.batch_norm=per_device", world_size=2
    )
    assert training.wait() == [0, 0], training.output
    first, second = training.output
    assert second == ""
    lines = first.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]  # the test reads stderr as well
    assert len(warnings) == 1
    events = [json.loads(line) for line in lines if line not in warnings]
    assert events[0]["event"] == "start"
    assert events[0]["global batch"] == "64 = 2 devices x 32 images"
    assert events[-1]["event"] == "end"
    assert events[-1]["checkpoint"].endswith("step_00000002")
    assert events[1]["speed/images_per_s_per_device"] == pytest.approx(events[1]["speed/images_per_s"] / 2)
    assert events[1]["speed/model_tflops_per_device"] > 0


def test_quiet_training_is_quiet(images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simclr_dist.train", str(REPOSITORY / "configs" / "smoke.yaml"), "--quiet"]
    command += [*TINY, "train.max_steps=2", f"runs_dir={tmp_path}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert found.stdout == found.stderr == ""
    assert json.loads((tmp_path / "smoke" / "status.json").read_text())["state"] == "finished"
