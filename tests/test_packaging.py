"""The package as others get it: built from a copy of the checkout, installed elsewhere, used without the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import simclr_dist
from simclr_dist.cli.recipe import read_recipe
from simclr_dist.config import load_config
from tests.conftest import REPOSITORY
from tests.images import make_folder

BUILT_FROM = ("simclr_dist", "launcher", "configs", "slurm", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, expected: int = 0, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """As in a shell that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    words = [str(word) for word in command]
    found = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert found.returncode == expected, f"{words}\n{found.stdout}\n{found.stderr}"
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders behind, and takes in what an earlier one left."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILT_FROM:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` builds; without isolation, as that would fetch setuptools."""
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, ".", cwd=checkout)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a fresh environment with the wheel in it; our dependencies are borrowed from the running one."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    bin = environment / "bin"
    options = ("--quiet", "--no-deps", "--no-index", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "--python", bin / "python", "install", *options, wheel, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Plain folders: the .pth files in them, of an editable installation for one, are not followed.
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    where = run(bin / "python", "-c", "import simclr_dist, launcher; print(launcher.__file__)", cwd=environment)
    assert Path(where.stdout.strip()).is_relative_to(packages)
    return bin


@pytest.fixture(scope="module")
def project(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "mine"
    run(scripts / "simclr-launch", "init", folder.name, cwd=folder.parent)
    return folder


def tracked(*folders: str) -> set[str]:
    """Files of the checkout that somebody wrote."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_module_and_what_it_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {name for name in tracked("simclr_dist", "launcher") if name.endswith(".py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"simclr_dist/py.typed", "simclr_dist/config.schema.json", "launcher/accelerate.yaml"} <= names
    assert {f"launcher/starter/{name}" for name in tracked("configs")} <= names
    scripts = {name for name in tracked("slurm") if name.endswith(".sh")}
    assert {f"launcher/starter/{name}" for name in scripts} <= names


def test_the_wheel_names_version_commands_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA"))
    assert f"\nVersion: {simclr_dist.__version__}\n" in metadata
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert {"ffcv", "export", "timm", "dev"} <= extras
    (commands,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("/entry_points.txt"))
    assert "simclr-dist = simclr_dist.cli:main" in commands
    assert "simclr-launch = launcher.__main__:main" in commands


def test_python_m_build_makes_a_source_archive_that_builds_again(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("build", reason="build is not installed (extra `dev`)")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ".", cwd=checkout)
    archive, again = sorted(tmp_path.iterdir(), reverse=True)
    assert (archive.suffixes[-2:], again.suffix) == ([".tar", ".gz"], ".whl")
    with tarfile.open(archive) as files:
        assert not [file.name for file in files if file.issym() or file.islnk()]  # the links have become files
    contents = [{n: zipfile.ZipFile(w).read(n) for n in zipfile.ZipFile(w).namelist()} for w in (wheel, again)]
    for files_of_wheel in contents:
        for name in [name for name in files_of_wheel if ".dist-info/" in name]:
            del files_of_wheel[name]  # lists of files with hashes, in another order
    assert contents[0] == contents[1]


def test_a_starter_project_holds_what_the_repository_does(project: Path) -> None:
    configs = REPOSITORY / "configs"
    for config in sorted([*configs.glob("*.yaml"), *configs.glob("variants/*.yaml")]):
        copy = project / "configs" / config.relative_to(configs)
        assert load_config(copy, check_data=False) == load_config(config, check_data=False)
        schema = re.search(r"\$schema=(\S+)", copy.read_text())
        assert schema
        assert (copy.parent / schema[1]).is_file()
    for recipe in sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml")):
        read_recipe(project / "configs" / "recipes" / recipe.name)
    for script in sorted((REPOSITORY / "slurm").glob("*.sh")):
        assert (project / "slurm" / script.name).read_bytes() == script.read_bytes()


def test_the_launcher_works_from_a_starter_project(scripts: Path, project: Path) -> None:
    shown = run(scripts / "simclr-launch", "show", "local", "configs/smoke.yaml", "--nproc=2", "--json", cwd=project)
    plan = json.loads(shown.stdout)["plan"]
    assert plan["procs_per_node"] == 2
    assert plan["run_dir"] == str(project / "runs" / "smoke")
    shown = run(
        scripts / "simclr-launch",
        "show",
        "slurm",
        "configs/smoke.yaml",
        "--nodes=2",
        "--no-snapshot",
        "--json",
        cwd=project,
    )
    assert str(project / "slurm" / "train.sh") in json.loads(shown.stdout)["start"][0]
    config = project / "configs" / "smoke.yaml"
    shown = run(scripts / "simclr-launch", "show", "slurm", config, "--nodes=2", "--no-snapshot", "--json", cwd=scripts)
    packaged = [word for word in json.loads(shown.stdout)["start"][0] if word.endswith("/slurm/train.sh")]
    assert [Path(word).is_file() for word in packaged] == [True]


def test_init_works_from_a_checkout(project: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "launcher", "init", tmp_path / "mine", cwd=REPOSITORY)
    files = [
        {p.relative_to(root): p.stat().st_mode for root in (folder,) for p in folder.rglob("*") if p.is_file()}
        for folder in (project, tmp_path / "mine")
    ]
    assert files[1].keys() <= files[0].keys()  # another test may have added data


def test_commands_of_the_starters_readme_work(scripts: Path, project: Path, tmp_path: Path) -> None:
    text = (project / "README.md").read_text().split("```sh\n")[1].split("```")[0].replace("\\\n", "")
    smoke, prepare, own = (line.partition("#")[0].split() for line in text.strip().splitlines())
    assert prepare[:3] == ["simclr-dist", "prepare", "PATH/TO/IMAGES"]
    make_folder(tmp_path, 6)
    run(scripts / "simclr-dist", "prepare", tmp_path, *prepare[3:], cwd=project)
    for command in (smoke, own):
        assert command[:2] == ["simclr-launch", "local"]
        run(scripts / "simclr-launch", "show", *command[1:], cwd=project)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a new environment compiles its kernels anew
def test_an_installed_wheel_trains_evaluates_and_exports(scripts: Path, tmp_path: Path) -> None:
    """Nothing of the repository is at hand: no file of it, no PYTHONPATH."""
    assert run(scripts / "simclr-dist", "--version", cwd=tmp_path).stdout.split()[-1] == simclr_dist.__version__
    make_folder(tmp_path / "train", 24)
    make_folder(tmp_path / "test", 12)
    run(scripts / "simclr-launch", "init", "mine", cwd=tmp_path)
    program = """
import simclr_dist

run = simclr_dist.pretrain(
    "configs/smoke.yaml",
    data={"train": "../train", "test": "../test"},
    train={"global_batch_size": 8, "epochs": 1},
    evaluation={"knn_k": 5},
)
assert run.state == "finished", run
for method in ("knn", "linear"):
    assert 0 <= run.evaluate(method).top1 <= 1
for format in ("safetensors", "onnx"):
    print(run.export(format=format).path.name)
"""
    done = run(scripts / "python", "-c", program, cwd=tmp_path / "mine", timeout=800)
    assert done.stdout.splitlines()[-2:] == ["encoder.safetensors", "encoder.onnx"]


def test_init_leaves_a_folder_with_files_alone(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    found = run(scripts / "simclr-launch", "init", ".", cwd=tmp_path, expected=2)
    assert "not an empty folder" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_version_is_semantic_and_the_changelogs_newest() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", simclr_dist.__version__)
    headings = re.findall(r"^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings[:1] == ["Unreleased"] or headings[:1] == released[:1]
    assert released[0].split()[0] == simclr_dist.__version__
    in_order = sorted(released, key=lambda h: [int(n) for n in h.split()[0].split(".")], reverse=True)
    assert released == in_order
