"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simclr_dist.atomic import replace_text, replaces


def test_the_content_is_on_disk_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(f"flushed {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append("named")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    replace_text(tmp_path / "status.json", "content")
    assert events[:2] == ["flushed 7 bytes", "named"]
    assert (tmp_path / "status.json").read_text() == "content"


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    replace_text(tmp_path / "file", "before")

    def fail_half_way() -> None:
        with replaces(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
