"""`simclr-dist inspect`: what a .beton file holds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from simclr_dist.cli.arguments import Commands, add_command


def register(commands: Commands) -> None:
    inspect = add_command(commands, "inspect", _run, help="show what a .beton file holds, and check it")
    inspect.add_argument("file", metavar="FILE.beton", type=Path)
    inspect.add_argument("--verify", action="store_true", help="also decode every image")


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from simclr_dist.data.loading.inspect import inspect_beton

    console = Console()
    with Progress(console=console, disable=not (console.is_terminal and args.verify), transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        found = inspect_beton(
            args.file, args.verify, lambda done, total: progress.update(task, completed=done, total=total)
        )
    table = Table(show_header=False, box=None)
    smallest, median, largest = found.sides
    rows = {
        "file": f"{found.path}, {found.num_bytes / 1e6:,.1f} MB",
        "images": f"{found.num_samples:,} ({found.num_jpeg:,} JPEG, {found.num_samples - found.num_jpeg:,} raw)",
        "longer side": f"{smallest} to {largest} px, median {median}",
        "classes": ", ".join(f"{n} {c}" for n, c in zip(found.class_names[:20], found.class_counts, strict=False))
        + (f" … ({len(found.class_names)} in all)" if len(found.class_names) > 20 else ""),
        "fingerprint": found.fingerprint,
        "decoded": "not tried (--verify does)"
        if found.damaged is None
        else f"{found.num_samples - len(found.damaged):,} well",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table, markup=False, highlight=False)
    for sample, reason in list((found.damaged or {}).items())[:20]:
        print(f"damaged: sample {sample}: {reason}", file=sys.stderr)
    return 2 if found.damaged else 0
