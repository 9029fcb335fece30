"""A .beton file and its sidecar belong together wherever a kill falls, and a stale one is never used in silence."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.beton.reader import next_sidecar_path, sidecar_path
from simclr_dist.data.loading.open_images import describe
from simclr_dist.errors import DataError
from tests.images import make_folder

_OPERATIONS = ("open", "fsync", "replace", "rename", "unlink", "fchmod")
_KILLED = 9


def prepare_and_die(source: Path, out: Path, after: int) -> bool:
    """In a process of its own that is killed after so many operations on files; False if it came to its end before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this one only writes files
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _KILLED
    try:
        done = 0

        def counted(operation: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                if done == after:
                    os._exit(_KILLED)
                done += 1
                return operation(*args, **kwargs)

            return call

        for name in _OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        prepare(source, out, num_workers=1, overwrite=True)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("there_before", [True, False], ids=["replaced", "new"])
def test_a_kill_between_any_two_operations_leaves_a_file_with_its_own_names(there_before: bool, tmp_path: Path) -> None:
    for name, num_classes in (("old", 2), ("new", 4)):
        make_folder(tmp_path / name, 4, num_classes=num_classes)
    begin, states = tmp_path / "begin", []
    begin.mkdir()
    if there_before:
        prepare(tmp_path / "old", begin / "out.beton", num_workers=1)
    for after in range(100):
        folder = tmp_path / f"killed{after}"
        shutil.copytree(begin, folder)
        out = folder / "out.beton"
        killed = prepare_and_die(tmp_path / "new", out, after)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one would say that the names are not used
            names = describe(str(out)).class_names if out.exists() else ()
        states.append(len(names))
        prepare(tmp_path / "new", out, num_workers=1, overwrite=True)
        assert len(describe(str(out)).class_names) == 4
        left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert left == {"out.beton", "out.beton.json"}, after
        if not killed:
            break
    assert len(states) > 6
    assert states == sorted(states)
    assert set(states) == {2 if there_before else 0, 4}


def test_a_staged_sidecar_of_another_file_is_not_used(tmp_path: Path) -> None:
    for name, num_classes in (("a", 2), ("b", 3)):
        make_folder(tmp_path / name, 6, num_classes=num_classes)
        prepare(tmp_path / name, tmp_path / f"{name}.beton", num_workers=1)
    a, b = tmp_path / "a.beton", tmp_path / "b.beton"
    shutil.copy(sidecar_path(b), next_sidecar_path(a))
    assert describe(str(a)).class_names == ("class0", "class1")
    sidecar_path(a).unlink()
    assert describe(str(a)).class_names == ("0", "1")
    shutil.copy(sidecar_path(b), sidecar_path(a))
    with pytest.warns(UserWarning, match="belongs to another file"):
        assert describe(str(a)).class_names == ("0", "1")


@pytest.mark.parametrize(
    "content", [[], "text", 3, {"class_names": "abc"}, {"class_names": [1, 2]}, {"class_names": {}}]
)
def test_a_sidecar_of_another_shape_is_refused_by_name(content: Any, tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 4)
    prepare(tmp_path / "in", tmp_path / "a.beton", num_workers=1)
    sidecar_path(tmp_path / "a.beton").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.beton\.json: is not what `prepare` writes: class_names must be"):
        describe(str(tmp_path / "a.beton"))
