"""What lies beside the code for those who contribute, release or build images says what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
CONTAINER = REPOSITORY / "tools/container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text()
APPTAINER = (CONTAINER / "simclr_dist.def").read_text()


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def section(name: str) -> list[str]:
    """Lines of one section of the Apptainer recipe."""
    return re.findall(rf"^%{name}\n((?:    .*\n)+)", APPTAINER, re.MULTILINE)[0].split("\n")[:-1]


def dockerfile(instruction: str) -> list[list[str]]:
    """Words of each such instruction."""
    return [shlex.split(line)[1:] for line in DOCKERFILE.splitlines() if line.startswith(f"{instruction} ")]


def commands(workflow: Path) -> list[str]:
    return [step["run"] for job in read(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_and_scripts_that_exist(workflow: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for command in commands(workflow):
        for called in re.findall(r"\bmake ([\w -]+)", command):
            assert set(called.split()) <= {*targets}
        for script in re.findall(r"\bbash (\S+)", command):
            assert (REPOSITORY / script).is_file()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_what_their_jobs_need(workflow: Path) -> None:
    """A workflow reads; a job that writes says what, and runs no code of the checkout."""
    content = read(workflow)
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        if "write" in job.get("permissions", {}).values():
            assert not any(step.get("uses", "").startswith("actions/checkout") for step in job["steps"])
        assert not any("${{" in step.get("run", "") for step in job["steps"])  # text of others in a shell line


def test_workflows_cover_tests_and_releases() -> None:
    run = {workflow.stem: "\n".join(commands(workflow)) for workflow in WORKFLOWS}
    assert "bash .ci/run" in run["test"]
    assert "make dist ffcv-wheel" in run["release"]
    assert read(REPOSITORY / ".github/workflows/test.yml")["jobs"]["test"]["timeout-minutes"] <= 90


def test_both_images_are_built_from_the_same_files_on_the_same_base() -> None:
    ((base,),) = dockerfile("FROM")
    assert f"From: {base}\n" in APPTAINER
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    copied = {}
    for *sources, target in dockerfile("COPY"):
        for source in sources:
            copied[source] = f"{target}{Path(source).name}" if target.endswith("/") else target
    assert copied == dict(line.split() for line in section("files"))
    for source in copied:
        assert (REPOSITORY / source).exists()
    (install,) = [line.strip() for line in section("post") if "install.sh" in line]
    assert dockerfile("RUN")[0][:3] == install.split()
    assert install.split()[1] in copied.values()


def test_the_image_holds_what_the_package_is_built_from() -> None:
    """`launcher/starter` has links to configs/ and slurm/."""
    copied = {source for *sources, _ in dockerfile("COPY") for source in sources}
    links = {link.resolve().name for link in (REPOSITORY / "launcher/starter").iterdir() if link.is_symlink()}
    assert links | {"pyproject.toml", "README.md", "LICENSE", "simclr_dist", "launcher"} <= copied


def test_the_image_is_not_run_as_root_and_its_script_keeps_the_lock() -> None:
    assert dockerfile("USER") == [["nobody"]]
    script = (CONTAINER / "install.sh").read_text()
    assert '--constraint "$source/requirements.lock"' in script
    assert 'rm -rf "$built" /var/lib/apt/lists/*' in script
    extras = re.findall(r"\$source\[(.*?)\]", script)[0].split(",")
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", project, re.MULTILINE) for extra in extras)
    subprocess.run(["bash", "-n", CONTAINER / "install.sh"], check=True)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (local,) = read(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in local["hooks"]]
    recipe = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[0]
    lint = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()]
    assert hooks == [line.removesuffix(" .").replace(" --check", "") for line in lint]


@pytest.mark.parametrize("name", ["bug", "wish"])
def test_issue_forms_ask_for_what_is_needed(name: str) -> None:
    form = read(REPOSITORY / f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len({*ids}) == len(ids)
    assert any(field.get("validations", {}).get("required") for field in form["body"])
