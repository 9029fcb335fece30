"""`simclr-dist prepare`: images to a .beton file, texts and proteins to a token folder; `warmup`: compile kernels."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import add_source_arguments, percentage, positive_int
from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.config.schema import OF_TOKENS, PAIRS, WITH_IMAGES
from simclr_dist.errors import ConfigError

if TYPE_CHECKING:
    from simclr_dist.data.beton.prepare import PreparedInfo


def register(commands: Commands) -> None:
    prepare = add_command(
        commands,
        "prepare",
        _run_prepare,
        help="write images to a .beton file; texts, proteins and pairs to a folder",
        description="Writes images to a .beton file, or texts or proteins to a token folder. It appears under its name "
        "only when it is complete.",
    )
    prepare.add_argument("--kind", choices=("images", *OF_TOKENS, *PAIRS), default="images", help="what SOURCE holds")
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of class folders; tar or zip of one; WebDataset, parquet or CSV; several as 'x-{000..012}.tar' or "
        "'x/*.tar'; a URL; torchvision's files; or cifar10, cifar100, stl10, fashion-mnist (docs/data.md); "
        "texts and pairs: .txt, .tsv, .csv, .jsonl or .parquet; proteins: FASTA",
    )
    prepare.add_argument("out", metavar="OUT", type=Path, help="OUT.beton; of others than images, a folder")
    prepare.add_argument(
        "--mode", choices=("auto", "jpg", "raw", "smart"), help="auto (default): raw for small images, else jpg"
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
    prepare.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="only N images, spread evenly over SOURCE; texts, proteins: the first",
    )
    prepare.add_argument("--on-error", choices=("refuse", "skip"), help="for unreadable images (default: refuse)")
    prepare.add_argument("--strict", action="store_true", help="fail when anything found at SOURCE is left out")
    prepare.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    prepare.add_argument(
        "--workers", type=positive_int, metavar="N", help="processes (default: the CPUs this process may use)"
    )
    add_source_arguments(prepare)
    _add_token_arguments(prepare)
    add_command(
        commands, "warmup", _run_warmup, help="compile the loader's kernels, once a machine, before training does"
    )


def _add_token_arguments(prepare: argparse.ArgumentParser) -> None:
    tokens = prepare.add_argument_group("texts, proteins and pairs")
    tokens.add_argument(
        "--max-tokens", type=positive_int, metavar="N", help="cut what is longer (default: 1024); data.tokens cuts more"
    )
    tokens.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="of texts: tokenizer.json, or a folder with one: a model's, or a token folder (default: one is trained)",
    )
    tokens.add_argument(
        "--vocabulary", type=positive_int, metavar="N", help="tokens of the tokenizer that is trained (default: 8192)"
    )
    tokens.add_argument(
        "--column",
        action="append",
        metavar="NAME",
        help="of a table: the texts'; several: each is a text of its own. text_pairs: both sides'. image_text: that of "
        "the images' names, and the texts'; the texts' alone where row i is of image i",
    )
    tokens.add_argument(
        "--images", type=Path, metavar="PATH", help="of image_text: a folder, a tar archive or a .beton file"
    )
    tokens.add_argument("--label-column", metavar="NAME", help="of a table: the classes'")
    tokens.add_argument("--no-header", action="store_true", help="of .tsv and .csv: columns are called 1, 2, 3, …")
    tokens.add_argument("--encoding", help="of texts (default: utf-8)")
    tokens.add_argument(
        "--label-pattern", metavar="REGEX", help="of proteins: finds the class in a header; its first group, or all"
    )


_OF_IMAGES = "mode", "for_views", "quality", "max_side", "on_error", "workers"
_OF_TEXT = "tokenizer", "vocabulary", "column", "label_column", "no_header", "encoding", "max_tokens"
_OF_PROTEINS = "label_pattern", "max_tokens"
_OF_IMAGE_TEXT = "images", *(name for name in (*_OF_IMAGES, *_OF_TEXT) if name != "label_column")
_OWN = {
    "images": _OF_IMAGES,
    "text": _OF_TEXT,
    "proteins": _OF_PROTEINS,
    "text_pairs": _OF_TEXT,
    "image_text": _OF_IMAGE_TEXT,
}


def _refuse_options_of_other_kinds(args: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from simclr_dist.data.account import SourceOptions

    own = _OWN[args.kind]
    given = [name for name in dict.fromkeys(name for names in _OWN.values() for name in names) if getattr(args, name)]
    if args.kind not in WITH_IMAGES:
        read, usual = asdict(SourceOptions.from_arguments(args)), asdict(SourceOptions())
        given += [name.replace("value_range", "range") for name in read if read[name] != usual[name]]
    if args.kind == "image_text" and args.limit:
        given.append("limit")
    if others := [f"--{name.replace('_', '-')}" for name in given if name not in own]:
        raise ConfigError([f"{', '.join(others)}: not for --kind {args.kind}; leave it out"])


def _prepare_tokens(args: argparse.Namespace) -> int:
    from simclr_dist.data.tokens.prepare import prepare_proteins, prepare_texts
    from simclr_dist.data.tokens.texts import Columns
    from simclr_dist.safe_text import printable

    common: dict[str, Any] = {
        "max_tokens": args.max_tokens or 1024,
        "limit": args.limit,
        "strict": args.strict,
        "overwrite": args.overwrite,
    }
    if args.kind in PAIRS:
        return _prepare_pairs(args, common)
    if args.kind == "proteins":
        info = prepare_proteins(Path(args.source), args.out, label_pattern=args.label_pattern, **common)
    else:
        info = prepare_texts(
            Path(args.source),
            args.out,
            tokenizer_at=args.tokenizer,
            vocabulary_size=args.vocabulary or 8192,
            columns=Columns(tuple(args.column or ()), args.label_column, not args.no_header),
            encoding=args.encoding or "utf-8",
            **common,
        )
    for line in info.account.lines():
        print(printable(line))
    print(
        printable(
            f"{info.path}: {info.account.taken:,} {info.account.noun}s {_in_classes(info.class_names)}, "
            f"{info.num_tokens:,} tokens, the longest had {info.longest:,}; {info.seconds:.1f} s"
        )
    )
    print(f"  for your configuration: data.kind: {args.kind}, model.vocabulary: {info.vocabulary.size}")
    return 0


def _prepare_pairs(args: argparse.Namespace, common: dict[str, Any]) -> int:
    from simclr_dist.data.account import SourceOptions
    from simclr_dist.data.pairs.prepare import prepare_image_text, prepare_text_pairs
    from simclr_dist.data.tokens.texts import Columns
    from simclr_dist.safe_text import printable

    common |= {
        "columns": Columns(tuple(args.column or ()), args.label_column, not args.no_header),
        "tokenizer_at": args.tokenizer,
        "vocabulary_size": args.vocabulary or 8192,
        "encoding": args.encoding or "utf-8",
    }
    if args.kind == "text_pairs":
        info, vocabulary = prepare_text_pairs(Path(args.source), args.out, **common), "model.vocabulary"
    else:
        if args.images is None:
            raise ConfigError(["--images: is missing: where are the images whose texts these are?"])
        del common["limit"]
        images = {name: getattr(args, name) for name in ("for_views", "quality", "max_side")}
        info, vocabulary = (
            prepare_image_text(
                Path(args.source),
                args.out,
                images=args.images,
                options=SourceOptions.from_arguments(args),
                mode=args.mode or "auto",
                num_workers=args.workers,
                on_error=args.on_error or "refuse",
                **images,
                **common,
            ),
            "model.text.vocabulary",
        )
    for line in info.account.lines():
        print(printable(line))
    print(
        printable(
            f"{info.path}: {info.num_pairs:,} {info.account.noun}s, {info.num_texts:,} texts of {info.num_tokens:,} "
            f"tokens; {info.seconds:.1f} s"
        )
    )
    if info.num_groups < info.num_pairs:
        print(
            f"  some share a content: {info.num_groups:,} groups, the largest of {info.largest_group:,}; within "
            "one, none is a negative"
        )
    print(f"  for your configuration: data.kind: {args.kind}, {vocabulary}: {info.vocabulary_size}")
    return 0


def _in_classes(names: Sequence[str]) -> str:
    return f"in {len(names)} class{'es' if len(names) > 1 else ''}" if names else "without classes"


def _run_prepare(args: argparse.Namespace) -> int:
    _refuse_options_of_other_kinds(args)
    if args.kind != "images":
        return _prepare_tokens(args)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts no threads, so workers can be forked
    from simclr_dist.data.account import SourceOptions

    prepare_with_progress(
        args.source,
        args.out,
        options=SourceOptions.from_arguments(args),
        mode=args.mode or "auto",
        quality=args.quality,
        max_side=args.max_side,
        for_views=args.for_views,
        limit=args.limit,
        on_error=args.on_error or "refuse",
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
        print(
            printable(
                f"{losses:,} found at {info.account.source} but not taken, see above; --strict makes this an error"
            )
        )


def _summary(info: PreparedInfo) -> Iterator[str]:
    """The account, then what was written."""
    yield from info.account.lines()
    rate = info.num_samples / max(info.seconds, 1e-9)
    yield (
        f"{info.path}: {info.num_samples:,} images {_in_classes(info.class_names)}, "
        f"{info.num_bytes / 1e6:,.1f} MB, {rate:,.0f} images/s"
    )
    if info.kept is not None:
        yield f"  {info.kept}, as they were; of each channel mean {_numbers(info.kept.mean)}"
        yield f"  and standard deviation {_numbers(info.kept.std)}, in units of {info.kept.largest}"
    if info.fit is not None:
        yield f"  {info.fit}"
        yield f"  {info.num_shrunk:,} of {info.num_samples:,} images were shrunk"
    counts = list(zip(info.class_names, info.class_counts, strict=True))
    shown = ", ".join(f"{name} {count}" for name, count in counts[:20])
    yield f"  {shown}{' …' if len(counts) > 20 else ''}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in values)


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
