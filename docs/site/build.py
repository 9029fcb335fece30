"""The documentation site: python -m docs.site.build [FOLDER]   (`make docs`)

Copies docs/ and what its pages link to into FOLDER/source, adds the pages that are made from code, and runs Sphinx on
it, warnings as errors. The site lies in FOLDER/html (default: build/docs) and works without a network.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from docs.site import commands, notebooks, pictures, reference, settings

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"

# Left of the pages: what stands under which heading. A page that is missing here is an error.
CONTENTS = {
    "Begin": ["guides/first_run", "notebooks/first_run", "how_it_works", "configurations", "settings", "commands"],
    "Data and training": [
        "guides/your_own_images",
        "guides/many_channels",
        "guides/beyond_images",
        "guides/starting_from_weights",
        "guides/choosing_settings",
        "guides/workstation",
        "cluster",
        "repository/slurm/README",
        "guides/other_schedulers",
        "guides/preemption_and_resume",
        "guides/troubleshooting",
    ],
    "Results": ["guides/evaluating_and_exporting", "evaluation", "monitoring", "results", "scaling", "gpu"],
    "In your code": ["guides/python", "guides/your_own_loop", "notebooks/loss_in_your_loop", "guides/extending", "api"],
    "How it is made": ["architecture", "data", "loss", "reliability", "environment"],
    "The project": ["repository/README", "repository/CHANGELOG", "repository/CONTRIBUTING", "dev/log"],
}
GENERATED: dict[str, Callable[[], str]] = {
    "settings.md": settings.page,
    "commands.md": commands.page,
    "api.md": reference.page,
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def place(file: Path) -> Path:
    """Where a file of the repository lies in the site's source; files that are no pages become one."""
    if file.is_relative_to(DOCS):
        inside = file.relative_to(DOCS)
        return inside.with_suffix(".md") if file.suffix == ".ipynb" else inside
    inside = Path("repository") / file.relative_to(REPOSITORY)
    return inside if file.suffix in (".md", ".png", ".svg") else inside.with_name(f"{inside.name}.md")


def with_links_of_the_site(text: str, file: Path) -> tuple[str, set[Path]]:
    """A page's text with its relative links as they are in the site, and the files that these lead to."""
    targets: set[Path] = set()

    def moved(link: re.Match[str]) -> str:
        path, hash_, anchor = link[1].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[1]
        target = (file.parent / path).resolve()
        if not target.is_file():
            raise FileNotFoundError(f"{file.relative_to(REPOSITORY)}: {link[1]} leads to no file")
        targets.add(target)
        return os.path.relpath(place(target), place(file).parent) + hash_ + anchor

    parts, at = [], 0
    for fence in FENCED.finditer(text):
        parts += [LINK.sub(moved, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(moved, text[at:])]), targets


def as_page(file: Path, listed: set[str]) -> tuple[str, set[Path]]:
    """The Markdown of a page, of a notebook, or of any other file in a block; and the files it links to."""
    text, language = file.read_text(encoding="utf-8"), LANGUAGES.get(file.suffix, "text")
    if file.suffix in (".md", ".ipynb"):
        text = notebooks.as_markdown(text) if file.suffix == ".ipynb" else text
        text, targets = with_links_of_the_site(text, file)
    else:
        text, targets = f"# {file.relative_to(REPOSITORY)}\n\n`````{language}\n{text.rstrip()}\n`````\n", set()
    page = place(file).with_suffix("").as_posix()
    if page.startswith("repository/") and page not in listed:  # of a page of ours that is not listed Sphinx complains
        text = f"---\norphan: true\n---\n\n{text}"
    return text, targets


def contents() -> str:
    lists = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) for caption, pages in CONTENTS.items()
    ]
    return "\n\n" + "\n```\n\n".join(lists) + "\n```\n"


def assemble(source: Path) -> None:
    """Writes the source of the site. Raises FileNotFoundError for a link that leads nowhere."""
    listed = {page for pages in CONTENTS.values() for page in pages} | {"index"}
    shutil.rmtree(source, ignore_errors=True)
    left, done = {*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *_listed_elsewhere(listed)}, set[Path]()
    while left:
        file = left.pop()
        done.add(file)
        to = source / place(file)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".svg"):
            shutil.copyfile(file, to)
            continue
        text, targets = as_page(file, listed)
        to.write_text(text + (contents() if file == DOCS / "index.md" else ""), encoding="utf-8")
        left |= targets - done
    for name, page in GENERATED.items():
        (source / name).write_text(page(), encoding="utf-8")


def _listed_elsewhere(listed: set[str]) -> set[Path]:
    return {REPOSITORY / f"{page.removeprefix('repository/')}.md" for page in listed if page.startswith("repository/")}


def main(folder: Path) -> int:
    from sphinx.cmd.build import build_main

    pictures.check()
    assemble(folder / "source")
    shutil.rmtree(folder / "html", ignore_errors=True)
    options = [
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        "auto",
        "-c",
        str(DOCS / "site"),
        "-d",
        str(folder / "doctrees"),
    ]
    code = build_main([*options, str(folder / "source"), str(folder / "html")])
    if code == 0:
        print(f"the site: {folder / 'html' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs").resolve()))
