"""Files appear whole or not at all."""

from __future__ import annotations

import os
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
