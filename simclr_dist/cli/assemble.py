"""`simclr-dist merge`, `split`, `append`: .beton files put together and apart, without encoding an image again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_dist.argument_types import add_source_arguments, positive_int
from simclr_dist.cli.arguments import Commands, add_command

if TYPE_CHECKING:
    from simclr_dist.data.beton.assemble import Progress, Written

_PARTS = "a .beton file, a folder of them, or a pattern in quotes"


def register(commands: Commands) -> None:
    merge = add_command(
        commands,
        "merge",
        _run_merge,
        help="write the samples of several .beton files to one",
        description="Copies the samples of .beton files, in the order given, to one file. Classes are matched by name.",
        epilog="example: simclr-dist merge data/all.beton data/2023.beton data/2024.beton",
    )
    merge.add_argument("out", metavar="OUT.beton", type=Path)
    merge.add_argument("sources", metavar="FILE", nargs="+", help=_PARTS)
    merge.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    split = add_command(
        commands,
        "split",
        _run_split,
        help="write the samples of a .beton file to several",
        description="Copies the samples of a .beton file, in their order, to N files in a folder of their own.",
        epilog="example: simclr-dist split data/train.beton --shards 64",
    )
    split.add_argument("file", metavar="FILE.beton", type=Path)
    split.add_argument("--shards", metavar="N", type=positive_int, required=True, help="how many files")
    split.add_argument("--out", metavar="FOLDER", type=Path, help="(default: data/train-shards for data/train.beton)")
    append = add_command(
        commands,
        "append",
        _run_append,
        help="add samples behind those of a .beton file",
        description=(
            "Adds the images of SOURCE behind those of a .beton file, which is replaced when the new one is complete.\n"
            "Images that are not in .beton files yet are prepared with the settings of the file."
        ),
        epilog="example: simclr-dist append data/train.beton images/march",
    )
    append.add_argument("file", metavar="FILE.beton", type=Path)
    append.add_argument("source", metavar="SOURCE", help=f"{_PARTS}; or what `prepare` takes")
    append.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="for unreadable images")
    add_source_arguments(append)


def _run_merge(args: argparse.Namespace) -> int:
    from simclr_dist.data.beton.assemble import merge

    with _progress_bar(f"merge {args.out.name}") as progress:
        written = merge(args.out, args.sources, overwrite=args.overwrite, progress=progress)
    _say(_lines(written))
    return 0


def _run_split(args: argparse.Namespace) -> int:
    from simclr_dist.data.beton.assemble import split

    with _progress_bar(f"split {args.file.name}") as progress:
        folder, written = split(args.file, args.shards, args.out, progress=progress)
    num_samples, num_bytes = (
        sum(values) for values in zip(*((w.num_samples, w.num_bytes) for w in written), strict=True)
    )
    _say([f"{folder}: {num_samples:,} images in {len(written):,} files, {num_bytes / 1e6:,.1f} MB"])
    _say([f"  use it as data.train: {folder}"])
    return 0


def _run_append(args: argparse.Namespace) -> int:
    from simclr_dist.data.account import SourceOptions
    from simclr_dist.data.beton.assemble import append

    options = SourceOptions.from_arguments(args)
    with _progress_bar(f"append {args.file.name}") as progress:
        written = append(args.file, args.source, options=options, on_error=args.on_error, progress=progress)
    _say(_lines(written))
    return 0


def _lines(written: Written) -> Iterator[str]:
    classes = len(written.class_names)
    yield f"{written.path}: {written.num_samples:,} images in {classes} classes, {written.num_bytes / 1e6:,.1f} MB"
    if written.sentence:
        yield f"  {written.sentence}"
    yield f"  fingerprint {written.fingerprint}"


def _say(lines: Iterator[str] | list[str]) -> None:
    from simclr_dist.safe_text import printable

    for line in lines:
        print(printable(line))
    sys.stdout.flush()


@contextmanager
def _progress_bar(what: str) -> Iterator[Progress]:
    from rich.progress import Progress as Bar

    from simclr_dist.safe_text import printable
    from simclr_dist.streams import console

    terminal = console()
    # No thread of its own: `append` may fork workers.
    with Bar(console=terminal, disable=not terminal.is_terminal, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(printable(what), total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=done % 256 == 0 or done == total)

        yield progress
