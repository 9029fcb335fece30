"""`simclr-dist prepare`: images to a .beton file; `warmup`: compile the loader's kernels."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import add_source_arguments, percentage, positive_int
from simclr_dist.cli.arguments import Commands, add_command

if TYPE_CHECKING:
    from simclr_dist.data.beton.prepare import PreparedInfo


def register(commands: Commands) -> None:
    prepare = add_command(
        commands,
        "prepare",
        _run_prepare,
        help="write images to a .beton file for the fast loader",
        description="Writes images to a .beton file. It appears under its name only when it is complete.",
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of class folders, a tar of one, torchvision's files, or cifar10, cifar100, stl10, fashion-mnist",
    )
    prepare.add_argument("out", metavar="OUT.beton", type=Path)
    prepare.add_argument(
        "--mode", choices=("auto", "jpg", "raw", "smart"), default="auto", help="auto: raw for small images, else jpg"
    )
    prepare.add_argument(
        "--for-views",
        type=positive_int,
        metavar="SIDE",
        help="store no more than views of SIDE px (data.image_size) need: chooses the two options below, unless given",
    )
    prepare.add_argument("--quality", type=percentage, help="of JPEG (default: 90)")
    prepare.add_argument(
        "--max-side", type=positive_int, metavar="PIXELS", help="shrink images whose longer side exceeds this"
    )
    prepare.add_argument("--limit", type=positive_int, metavar="N", help="only N images, spread evenly over SOURCE")
    prepare.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="for unreadable images")
    prepare.add_argument("--strict", action="store_true", help="fail when anything found at SOURCE is left out")
    prepare.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    prepare.add_argument(
        "--workers", type=positive_int, metavar="N", help="processes (default: the CPUs this process may use)"
    )
    add_source_arguments(prepare)
    add_command(
        commands, "warmup", _run_warmup, help="compile the loader's kernels, once a machine, before training does"
    )


def _run_prepare(args: argparse.Namespace) -> int:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts no threads, so workers can be forked
    from simclr_dist.data.account import SourceOptions

    prepare_with_progress(
        args.source,
        args.out,
        options=SourceOptions.from_arguments(args),
        mode=args.mode,
        quality=args.quality,
        max_side=args.max_side,
        for_views=args.for_views,
        limit=args.limit,
        on_error=args.on_error,
        strict=args.strict,
        overwrite=args.overwrite,
        num_workers=args.workers,
    )
    return 0


def prepare_with_progress(source: str | Path, out: Path, **options: Any) -> None:
    """`prepare` with a progress bar; prints what was written."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simclr_dist.data.beton.prepare import prepare
    from simclr_dist.safe_text import printable
    from simclr_dist.streams import console

    terminal = console()
    begin = last_line = last_shown = time.monotonic()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
        auto_refresh=False,  # no thread: then workers can be forked
    ) as bar:
        task = bar.add_task(printable(f"prepare {out.name}"), total=None, rate="")

        def progress(done: int, total: int) -> None:
            nonlocal last_line, last_shown
            now = time.monotonic()
            rate = done / max(now - begin, 1e-9)
            is_due = now - last_shown >= 0.1 or done == total
            last_shown = now if is_due else last_shown
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} images/s", refresh=is_due)
            if not terminal.is_terminal and now - last_line >= 30:  # shows in a job's log that it has not hung
                last_line = now
                print(f"{done:,} of {total:,} images, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left", flush=True)

        info = prepare(source, out, progress=progress, **options)
    for line in _summary(info):
        print(printable(line))
    sys.stdout.flush()
    for message in [*_first("damaged", info.damaged), *_first("skipped", info.skipped)]:
        print(printable(message), file=sys.stderr)
    for message in info.warnings:
        print(printable(f"warning: {message}"), file=sys.stderr)
    losses = info.account.num_left_out
    if losses:
        sys.stderr.flush()
        print(printable(f"{losses:,} found at {source} but not taken, see above; --strict makes this an error"))


def _summary(info: PreparedInfo) -> Iterator[str]:
    """The account, then what was written."""
    yield from info.account.lines()
    rate = info.num_samples / max(info.seconds, 1e-9)
    yield (
        f"{info.path}: {info.num_samples:,} images in {len(info.class_names)} classes, "
        f"{info.num_bytes / 1e6:,.1f} MB, {rate:,.0f} images/s"
    )
    if info.fit is not None:
        yield f"  {info.fit}"
        yield f"  {info.num_shrunk:,} of {info.num_samples:,} images were shrunk"
    counts = list(zip(info.class_names, info.class_counts, strict=True))
    shown = ", ".join(f"{name} {count}" for name, count in counts[:20])
    yield f"  {shown}{' …' if len(counts) > 20 else ''}"


def _first(what: str, messages: Sequence[str]) -> Iterator[str]:
    for message in messages[:20]:
        yield f"{what}: {message}"
    if len(messages) > 20:
        yield f"{what}: {len(messages) - 20:,} more, listed in the JSON file beside OUT"


def _run_warmup(_: argparse.Namespace) -> int:
    from simclr_dist.views.augment import warmup

    begin = time.perf_counter()
    warmup()
    print(f"kernels ready after {time.perf_counter() - begin:.1f} s")
    return 0
