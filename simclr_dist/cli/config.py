"""`simclr-dist config`: a resolved configuration, or the schema of all."""

from __future__ import annotations

import argparse

from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.config import json_schema, render_with_origins


def register(commands: Commands) -> None:
    config = commands.add_parser("config", help="show a configuration, or the schema of all")
    actions = config.add_subparsers(dest="action", required=True, metavar="show|schema")
    show = add_command(
        actions, "show", _run_show, help="print the resolved configuration, and where each value comes from"
    )
    show.add_argument("config", metavar="CONFIG")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    add_command(actions, "schema", _run_schema, help="print the JSON schema, for editors")


def _run_show(args: argparse.Namespace) -> int:
    print(render_with_origins(args.config, args.overrides), end="")
    return 0


def _run_schema(_: argparse.Namespace) -> int:
    print(json_schema(), end="")
    return 0
