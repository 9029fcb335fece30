"""The shape of the house: imports point down, the launcher knows no torch, torch.distributed has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import REPOSITORY

MAX_FLOORS = 9


def modules(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(dotted: str) -> str:
    """The package a module lies in; a module at the top of simclr_dist is a room of its own."""
    path = REPOSITORY.joinpath(*dotted.split("."))
    if path.is_dir() or (path.parent == REPOSITORY / "simclr_dist" and path.with_suffix(".py").exists()):
        return dotted
    return room_of(dotted.rpartition(".")[0])


def floors() -> list[set[str]]:
    """Rooms that import only rooms of the floors before. Raises CycleError where two packages import each other."""
    arrows: dict[str, set[str]] = {}
    for path in [*modules("simclr_dist"), *modules("launcher")]:
        own = room_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"))
        ours = {name for name in imported_names(path) if name.split(".")[0] in ("simclr_dist", "launcher")}
        arrows.setdefault(own, set()).update({room_of(name) for name in ours} - {own})
    assert not any("launcher" in names for room, names in arrows.items() if room != "launcher")
    sorter, found = TopologicalSorter(arrows), []
    sorter.prepare()
    while sorter.is_active():
        found.append(set(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def test_a_package_imports_only_packages_below_it() -> None:
    assert len(floors()) <= MAX_FLOORS


def test_the_architecture_page_shows_every_package_on_its_floor() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    picture = page.split("```")[1]
    shown = re.split(r"^(?=\d )", picture, flags=re.MULTILINE)[:0:-1]  # from the ground up
    assert len(shown) == len(floors())
    for text, rooms in zip(shown, floors(), strict=True):
        names = {room.removeprefix("simclr_dist.").replace(".", "/") for room in rooms} - {"simclr_dist"}
        assert names <= set(re.split(r"[\s,]+", text)), names


def test_only_the_trainer_and_the_commands_see_the_whole_configuration() -> None:
    allowed = {"simclr_dist.config", "simclr_dist.checkpoint", "simclr_dist.training", "simclr_dist.cli"}
    allowed.add("simclr_dist.api.py")
    users = {
        str(path.relative_to(REPOSITORY))
        for path in modules("simclr_dist")
        if ".".join(path.relative_to(REPOSITORY).parts[:2]) not in allowed
        and imported_names(path) & {"simclr_dist.config.Config", "simclr_dist.config.schema.Config"}
    }
    assert not users


def test_only_one_module_talks_to_torch_distributed() -> None:
    users = {
        path.name
        for path in modules("simclr_dist")
        if any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in imported_names(path))
    }
    assert users == {"distributed.py"}


def test_launcher_works_without_torch() -> None:
    block = "import sys; sys.modules['torch'] = None; import launcher.__main__, launcher.arguments as a; a.parser()"
    subprocess.run([sys.executable, "-c", block], check=True, cwd=REPOSITORY, timeout=60)


def test_ffcv_has_one_door() -> None:
    doors = {
        path.name
        for path in modules("simclr_dist")
        if any(name == "ffcv" or name.startswith("ffcv.") for name in imported_names(path))
    }
    assert doors <= {"ffcv_import.py", "ffcv_operation.py"}, doors


def test_nothing_unpickles_unsafely() -> None:
    suspicious = ("weights_only=False", "pickle.load(", "allow_pickle=True", "yaml.load(", "shell=True", "os.system(")
    for path in [*modules("simclr_dist"), *modules("launcher")]:
        text = path.read_text()
        for word in suspicious:
            assert word not in text, f"{path}: {word}"
