"""The doctor's arguments and its table. Needs the standard library only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from simclr_dist.argument_types import add_source_arguments
from simclr_dist.doctor.checks import examine
from simclr_dist.doctor.finding import Finding

DESCRIPTION = """Tries out everything that training needs, and with CONFIG everything that this training needs.
With DATA (anything that `prepare` takes, or a .beton file) it shows what is taken from there and what is left out."""
EPILOG = "exit codes: 0 no problem was found · 1 a PROBLEM was found"
MARKS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG|DATA", nargs="?", help="a training, or images, to examine")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> int:
    findings = list(examine(args.config, args.overrides, args))
    ok = all(finding.level != "problem" for finding in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [vars(finding) for finding in findings]}, indent=1))
    else:
        print("\n".join(render(findings)))
    return 0 if ok else 1


def render(findings: Sequence[Finding]) -> Iterator[str]:
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        yield f"{MARKS[finding.level]}  {finding.what:{width}}  {plain(finding.found)}"
        if finding.advice:
            yield f"{'':9}{'':{width}}  {plain(finding.advice)}"
    count = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    yield f"{count['problem']} problems, {count['warning']} warnings"


def plain(text: str) -> str:
    """On one line and without control characters: values of variables can be anything."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
