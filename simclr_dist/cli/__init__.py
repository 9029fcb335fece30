"""`simclr-dist`: data in, results out. Training itself is started by `accelerate launch` or `python -m launcher`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simclr_dist.config import json_schema, load_config, render_config
from simclr_dist.errors import UserError

EPILOG = """\
examples:
  simclr-dist prepare cifar10-jpeg.tar.xz data/cifar10_train.beton --split train
  simclr-dist config show configs/cifar10_resnet18_100ep.yaml train.epochs=5
  simclr-dist evaluate knn runs/cifar10_demo
  simclr-dist export runs/cifar10_demo --format torchvision

exit codes: 0 done · 1 a fault of the program · 2 bad input, said in the message
"""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        sys.exit(args.run(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    from simclr_dist.cli import evaluate as evaluation
    from simclr_dist.cli import plan, report
    from simclr_dist.doctor import checks as doctor

    top = argparse.ArgumentParser(
        prog="simclr-dist",
        description="SimCLR pretraining: prepare images, evaluate and export what was learnt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_inspect(commands)
    warmup = commands.add_parser("warmup", help="compile the loader's kernels, once a machine, before training does")
    warmup.set_defaults(run=_run_warmup)
    evaluation.register(commands)
    report.register(commands)
    _add_config(commands)
    plan.register(commands)
    doctor.register(commands)
    demo = commands.add_parser("demo", help="from images to a table of results, on this machine; `make demo` runs it")
    demo.add_argument("--config", default="configs/cifar10_demo.yaml")
    demo.add_argument("--nproc", type=int, help="processes (default: all GPUs, or two on the CPU)")
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    demo.set_defaults(run=_run_demo)
    _add_recipe(commands)
    return top


# ---------------------------------------------------------------------------------------------------------------------


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser(
        "prepare",
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
        "--mode", choices=("auto", "jpg", "raw", "smart"), default="auto", help="auto: raw for small pictures, else jpg"
    )
    prepare.add_argument("--quality", type=int, default=90, help="of JPEG (default: 90)")
    prepare.add_argument("--max-side", type=int, help="shrink pictures whose longer side exceeds this")
    prepare.add_argument("--limit", type=int, help="only the first n pictures of a fixed shuffle")
    prepare.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="for unreadable pictures")
    prepare.add_argument("--workers", type=int, help="processes (default: the CPUs this process may use)")
    prepare.set_defaults(run=_run_prepare)


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
    """`prepare` with a bar, and what was written, on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from simclr_dist.data.beton.writer import prepare

    console = Console()
    begin = said = time.monotonic()
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
            nonlocal said
            now = time.monotonic()
            rate = done / max(now - begin, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} pictures/s")
            if not console.is_terminal and now - said >= 30:  # a batch job's log shall show that it lives
                said = now
                print(f"{done:,} of {total:,} pictures, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left", flush=True)

        info = prepare(source, out, progress=progress, **options)
    for message in info.skipped[:20]:
        print(f"skipped: {message}", file=sys.stderr)
    rate = info.num_samples / max(info.seconds, 1e-9)
    console.print(
        f"{info.path}: {info.num_samples:,} pictures in {len(info.class_names)} classes, "
        f"{info.num_bytes / 1e6:,.1f} MB, {rate:,.0f} pictures/s"
        + (f", {len(info.skipped)} skipped" if info.skipped else ""),
        highlight=False,
        markup=False,
    )
    counts = list(zip(info.class_names, info.class_counts, strict=True))
    shown = ", ".join(f"{name} {count}" for name, count in counts[:20])
    console.print(f"  {shown}{' …' if len(counts) > 20 else ''}", highlight=False, markup=False)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="say what a .beton file holds, and check it")
    inspect.add_argument("file", metavar="FILE.beton", type=Path)
    inspect.add_argument("--verify", action="store_true", help="also decode every picture")
    inspect.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> int:
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
        "pictures": f"{found.num_samples:,} ({found.num_jpeg:,} JPEG, {found.num_samples - found.num_jpeg:,} raw)",
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


def _run_warmup(_: argparse.Namespace) -> int:
    from simclr_dist.views.augment import warmup

    begin = time.perf_counter()
    warmup()
    print(f"kernels ready after {time.perf_counter() - begin:.1f} s")
    return 0


def _add_config(commands: Any) -> None:
    config = commands.add_parser("config", help="show a configuration, or the schema of all")
    actions = config.add_subparsers(dest="action", required=True, metavar="show|schema")
    show = actions.add_parser("show", help="print the resolved configuration")
    show.add_argument("config", metavar="CONFIG")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.set_defaults(run=_run_config_show)
    schema = actions.add_parser("schema", help="print the JSON schema, for editors")
    schema.set_defaults(run=lambda _: print(json_schema(), end="") or 0)


def _run_config_show(args: argparse.Namespace) -> int:
    print(render_config(load_config(args.config, args.overrides, check_data=False)), end="")
    return 0


def _add_recipe(commands: Any) -> None:
    recipe = commands.add_parser(
        "recipe",
        help="SimCLR v2 from images to a table: pretrain, fine-tune with few labels, distil",
        description="Pretrains, fine-tunes with each share of the labels, and distils each into every student\n"
        "(SimCLR v2, arXiv 2006.10029). Started again it goes on where it was interrupted.",
        epilog="examples:\n"
        "  simclr-dist recipe configs/recipes/cifar10_v2_cpu.yaml\n"
        "  simclr-dist recipe configs/recipes/imagenet_v2_resnet50.yaml --run runs/imagenet_v2  # pretrained elsewhere",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, see configs/recipes/")
    recipe.add_argument(
        "--run", dest="pretrained", metavar="RUN", type=Path, help="take this pretrained run instead of pretraining"
    )
    recipe.add_argument("--nproc", type=int, help="processes that pretrain (default: all GPUs, or two on the CPU)")
    recipe.add_argument("--device", help="of fine-tuning and distillation (default: a GPU if there is one)")
    recipe.add_argument("--dry-run", action="store_true", help="check everything, print the stages, do nothing")
    recipe.add_argument("overrides", nargs="*", metavar="key=value", help="for pretraining")
    recipe.set_defaults(run=_run_recipe)


def _run_recipe(args: argparse.Namespace) -> int:
    from simclr_dist.few_labels.recipe import run_recipe
    from simclr_dist.terminal import choose_device

    return run_recipe(
        args.recipe,
        args.overrides,
        choose_device(args.device),
        run=args.pretrained,
        nproc=args.nproc,
        dry_run=args.dry_run,
    )


def _run_demo(args: argparse.Namespace) -> int:
    from simclr_dist.cli.demo import run_demo

    return run_demo(Path(args.config), args.nproc, args.overrides)


if __name__ == "__main__":
    main()
