"""Whoever reads a run's checkpoints beside its training finds a valid one, and whatever is wrong with one, another."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from simclr_dist import cli
from simclr_dist.checkpoint import files, lineage
from simclr_dist.checkpoint.pretrained import load_pretrained
from simclr_dist.errors import CheckpointError
from simclr_dist.export.export import export
from simclr_dist.report.record import read_run
from simclr_dist.run import history
from simclr_dist.run.layout import RunDir
from simclr_dist.run.state import TrainState
from tests.test_checkpoint import CONFIG, save, trained


def snapshot_of_step_1() -> files.Snapshot:
    model, optimizer = trained()
    return files.take_snapshot(
        config=CONFIG,
        state=TrainState(1, 4),
        fingerprint="f",
        model=model,
        optimizer=optimizer,
        grad_scaler={},
        versions={},
    )


def save_for_ever(run_dir: Path, snapshot: files.Snapshot) -> None:
    """A training that saves at every step and keeps two, on a disk that is fast. Ends when `stop` is there."""
    step = 0
    with mock.patch.object(files, "flush"):
        while not (run_dir / "stop").exists():
            step += 1
            content = {**snapshot.content, "step": step}
            files.write_checkpoint(
                RunDir(run_dir).checkpoints, replace(snapshot, step=step, content=content), attempt="a"
            )
            assert not history.prune(run_dir, 2)
            time.sleep(0.005)


@contextlib.contextmanager
def training(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir()
    process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(run_dir, snapshot_of_step_1()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one only writes files
        process.start()
    try:
        while not lineage.list_checkpoints(run_dir):
            assert process.is_alive()
        yield
    finally:
        (run_dir / "stop").touch()
        process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("num_reads", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_reader_beside_a_fast_training_always_finds_a_valid_one(num_reads: int, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    with training(run_dir):
        steps = [lineage.find_checkpoint(run_dir, said.append).step for _ in range(num_reads)]
    assert not said
    assert steps == sorted(steps)
    assert len(set(steps)) > num_reads // 20  # there was a training beside


def test_the_commands_beside_a_fast_training_find_one_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    with training(run_dir):
        for i in range(5):
            model, checkpoint = load_pretrained(run_dir)
            assert torch.equal(
                model.state_dict()["encoder.conv1.weight"], checkpoint.model_state["encoder.conv1.weight"]
            )
            assert read_run(run_dir).settings["name"] == "test"
            for words in (["runs", "show", str(run_dir)], ["runs", "list", str(tmp_path)]):
                with pytest.raises(SystemExit) as end:
                    cli.main(words)
                assert end.value.code == 0
            found = lineage.find_checkpoint(run_dir)
            while found.path.exists():
                time.sleep(0.005)
            export(found, tmp_path / f"{i}.safetensors", format="safetensors")  # read before its directory went
    assert "Traceback" not in capsys.readouterr().err


def wrong_files() -> dict[str, Callable[[Path], None]]:
    def text(name: str, content: str) -> Callable[[Path], None]:
        return lambda path: (path / name).write_text(content)  # type: ignore[func-returns-value]

    def manifest(entries: str) -> Callable[[Path], None]:
        return text("MANIFEST.json", f'{{"format": 1, "files": {entries}}}')

    def folder(path: Path) -> None:
        (path / "state.json").unlink()
        (path / "state.json").mkdir()

    three = '{"model.safetensors": %s, "optimizer.safetensors": %s, "state.json": %s}'
    return {
        "deep": text("MANIFEST.json", "[" * 100_000),
        "a list": text("MANIFEST.json", "[]"),
        "numbers for files": manifest(three % (1, 2, 3)),
        "lists for files": manifest(three % ("[]", "[]", "[]")),
        "no utf-8": lambda path: (path / "MANIFEST.json").write_bytes(b"\xff\xfe") and None,
        "a folder": folder,
        "another format": text("MANIFEST.json", '{"format": 1e999}'),
    }


@pytest.mark.parametrize("wrong", wrong_files())
def test_whatever_is_wrong_with_one_the_next_is_taken(wrong: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    older, newer = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    wrong_files()[wrong](newer)
    said: list[str] = []
    assert lineage.find_checkpoint(tmp_path, said.append).path == older
    assert len(said) == 1
    assert said[0].startswith(f"damaged checkpoint: {newer}")
    assert len(said[0]) < 500


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied"),
     OSError(errno.ESTALE, "Stale file handle"), KeyError("F4"), RuntimeError("invalid"), AttributeError("x"),
     RecursionError("too deep"), OverflowError("inf")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("within", ["_sha256", "load_file", "read_json"])
def test_any_exception_about_one_means_the_next(
    error: Exception, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    older, newer = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    real = getattr(files, within)

    def fails(path: Path, *args: Any) -> Any:
        if path.parent == newer:
            raise error
        return real(path, *args)

    monkeypatch.setattr(files, within, fails)
    said: list[str] = []
    assert lineage.newest_valid(tmp_path, said.append, set_aside=True).path == older
    assert len(said) == 1


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, *trained())
    monkeypatch.setattr(files, "load_file", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        lineage.newest_valid(tmp_path, print, set_aside=True)
    assert path.exists()


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read: Permission denied"):
        lineage.newest_valid(tmp_path, print)
