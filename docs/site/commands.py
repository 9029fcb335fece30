"""A page of all commands: what their --help prints."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator


def page() -> str:
    os.environ["COLUMNS"], os.environ["NO_COLOR"] = "100", "1"
    from launcher import arguments
    from simclr_dist import cli

    parts = ["# All commands\n\nWhat `--help` prints.\n"]
    for parser in (cli.parser(), arguments.parser()):
        parts.append(f"## {parser.prog}\n\n{_block(parser)}")
        parts += [f"### {inner.prog}\n\n{_block(inner)}" for inner in _commands(parser)]
    return "\n".join(parts)


def _block(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().rstrip()}\n```\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield inner
                yield from _commands(inner)
