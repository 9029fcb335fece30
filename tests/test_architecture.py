"""The shape of the house: imports point down, the launcher knows no torch, torch.distributed has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Each layer may import those after it, and its own.
LAYERS = (
    ("cli", "demo", "recipe"),
    ("train",),
    ("doctor", "report", "trainer"),
    ("checkup", "gallery", "summary"),
    ("evaluation", "export", "plan"),
    ("custody", "saving"),
    ("failures", "non_finite", "watchdog"),
    ("checkpoint", "heartbeat", "monitor", "owner", "provenance", "requests"),
    ("status",),
    ("micro_batch",),
    (
        "augment",
        "augment_kernel",
        "data",
        "flops",
        "health",
        "loss",
        "batchnorm",
        "encoders",
        "model",
        "online_probe",
        "optim",
    ),
    ("atomic", "distributed"),
    ("config", "finding", "process", "torch_probe"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


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


def part_of(dotted: str) -> str | None:
    """`simclr_dist.data.order` -> `data`."""
    pieces = dotted.split(".")
    return pieces[1] if pieces[0] == "simclr_dist" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", modules("simclr_dist"), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(REPOSITORY / "simclr_dist").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no place in the layers yet"
    for name in imported_names(path):
        other = part_of(name)
        if other in LEVEL:
            assert LEVEL[other] >= LEVEL[own], f"{path.name} imports {name}, which lies above it"
        assert not name.startswith("launcher"), f"{path.name} imports the launcher"


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
