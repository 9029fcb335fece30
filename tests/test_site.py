"""The documentation site: what is generated is complete, pictures are as the code draws them, notebooks run."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from docs.site import build, notebooks, pictures, reference, settings
from simclr_dist.config import Config
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
IMPORT = re.compile(r"^ *from (simclr_dist[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def test_every_setting_is_on_the_page_of_settings() -> None:
    def names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from names(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    page = settings.page()
    assert [name for name in names(Config) if f"| `{name}` |" not in page] == []
    assert "| `loss.temperature` | number | `0.1` | > 0" in page


def test_every_page_has_a_place_in_the_contents_of_the_site() -> None:
    listed = {page for pages in build.CONTENTS.values() for page in pages} | {"index"}
    docs = REPOSITORY / "docs"
    pages = {page.relative_to(docs).with_suffix("").as_posix() for page in [*docs.rglob("*.md"), *NOTEBOOKS]}
    assert pages - listed == set(), "add them to CONTENTS in docs/site/build.py"
    generated = {name.removesuffix(".md") for name in build.GENERATED}
    assert {page for page in listed - pages if not page.startswith("repository/")} == generated


def test_what_guides_and_examples_import_is_in_the_reference() -> None:
    public = reference.public_names()
    files = [*(REPOSITORY / "docs" / "guides").glob("*.md"), *(REPOSITORY / "examples").glob("*.py"), *NOTEBOOKS]
    for file in files:
        for module, names in IMPORT.findall(file.read_text(encoding="utf-8")):
            for name in names.split(", "):
                found = getattr(importlib.import_module(module), name, None)
                is_module = found is None or hasattr(found, "__path__") or type(found).__name__ == "module"
                full = f"{module}.{name}"
                known = any(one.startswith(f"{full}.") for one in public) if is_module else full in public
                assert known or _same(found, public), f"{file.name} imports {full}, which docs/site/reference.py lacks"


def _same(found: object, public: set[str]) -> bool:
    """Under another name of the same thing."""
    return any(
        getattr(importlib.import_module(one.rpartition(".")[0]), one.rpartition(".")[2]) is found for one in public
    )


def test_the_reference_has_a_signature_and_a_text_for_every_name() -> None:
    entries = re.findall(r"^````\{py:(\w+)\} (.+)\n\n(.*)", reference.page(), re.MULTILINE)
    assert {re.match(r"[\w.]+", signature)[0] for _, signature, _ in entries} == reference.public_names()  # type: ignore[index]
    assert [signature for _, signature, text in entries if not text.strip()] == []


def test_pictures_are_as_the_code_draws_them() -> None:
    assert list(pictures.stale()) == [], "python -m docs.site.pictures"


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem == "first_run" else (), id=path.stem)
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_and_is_kept_without_outputs(notebook: Path, tmp_path: Path) -> None:
    """In one process, cell after cell, each in the names of those before; warnings are errors."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    program = tmp_path / "cells.json"
    program.write_text(json.dumps(["".join(cell["source"]) for cell in cells]))
    execute = (
        "import json, sys\nnames = {'__name__': '__main__'}\n"
        "for i, cell in enumerate(json.load(open(sys.argv[1]))): exec(compile(cell, f'cell {i}', 'exec'), names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", execute, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_every_link_of_every_page_of_the_site_leads_to_a_file(tmp_path: Path) -> None:
    build.assemble(tmp_path / "source")
    for page in (tmp_path / "source").rglob("*.md"):
        for link in build.LINK.findall(build.FENCED.sub("", page.read_text(encoding="utf-8"))):
            if not re.match(r"[a-z]+:|#", link):
                assert (page.parent / link.partition("#")[0]).is_file(), f"{page.relative_to(tmp_path)}: {link}"
    with pytest.raises(FileNotFoundError, match=r"nothing\.md leads to no file"):
        build.with_links_of_the_site("[x](nothing.md)", build.DOCS / "index.md")


def test_a_notebook_on_the_site_shows_text_code_and_what_was_printed() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "words"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
    ]
    assert notebooks.as_markdown(json.dumps({"cells": cells})) == (
        "# T\nwords\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    )


@pytest.mark.slow  # half a minute of Sphinx
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "docs.site.build", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    html = tmp_path / "html"
    for name in ("index", "api", "settings", "commands", "notebooks/first_run", "repository/examples/loop_ddp.py"):
        assert (html / f"{name}.html").is_file(), name
    fetched = re.compile(
        r"""<(?:script|img|iframe)[^>]*?src=["'](?:https?:)?//|<link(?![^>]*rel=["']canonical)[^>]*?href=["'](?:https?:)?//"""
    )
    assert [page.name for page in html.rglob("*.html") if fetched.search(page.read_text())] == []
    styles = [
        file
        for file in (html / "_static").rglob("*.css")
        if re.search(r"url\(['\"]?(?:https?:)?//|@import", file.read_text())
    ]
    assert styles == []
