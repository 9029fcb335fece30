"""Every file of a run is named in run/layout.py alone, and records are read and written there."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from simclr_dist.run.layout import RunDir, append_record, read_record, read_records, write_record
from tests.test_architecture import modules

RUN = RunDir(Path("RUN"))
PLACES = [getattr(RUN, name) for name, member in vars(RunDir).items() if isinstance(member, property)]
NAMES = {place.name for place in PLACES} | {RUN.stop_request("").name}
FOLDERS = {name for name in NAMES if name.islower() and "." not in name}
"""Words such as `logs` and `export`, which may also name a command: only their use in a path counts."""
PATH_METHODS = ("joinpath", "glob", "rglob")


def spelled_names(path: Path) -> list[str]:
    """The names of a run's files that are written out in the code of a module, with their lines."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    in_paths = {id(side) for node in nodes if isinstance(node, ast.BinOp) for side in (node.left, node.right)}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATH_METHODS:
            in_paths |= {id(argument) for argument in node.args}
    found = []
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value.rstrip("*").strip("/")
            if word in NAMES - FOLDERS or (word in FOLDERS and id(node) in in_paths):
                found.append(f"{path}:{node.lineno}: {node.value!r}")
    return found


def test_files_of_a_run_are_named_in_one_place() -> None:
    layout = Path(RunDir.__module__.replace(".", "/")).with_suffix(".py")
    others = [path for path in [*modules("launcher"), *modules("simclr_dist")] if not path.match(str(layout))]
    found = [line for path in others for line in spelled_names(path)]
    assert not found, "\n".join(found)


def test_the_check_notices_a_spelled_name(tmp_path: Path) -> None:
    for code in (
        'run / "plan.json"',
        'f"{run}/status.json"',
        'glob("STOP_REQUEST.*")',
        'run / "logs"',
        'open("STOP")',
    ):
        (tmp_path / "module.py").write_text(code)
        assert spelled_names(tmp_path / "module.py"), code
    (tmp_path / "module.py").write_text('parser.add_parser("logs", help="the newest of RUN/logs")')
    assert not spelled_names(tmp_path / "module.py")


def test_naming_a_place_creates_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.list_checkpoints() == run.stop_requests() == []
    assert RunDir.of_checkpoint(run.checkpoint(12)) == run
    assert not run.path.exists()


def test_an_unfinished_line_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "cut o\n[3]\n')
    append_record(path, {"n": 4})
    with path.open("a") as file:
        file.write('{"n": 5, "cut o')
    append_record(path, {"n": 6})
    assert read_records(path) == [{"n": 1}, {"n": 4}, {"n": 6}]
    assert read_records(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_an_unreadable_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path / "record.json") is None
    assert read_record(tmp_path / "absent") is None


def test_a_record_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"n": 1})
    with pytest.raises(TypeError):
        write_record(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        write_record(tmp_path / "absent" / "record.json", {})
