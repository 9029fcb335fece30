"""`simclr-dist prepare`: images to a .beton file; `warmup`: compile the loader's kernels."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from simclr_dist.cli.arguments import Commands, add_command


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
    prepare.add_argument("--split", help="train, test, … where the source has several (STL-10: also unlabeled)")
    prepare.add_argument(
        "--mode", choices=("auto", "jpg", "raw", "smart"), default="auto", help="auto: raw for small images, else jpg"
    )
    prepare.add_argument("--quality", type=int, default=90, help="of JPEG (default: 90)")
    prepare.add_argument("--max-side", type=int, help="shrink images whose longer side exceeds this")
    prepare.add_argument("--limit", type=int, help="only the first n images of a fixed shuffle")
    prepare.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="for unreadable images")
    prepare.add_argument("--workers", type=int, help="processes (default: the CPUs this process may use)")
    add_command(
        commands, "warmup", _run_warmup, help="compile the loader's kernels, once a machine, before training does"
    )


def _run_prepare(args: argparse.Namespace) -> int:
    prepare_with_progress(
        args.source,
        args.out,
        split=args.split,
        mode=args.mode,
        quality=args.quality,
        max_side=args.max_side,
        limit=args.limit,
        on_error=args.on_error,
        num_workers=args.workers,
    )
    return 0


def prepare_with_progress(source: str | Path, out: Path, **options: Any) -> None:
    """`prepare` with a progress bar; prints what was written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simclr_dist.data.beton.prepare import prepare

    console = Console()
    begin = last_line = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"prepare {out.name}", total=None, rate="")

        def progress(done: int, total: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = done / max(now - begin, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} images/s")
            if not console.is_terminal and now - last_line >= 30:  # shows in a job's log that it has not hung
                last_line = now
                print(f"{done:,} of {total:,} images, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left", flush=True)

        info = prepare(source, out, progress=progress, **options)
    for message in info.skipped[:20]:
        print(f"skipped: {message}", file=sys.stderr)
    rate = info.num_samples / max(info.seconds, 1e-9)
    console.print(
        f"{info.path}: {info.num_samples:,} images in {len(info.class_names)} classes, "
        f"{info.num_bytes / 1e6:,.1f} MB, {rate:,.0f} images/s"
        + (f", {len(info.skipped)} skipped" if info.skipped else ""),
        highlight=False,
        markup=False,
    )
    counts = list(zip(info.class_names, info.class_counts, strict=True))
    shown = ", ".join(f"{name} {count}" for name, count in counts[:20])
    console.print(f"  {shown}{' …' if len(counts) > 20 else ''}", highlight=False, markup=False)


def _run_warmup(_: argparse.Namespace) -> int:
    from simclr_dist.views.augment import warmup

    begin = time.perf_counter()
    warmup()
    print(f"kernels ready after {time.perf_counter() - begin:.1f} s")
    return 0
