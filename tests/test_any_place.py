"""Runs that cannot be written to: read-only, somebody else's, on a full disk. pytest tests/test_any_place.py"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.errors import ConfigError
from simclr_dist.evaluation import offline
from simclr_dist.few_labels import train
from simclr_dist.run import results
from tests.test_evaluate import call, make_run

NOBODY = 65534
KINDS = [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's: others may look into it."""
    folder = Path(tempfile.mkdtemp(prefix="simclr-any-place-"))
    folder.chmod(0o755)
    make_run(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder / "runs" / "tiny", tmp_path / "tiny")


@contextmanager
def read_only(run: Path) -> Iterator[None]:
    """Nothing in it can be written; root becomes another user, whom modes hold back."""
    everything = [run, *run.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in everything}
    user = os.geteuid()
    for path, mode in modes.items():
        path.chmod((mode | 0o444 | (0o111 if path.is_dir() else 0)) & ~0o222)
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_read_only_run_is_evaluated_and_the_figure_comes_first(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    run, mine = folder / "runs" / "tiny", folder / "mine"
    call("evaluate", "knn", run, "--device", "cpu", "--no-cache", "--out", tmp_path_factory.mktemp("warm"))  # imports
    mine.mkdir(mode=0o777)
    mine.chmod(0o777)
    before = contents(run)
    capfd.readouterr()
    with read_only(run):
        for method in ("knn", "linear"):
            assert call("evaluate", method, run, "--device", "cpu") == 0
            shown = capfd.readouterr()
            assert "trained encoder" in shown.out
            assert shown.err.count("warning") == 1
            assert "not kept: features, the line in evaluations.jsonl (Permission denied" in shown.err
            assert "--out FOLDER keeps them elsewhere" in shown.err
        for _ in range(2):
            assert call("evaluate", "knn", run, "--device", "cpu", "--out", mine / "new" / "place") == 0
        shown = capfd.readouterr()
        assert "warning" not in shown.err
        assert f"from {mine / 'new' / 'place' / 'features'}" in shown.err
        for command in (("export", run, "--format", "safetensors"), ("finetune", run, "--epochs", 1)):
            with pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\); .* with --out"):
                call(*command)
        with pytest.raises(ConfigError, match=r"cannot be written to \(Permission denied\); choose another OUT"):
            call("embed", run, folder / "test", run / "x.npz")
        call("export", run, "--format", "safetensors", "--out", mine / "encoder.safetensors")
        call("finetune", run, "--epochs", 1, "--device", "cpu", "--out", mine / "tuned")
        call("embed", run, folder / "test", mine / "x.npz", "--device", "cpu")
    assert contents(run) == before
    lines = (mine / "new" / "place" / "evaluations.jsonl").read_text().splitlines()
    assert len({json.loads(line)["top1"] for line in lines}) == 1
    assert len(lines) == 2


@pytest.mark.parametrize("kind", KINDS, ids=[errno.errorcode[kind] for kind in KINDS])
def test_what_cannot_be_kept_is_one_warning_after_the_figure(
    run: Path, kind: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def refused(*_: object) -> None:
        raise OSError(kind, os.strerror(kind), str(run))

    monkeypatch.setattr(offline, "write_features", refused)
    monkeypatch.setattr(offline, "append_record", refused)
    assert call("evaluate", "knn", run, "--device", "cpu", "--baselines") == 0
    output = capsys.readouterr()
    assert "trained encoder" in output.out
    assert output.err.count("warning") == 1
    assert output.err.splitlines()[-1] == (
        f"warning: not kept: features, the line in evaluations.jsonl ({os.strerror(kind)}: {str(run)!r}); "
        "--out FOLDER keeps them elsewhere"
    )
    offline.evaluate(
        run, method="knn", show=lambda *_: told.append("figure"), device=offline.torch.device("cpu"), say=told.append
    )
    assert told.index("figure") == len(told) - 2
    assert told[-1].startswith("warning: not kept")


@pytest.mark.parametrize("in_the_way", ["features", "evaluations.jsonl", "both"])
def test_other_things_in_the_place_of_the_cache_or_the_record_are_a_warning(
    run: Path, in_the_way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if in_the_way != "evaluations.jsonl":
        (run / "features").write_text("")
    if in_the_way != "features":
        (run / "evaluations.jsonl").mkdir()
    assert call("evaluate", "knn", run, "--device", "cpu") == 0
    output = capsys.readouterr()
    assert "trained encoder" in output.out
    assert output.err.count("warning") == 1


@pytest.mark.parametrize("kind", KINDS, ids=[errno.errorcode[kind] for kind in KINDS])
def test_what_must_be_kept_is_refused_before_the_work(
    run: Path, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Any:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(results, "new_file_beside", refused)
    monkeypatch.setattr(train, "_random_crops", lambda *_: pytest.fail("the work has begun"))
    for command in (("finetune", run), ("export", run), ("report", run), ("embed", run, run, tmp_path / "x.npz")):
        with pytest.raises(ConfigError, match=rf"cannot be written to \({os.strerror(kind)}\)"):
            call(*command)


def test_a_classifier_that_cannot_be_written_in_the_end_leaves_its_figure_and_its_training(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("finetune", run, "--epochs", 2, "--device", "cpu")
    monkeypatch.setattr(train, "save_classifier", full)
    with pytest.raises(ConfigError, match=r"top-1 [\d.]+%, top-5 100.00%, but .* cannot be written to \(No space left"):
        call(*command)
    monkeypatch.undo()
    monkeypatch.setattr(train, "fine_tune", trains_no_step)
    assert call(*command) == 0


def trains_no_step(classifier: Any, crops: Any, training: Any) -> None:
    step, _ = training.unfinished.read()
    assert step == training.epochs * crops.batches_per_epoch
    train.linear_protocol.__globals__["fine_tune"](classifier, crops, training)
