"""Records of a run: one reader that passes over what is damaged, one appender, and what looks at them.

A run's folder may come from anybody, and a kill may cut a line anywhere. pytest tests/test_records.py
"""

from __future__ import annotations

import json
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher import outcome, runs, sweep
from launcher.errors import LaunchError
from simclr_dist import cli
from simclr_dist.atomic import replaces
from simclr_dist.data.beton.reader import sidecar_path
from simclr_dist.data.loading.inspect import inspect_beton
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError
from simclr_dist.evaluation.offline import known_accuracy
from simclr_dist.monitor.events import Figures
from simclr_dist.monitor.log_file import LogFile
from simclr_dist.report.page import render
from simclr_dist.report.record import read_run
from simclr_dist.run import history, provenance
from simclr_dist.run.heartbeat import Heartbeats
from simclr_dist.run.layout import (
    LARGEST_LINE_BYTES,
    LARGEST_RECORD_BYTES,
    NUMBER,
    RecordFile,
    RunDir,
    append_record,
    is_a,
    is_share,
    read_record,
    read_records,
    write_record,
)
from simclr_dist.run.owner import claim, has_living_owner
from simclr_dist.run.status import Status, read_status
from simclr_dist.safe_text import message

DEEP = "[" * 5_000 + "]" * 5_000
DEEP_OBJECT = '{"a":' * 500 + "1" + "}" * 500
DAMAGED = [
    b'{"step": 7, "met',  # cut off by a kill
    b"[1, 2]",
    b"3",
    b"null",
    b'"text"',
    DEEP.encode(),
    DEEP_OBJECT.encode(),
    b'{"name": "\xff\xfe"}',
    b"\x00\x00\x00",
    b'{"n": ' + b"9" * 5_000 + b"}",
    b'{"long": "' + b"x" * (2 * LARGEST_LINE_BYTES) + b'"}',
]
VALUES = ["7", -1, 1e999, float("nan"), 10**300, None, True, [], [[]], {}, {"a": [1]}, "\x1b[2J", "\ud800", ""]
"""What may stand in a record where something else is expected."""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def line(**entries: Any) -> str:
    return json.dumps(entries) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The reader


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_damaged_line_is_left_out_and_counted_and_the_others_are_read(
    tmp_path: Path, damaged: bytes, place: str
) -> None:
    lines = [b'{"step": 1}', b'{"step": 2}']
    number = {"first": 0, "middle": 1, "last": 2}[place]
    lines.insert(number, damaged)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read_records(tmp_path / "a.jsonl")
    assert found == [{"step": 1}, {"step": 2}]
    assert found.damaged_lines == [number + 1]
    assert f"a.jsonl: 1 damaged line is left out (line {number + 1})" in (found.remark or "")


def test_many_damaged_lines_are_one_remark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n" + b"\n".join(DAMAGED))
    found = read_records(tmp_path / "a.jsonl")
    assert not found
    assert f"{len(DAMAGED)} damaged lines are left out (lines 3, 4, 5, 6, 7, …)" in (found.remark or "")


def test_a_line_with_an_entry_of_another_kind_counts_as_damaged(tmp_path: Path) -> None:
    good = [{"step": 1, "why": "x"}, {"step": 2}, {"step": 3, "why": None}]
    bad = [{"step": value} for value in VALUES if value != -1 and value != 10**300]
    bad += [{}, {"step": 1, "why": 3}]
    (tmp_path / "a.jsonl").write_text("".join(line(**record) for record in (*good, *bad)))
    found = read_records(tmp_path / "a.jsonl", step=int, why=str | None)
    assert found == good
    assert len(found.damaged_lines) == len(bad)


def test_what_is_no_plain_file_holds_no_records_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    for name in ("pipe", "folder", "endless", "gone", "absent"):
        assert read_records(tmp_path / f"{name}.jsonl") == []
        assert read_record(tmp_path / f"{name}.jsonl") is None
    with pytest.raises(OSError, match=r"plain file|No such device"):
        append_record(tmp_path / "pipe.jsonl", {})


@pytest.mark.parametrize("content", [b"", b"[]", DEEP.encode(), DEEP_OBJECT.encode(), b"\xff", b'{"a"', b"NaN"])
def test_a_file_that_is_no_record_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_record(tmp_path / "a.json") is None
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b'{"a": 1}')
        file.truncate(LARGEST_RECORD_BYTES + 1)
    assert read_record(tmp_path / "a.json") is None


def test_numbers_are_those_that_can_be_counted_with() -> None:
    assert [value for value in VALUES if is_a(value, NUMBER)] == [-1, 10**300]
    assert is_a(0.5, NUMBER)
    assert not is_a(0.5, int)
    assert not is_a(True, int)
    assert is_a(True, bool)
    assert is_a(None, int | None)


# ---------------------------------------------------------------------------------------------------------------------
# The appender


@pytest.mark.parametrize("cut", [b'{"half', b"x", b'{"step": 1}', b"\xff"])
def test_a_half_line_is_ended_before_the_next_record(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0}\n' + cut)
    append_record(path, {"step": 2})
    assert read_records(path)[-1] == {"step": 2}
    with path.open("ab") as file:  # another writer, killed
        file.write(cut)
    with RecordFile(path) as records:
        records.append({"step": 3})
        with path.open("ab") as file:
            file.write(cut)
        records.append({"step": 4})
    assert [record["step"] for record in read_records(path) if record["step"] > 1] == [2, 3, 4]


def test_the_log_ends_a_half_line_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path, 0)
    log.show(Figures({"train/loss": 1.0}, 1, 8))
    with path.open("ab") as file:
        file.write(b'{"step": 2, "sam')
    log.show(Figures({"train/loss": float("nan"), "train/lr": float("inf")}, 3, 24))
    log.close()
    log.close()
    found = read_records(path)
    assert [(record["step"], record.get("train/loss")) for record in found] == [(1, 1.0), (3, None)]
    assert found.damaged_lines == [2]
    assert "NaN" not in path.read_text()


def test_a_resume_keeps_the_whole_lines_up_to_its_step_and_says_what_goes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    odd = [line(samples_seen=value) for value in VALUES if not is_a(value, int)]
    path.write_bytes(b"\n".join([b'{"samples_seen": 8}', *DAMAGED, b'{"samples_seen": 16}', *map(str.encode, odd)]))
    log = LogFile(path, 8)
    assert log.remark is not None
    assert f"{len(DAMAGED)} damaged lines are left out" in log.remark
    log.close()
    assert path.read_text() == '{"samples_seen": 8}\n'
    log = LogFile(path, 8)
    assert log.remark is None
    log.close()


def test_records_go_into_no_other_file_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "evaluations.jsonl").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"):
        append_record(tmp_path / "evaluations.jsonl", {"step": 1})
    assert (tmp_path / "victim").read_text() == "mine\n"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        (tmp_path / "ordinary").touch()
        append_record(tmp_path / "a.jsonl", {})
        write_record(tmp_path / "a.json", {})
        LogFile(tmp_path / "log.jsonl", 0).close()
        with replaces(tmp_path / "weights.safetensors") as temporary:
            save_file({"w": torch.zeros(2)}, temporary)  # puts a file of its own there, which others cannot read
        outcome.record(tmp_path, "start", "1.0-aaaaaa")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.pop("attempts.jsonl") & 0o022 == 0  # `resume` refuses commands that others may have written
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_what_json_cannot_hold_is_written_as_null(tmp_path: Path) -> None:
    record = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("-inf"), "e": "NaN"}}
    append_record(tmp_path / "a.jsonl", record)
    write_record(tmp_path / "a.json", record)
    expected = {"a": None, "b": [None, 1.5], "c": {"d": None, "e": "NaN"}}
    assert read_records(tmp_path / "a.jsonl") == [expected]
    assert read_record(tmp_path / "a.json") == expected


# ---------------------------------------------------------------------------------------------------------------------
# Those who look at them


def hostile_lines(record: dict[str, Any]) -> bytes:
    """The record with each entry exchanged for each odd value, or missing, between damaged lines."""
    made = [record]
    for key in record:
        made += [{**record, key: value} for value in VALUES]
        made.append({other: value for other, value in record.items() if other != key})
    return b"\n".join([*DAMAGED, *(json.dumps(one).encode() for one in made), b'{"half'])


RECORDS = {
    "evaluations.jsonl": {
        "step": 7, "method": "knn", "k": 5, "temperature": 0.1, "train": "d", "test": "t", "train_images": 12,
        "test_images": 3, "image_size": 32, "precision": "fp32", "top1": 0.5, "top5": 0.75,
    },
    "environment.jsonl": {"time": "now", "git": "abc", "versions": {"torch": "2"}, "environment": {"A": "b"}},
    "log.jsonl": {"step": 1, "samples_seen": 8, "time": 3.0, "train/loss": 1.0, "eval/knn_top1": 0.5},
    "attempts.jsonl": {
        "event": "start", "attempt": "7.0-aaaaaa", "time": 3.0, "step": 0, "num_nodes": 1, "procs_per_node": 2,
        "job": "7", "workdir": "/", "again": ["slurm", "x"], "code": "", "why": "so", "rc": 1, "failed": True,
    },
}  # fmt: skip
LINEAGE = [
    {"event": "start", "time": "now", "step": 0, "from": None, "world_size": 1, "changed": {"a": [1, 2]}},
    {"event": "rewind", "time": "now", "to": "x", "set_aside": ["step_00000003"], "number": 1},
    {"event": "rewound", "number": 1},
    {"event": "end", "state": "finished", "step": 3},
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose every record has lines of every odd kind."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    for name, record in RECORDS.items():
        (run / name).write_bytes(hostile_lines(record))
    ends = hostile_lines({**RECORDS["attempts.jsonl"], "event": "end"})
    submits = hostile_lines({**RECORDS["attempts.jsonl"], "event": "submit"})
    with (run / "attempts.jsonl").open("ab") as file:
        file.write(b"\n" + ends + b"\n" + submits)
    (run / "lineage.jsonl").write_bytes(b"\n".join(map(hostile_lines, LINEAGE)))
    return run


def command(main: Any, *arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code in (0, None)


def test_runs_are_listed_shown_and_reported_whatever_their_records_hold(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(cli.main, "runs", "list", hostile.parent)
    assert "50.00 %" in capsys.readouterr().out
    command(cli.main, "runs", "show", hostile)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for name in ("lineage", "log", "evaluations", "environment", "attempts"):
        assert shown.count(f"{name}.jsonl: ") == 1
    run = read_run(hostile)
    assert len(run.remarks) == 3
    page = render({"run": run}, {"run": "no images"}, "")
    page.encode("utf-8")  # no lone surrogates
    assert "50.00% (step 7)" in page
    assert page.count("evaluations.jsonl: ") == 1


def test_the_launcher_reads_attempts_whatever_they_hold(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.__main__ import main

    assert main(["status", str(hostile)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count("attempts.jsonl: ") == 1
    assert outcome.earlier_attempts(hostile, "7.9-aaaaaa")
    assert outcome.start_step(hostile, "7.0-aaaaaa") in (0, -1, 10**300)
    assert sweep.last_results(hostile) == {"train/loss": 1.0, "eval/knn_top1": 0.5}  # the last accuracy
    runs.slurm_job(hostile)
    runs.code_of(hostile)


@pytest.mark.parametrize("again", [None, [], [1], "slurm", ["a\nb"]])
def test_a_submission_that_says_no_command_is_refused_in_words(tmp_path: Path, again: Any) -> None:
    outcome.record(tmp_path, "submit", "7.0-000000", job="7", workdir="/", again=again)
    with pytest.raises(LaunchError):
        runs.started_with(tmp_path)


def test_the_history_and_the_clean_up_of_a_resume_take_any_lineage(hostile: Path) -> None:
    list(history.tell(hostile))
    history.settle(hostile)
    history.is_finished(hostile)
    assert provenance.drew_from_generator(hostile) in (True, False)
    for value in VALUES:
        (hostile / "lineage.jsonl").write_text(line(event="rewind", set_aside=["step_00000003"], number=value))
        assert history.settle(hostile) == []
        (hostile / "environment.jsonl").write_text(line(versions=value))
        provenance.drew_from_generator(hostile)
    assert (hostile / "checkpoints" / "step_00000003").exists()


def test_accuracies_for_a_card_are_the_whole_ones_and_what_is_left_out_is_said_once(hostile: Path) -> None:
    class Found:
        path, step = hostile / "checkpoints" / "step_00000007", 7

    said: list[str] = []
    figures = known_accuracy(Found, said.append)  # type: ignore[arg-type]
    assert {type(value) for value in figures.values()} <= {int, float}
    assert figures["knn (k=5) top1 on t; T=0.1, 12 training images of d, 3 test images, 32 px, fp32"] == 0.5
    assert len(said) == 1


@pytest.mark.parametrize("value", VALUES)
def test_marks_and_states_of_any_shape_are_taken_or_left(tmp_path: Path, value: Any) -> None:
    run = RunDir(tmp_path)
    checkpoint = run.checkpoint(3)
    checkpoint.mkdir(parents=True)
    RunDir.best_mark(checkpoint).write_text(line(knn_top1=value))
    best = history.best_so_far(tmp_path)
    assert (best is not None) == is_share(value)
    for key in ("state", "step", "reason", "message", "time"):
        run.status.write_text(line(**{"state": "running", "step": 1, key: value}))
        status = read_status(tmp_path)
        assert status is None or isinstance(status, Status)
    for key in ("milestones", "best_step", "best_knn_top1"):
        run.kept_by_release_0_1.write_text(line(**{"milestones": [], "best_step": 3, "best_knn_top1": 0.5, key: value}))
        history.prune(tmp_path, 1)
        assert checkpoint.exists()
    for key in ("session", "process", "since"):
        run.owner.write_text(line(**{"session": "a", "attempt": "b", "since": "c", "process": {}, key: value}))
        assert has_living_owner(tmp_path) is False
    for key in ("host", "machine", "pid", "start"):
        process = {"host": "h", "machine": "m", "pid": 1, "start": "2", key: value}
        run.owner.write_text(line(session="a", attempt="b", since="c", process=process))
        has_living_owner(tmp_path)
    for key in ("rank", "host", "pid", "step", "doing", "where"):
        beats = Heartbeats(tmp_path, "s", 0, 2, 60.0)
        beat = {"rank": 1, "host": "h", "pid": 1, "step": 2, "doing": "x", "where": "y"}
        run.heartbeat("s", 1).parent.mkdir(parents=True, exist_ok=True)
        run.heartbeat("s", 1).write_text(line(**{**beat, key: value}))
        beats.write(1, "training", "here")
        assert "rank" in beats.describe_ranks()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", DEEP.encode(), b'{"session": 1}', b"null"])
def test_an_owner_file_that_says_nothing_owns_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "owner.json").write_bytes(content)
    claim(tmp_path).release()
    assert not (tmp_path / "owner.json").exists()


def test_a_sidecar_of_any_shape_is_used_or_refused_in_words(images: Path, tmp_path: Path) -> None:
    beton = tmp_path / "x.beton"
    beton.symlink_to(images)
    good = json.loads(sidecar_path(images).read_text())
    groups = [[1], [{"reason": 1}], [{"reason": 1, "count": 1e999, "names": 3}]]
    made = [{**good, key: value} for key in good for value in VALUES]
    made += [{**good, "account": {**good["account"], key: v}} for key in good["account"] for v in (*VALUES, *groups)]
    refused: list[DataError] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it belongs to another file
        for content in (*(json.dumps(one).encode() for one in made), *DAMAGED):
            beton.with_name("x.beton.json").write_bytes(content)  # of a link: beside the link
            try:
                assert describe(str(beton)).num_samples == 512
                inspect_beton(beton, False, lambda done, total: None).account  # noqa: B018
            except DataError as error:
                refused.append(error)
    assert 0 < len(refused) < len(made)
    assert all(line.isprintable() for error in refused for line in message(error).split("\n"))


def test_reading_is_quick_beside_parsing(tmp_path: Path) -> None:
    """A check against work that grows with the square of something: a bound that a slow machine keeps, too."""
    import time

    record = {"step": 1, "samples_seen": 8, **{f"speed/figure_{i}": i / 7 for i in range(12)}}
    (tmp_path / "log.jsonl").write_text(line(**record) * 20_000)
    begin = time.process_time()
    assert len(read_records(tmp_path / "log.jsonl", samples_seen=int)) == 20_000
    assert time.process_time() - begin < 20
    assert sys.getrecursionlimit() < 5_000  # so that DEEP is deep
