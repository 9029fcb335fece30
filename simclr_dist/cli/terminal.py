"""Messages and tables of the commands."""

from __future__ import annotations

import sys

from simclr_dist.safe_text import message
from simclr_dist.streams import print_table

__all__ = ["percent", "print_table", "say"]


def say(text: str) -> None:
    """Prints to stderr on rank 0; stdout is for results."""
    from simclr_dist.parallel import distributed

    if distributed.rank() == 0:
        print(message(text), file=sys.stderr, flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
