"""The doctor's arguments and its table. Needs the standard library only."""

from __future__ import annotations

import argparse
import json
import sys

from simclr_dist.argument_types import add_source_arguments
from simclr_dist.doctor.checks import examine
from simclr_dist.doctor.finding import Finding
from simclr_dist.safe_text import printable

DESCRIPTION = """Tries out everything that training needs, and with CONFIG everything that this training needs.
With DATA (anything that `prepare` takes, or a .beton file) it shows what is taken from there and what is left out."""
EPILOG = "exit codes: 0 no problem was found · 1 a PROBLEM was found"
WIDTH = 22  # of the names; longer ones move their row to the right
MARKS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG|DATA", nargs="?", help="a training, or images, to examine")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> int:
    findings = []
    for finding in examine(args.config, args.overrides, args, tell=(lambda _: None) if args.json else _tell):
        findings.append(finding)
        if not args.json:
            print(render(finding), flush=True)  # as it comes: some parts take seconds
    count = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    ok = count["problem"] == 0
    if args.json:
        print(json.dumps({"ok": ok, "findings": [vars(finding) for finding in findings]}, indent=1))
    else:
        print(f"{count['problem']} problems, {count['warning']} warnings")
    return 0 if ok else 1


def _tell(what: str) -> None:
    """What is being tried, for a person who waits."""
    print(f"{'…':7}  {printable(what)}", file=sys.stderr, flush=True)


def render(finding: Finding) -> str:
    row = f"{MARKS[finding.level]}  {printable(finding.what):{WIDTH}}  {printable(finding.found)}"
    return f"{row}\n{'':9}{'':{WIDTH}}  {printable(finding.advice)}" if finding.advice else row
