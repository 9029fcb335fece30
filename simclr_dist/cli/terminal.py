"""Messages and tables of the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(message: str) -> None:
    """Prints to stderr on rank 0; stdout is for results."""
    from simclr_dist.parallel import distributed

    if distributed.rank() == 0:
        print(message, file=sys.stderr, flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: names may look like rich's markup
    Console(width=None if sys.stdout.isatty() else 120).print(table)
