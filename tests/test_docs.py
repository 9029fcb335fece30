"""The documentation does not rot quietly: links, commands, settings, files, configurations and code in it hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.sweep import read_points
from simclr_dist.config import Config, load_config
from tests import doc_commands
from tests.conftest import REPOSITORY
from tests.doc_commands import OURS, WrongDocumentationError, blocks, check, commands, inline_code

PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "slurm/*.md") for path in REPOSITORY.glob(pattern))
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = ("sh", "bash", "console")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_leads_to_every_guide() -> None:
    index = REPOSITORY / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert set((REPOSITORY / "docs" / "guides").glob("*.md")) <= linked


@every_page
def test_commands_are_accepted_by_the_programs_they_name(page: Path) -> None:
    for language, text in blocks(page):
        if language in SHELL:
            for words in commands(text):
                check(words)
        elif not language:  # drawings and files too: only lines that begin with a program of ours
            shown = "\n".join(line for line in text.splitlines() if line.startswith((*OURS, "sbatch ", "bash ")))
            for words in commands(shown):
                check(words)


@every_page
def test_commands_and_settings_in_the_text_exist(page: Path) -> None:
    """Half-sentences such as `simclr-dist plan` count too; code and file names do not."""
    if page.name == "log.md":  # what was true then
        return
    for code in inline_code(page):
        if code.startswith(OURS) and not code.startswith("python -m pip"):
            for words in commands(code):
                check([*words, "…"])
        for word in code.split():
            doc_commands.check_path(word)
        section, _, key = code.partition("=")[0].partition(".")
        if section in Config.model_fields and key.isidentifier() and key not in ("py", "md", "sh", "yaml", "beton"):
            doc_commands.check_key(f"{section}.{key}")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **changes}
    for key in base.keys() & changes.keys():
        if isinstance(base[key], dict) and isinstance(changes[key], dict):
            both[key] = merged(base[key], changes[key])
    return both


def check_yaml(text: str, tmp_path: Path) -> None:
    """A configuration, whole or some of its sections, or a sweep."""
    file = tmp_path / "block.yaml"
    values = yaml.safe_load(text)
    if values.keys() <= {"grid", "list"}:
        file.write_text(text)
        for point in read_points(file):
            doc_commands.check_settings(None, list(point))
    elif "_base_" in values:
        load_config({**values, "_base_": str(REPOSITORY / "configs" / values["_base_"])}, check_data=False)
    elif {"name", "data", "model", "train"} <= values.keys():
        file.write_text(text)
        load_config(file, check_data=False)
    else:
        smoke = yaml.safe_load((REPOSITORY / "configs" / "smoke.yaml").read_text())
        if values.get("data", {}).get("kind", "images") != "images":
            smoke = {
                section: of_any for section, of_any in smoke.items() if section not in ("data", "augment", "model")
            }
        file.write_text(yaml.safe_dump(merged(smoke, values)))
        load_config(file, check_data=False)


@every_page
def test_yaml_blocks_are_configurations(page: Path, tmp_path: Path) -> None:
    for language, text in blocks(page):
        if language == "yaml":
            check_yaml(text, tmp_path)


@every_page
def test_python_blocks_compile_and_marked_ones_run(page: Path, tmp_path: Path) -> None:
    for language, text in blocks(page):
        if language.split()[:1] == ["python"]:
            compile(text, str(page), "exec")
        if language == "python run":
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr


def test_the_examples_of_every_help_are_accepted() -> None:
    from launcher import arguments
    from simclr_dist import cli

    found = [*doc_commands.help_examples(cli.parser()), *doc_commands.help_examples(arguments.parser())]
    assert len(found) > 20
    for program, words in found:
        try:
            check(words)
        except WrongDocumentationError as error:
            raise AssertionError(f"{program} --help: {error}") from None


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("simclr-dist export runs/cifar10_demo --format torchvision", "none of torchvision's"),
        ("simclr-dist evaluate nearest runs/x", "has no nearest"),
        ("simclr-dist export runs/x --fromat onnx", "has no --fromat"),
        ("simclr-dist export runs/x --format caffe", "refuses"),
        ("simclr-dist config show configs/none.yaml", "there is no configs/none.yaml"),
        ("simclr-dist config show configs/smoke.yaml train.epoch=3", "no setting train.epoch"),
        ("simclr-dist config show configs/smoke.yaml train.epochs=-3", "train.epochs"),
        ("python -m launcher local configs/smoke.yaml --procs 2", "has no --procs"),
        ("python -m launcher local configs/smoke.yaml --nproc many", "refuses"),
        ("python -m launcher status", "refuses"),
        ("accelerate launch --gpu-count 8 -m simclr_dist.train configs/smoke.yaml", "accelerate refuses"),
        ("accelerate launch -m simclr_dist.train configs/smoke.yaml optim.lr=1", "no setting optim.lr"),
        ("accelerate launch -m simclr_dist.pretrain configs/smoke.yaml", "not a program of ours"),
        ("python -m benchmarks.scaling --form x.json", "has no --form"),
        ("python examples/own_parts.py train configs/smoke.yaml loss.tau=1", "no setting loss.tau"),
        ("sbatch slurm/trian.sh CONFIG", "there is no slurm/trian.sh"),
        ("make everything", "make has no"),
        ("pytest tests/test_docs.py::test_nothing", "has no test_nothing"),
        ("frobnicate --all", "nobody knows"),
    ],
)
def test_a_wrong_command_is_found(command: str, complaint: str) -> None:
    (words,) = commands(command)
    with pytest.raises(WrongDocumentationError, match=re.escape(complaint)):
        check(words)


@pytest.mark.parametrize("text", ["train: {epoch: 3}", "loss: {temperature: -1}", "grid: {train.epoch: [1, 2]}"])
def test_a_wrong_configuration_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"epoch|temperature"):
        check_yaml(text, tmp_path)


def test_blocks_commands_and_code_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text `simclr-dist plan` here.\n\n"
        "```sh\nA=1 simclr-dist plan \\\n    CONFIG  # why\nmake demo && make test\n```\n\n"
        "    simclr-dist warmup      now\n\n- list\n  ```yaml\n  name: x\n  ```\n"
    )
    assert inline_code(page) == ["simclr-dist plan"]
    found = dict(blocks(page))
    assert found["yaml"] == "name: x\n"
    assert list(commands(found["sh"])) == [["simclr-dist", "plan", "CONFIG"], ["make", "demo"], ["make", "test"]]
    assert list(commands(found[""])) == [["simclr-dist", "warmup"]]
