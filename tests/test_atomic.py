"""Files appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from simclr_dist.atomic import replace_text, replaces


def test_the_content_is_on_disk_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: events.append(f"{os.fstat(file).st_size} bytes on disk"))
    monkeypatch.setattr(os, "replace", lambda source, target: events.append(f"named {target.name}"))
    replace_text(tmp_path / "status.json", "content")
    assert events[:2] == ["7 bytes on disk", "named status.json"]


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    replace_text(tmp_path / "file", "before")

    def fail_half_way() -> None:
        with replaces(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_two_writers_with_one_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process numbers are the same in two containers, and on two hosts."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with replaces(tmp_path / "file") as first, replaces(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # the outer one ends last
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_that_somebody_else_has_made_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "00")
    (tmp_path / "target").write_text("theirs")
    (tmp_path / ".file.00.tmp").symlink_to("target")
    with pytest.raises(FileExistsError):
        replace_text(tmp_path / "file", "ours")
    assert (tmp_path / "target").read_text() == "theirs"
