"""`simclr-dist inspect`: what a .beton file, a token folder or a file of weights holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.source_text import is_url

if TYPE_CHECKING:
    from simclr_dist.data.loading.inspect import Inspection


def register(commands: Commands) -> None:
    inspect = add_command(
        commands,
        "inspect",
        _run,
        help="show what .beton files, a token folder or a file of weights hold, and check it",
        description=(
            "Show what a .beton file holds, or many as one data set (a folder, a pattern), or a token folder.\n"
            "Of weights (a file, a folder as model hubs have it, a run): which encoder\n"
            "takes them, and under which names they lie."
        ),
    )
    inspect.add_argument("file", metavar="FILE", type=lambda text: text if is_url(text) else Path(text))
    inspect.add_argument("--verify", action="store_true", help="also read all of it and compare the content")


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.data.beton.shard_files import names_beton
    from simclr_dist.data.tokens.folder import is_token_folder

    if isinstance(args.file, Path) and is_token_folder(args.file):
        return _run_tokens(args)
    is_beton = names_beton(args.file) or not _is_of_weights(args.file)
    return _run_beton(args) if is_beton else _run_weights(args)


def _run_tokens(args: argparse.Namespace) -> int:
    from simclr_dist.data.tokens.folder import open_tokens
    from simclr_dist.safe_text import printable

    found = open_tokens(args.file)
    vocabulary, lengths, unlabelled = found.vocabulary, found.lengths, int((found.labels < 0).sum())
    sizes = f"{lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}"
    rows = {
        "samples": f"{len(found):,} in {len(found.class_names):,} classes, {unlabelled:,} without one",
        "tokens": f"{len(found.tokens):,}; of a sample {sizes}",
        "vocabulary": f"{vocabulary.size:,} ({vocabulary.what}), digest {vocabulary.digest[:16]}",
        "fingerprint": found.verified_fingerprint() if args.verify else found.fingerprint,
    }
    for line in found.account.lines():
        print(printable(line))
    for key, value in rows.items():
        print(f"{key:12} {value}")
    if args.verify:
        print("verified     every file is what was written")
    return 0


def _is_of_weights(file: Path | str) -> bool:
    return isinstance(file, Path) and (
        file.is_dir() or file.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar", ".pth.tar")
    )


def _run_weights(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.weights import describe_weights
    from simclr_dist.cli.terminal import say

    for key, value in describe_weights(args.file, say):
        print(f"{key:12} {value}".rstrip())
    return 0


def _run_beton(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from simclr_dist.data.loading.inspect import inspect_beton
    from simclr_dist.safe_text import printable
    from simclr_dist.streams import console

    terminal = console()
    with Progress(console=terminal, disable=not (terminal.is_terminal and args.verify), transient=True) as progress:
        task = progress.add_task("decoding", total=None)
        found = inspect_beton(
            args.file, args.verify, lambda done, total: progress.update(task, completed=done, total=total)
        )
    for key, value in _rows(found):  # lines of any length: a table would be folded in a log file
        print(f"{key:12} {printable(value)}".rstrip())
    sys.stdout.flush()
    for sample, reason in list((found.damaged or {}).items())[:20]:
        print(printable(f"damaged: sample {sample}: {reason}"), file=sys.stderr)
    if found.changed:
        print(
            f"{printable(str(found.changed_file))}: its pixels or labels have changed since it was written",
            file=sys.stderr,
        )
    return 2 if found.damaged or found.changed else 0


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    smallest, median, largest = found.sides
    several = f", {found.num_files:,} files" if found.num_files > 1 else ""
    yield "file", f"{found.path}{several}, {found.num_bytes / 1e6:,.1f} MB"
    kept = sum(n for n in (sidecar.get("num_kept_jpeg") for sidecar in found.sidecars) if isinstance(n, int))
    as_they_came = f", {kept:,} of them as they came;" if kept else ","
    raw = found.num_samples - found.num_jpeg
    yield "images", f"{found.num_samples:,} ({found.num_jpeg:,} JPEG{as_they_came} {raw:,} raw)"
    if found.kept is not None:
        yield "pixels", f"{found.kept}, as they were"
        yield "mean", " ".join(f"{x:.6g}" for x in found.kept.mean) + f" (1 is {found.kept.largest})"
        yield "std", " ".join(f"{x:.6g}" for x in found.kept.std)
    yield "longer side", f"{smallest} to {largest} px, median {median}"
    for line in dict.fromkeys(_made_for(sidecar) for sidecar in found.sidecars):
        if line:
            yield "made for", line
    classes = ", ".join(f"{n} {c}" for n, c in zip(found.class_names[:20], found.class_counts, strict=False))
    more = f" … ({len(found.class_names)} in all)" if len(found.class_names) > 20 else ""
    yield "classes", classes + more
    for i, line in enumerate(found.account.lines() if found.account else ["not recorded"]):
        yield "" if i else "made from", line
    yield "fingerprint", found.fingerprint
    if found.damaged is None:
        yield "decoded", "not tried (--verify does)"
        return
    yield "decoded", f"{found.num_samples - len(found.damaged):,} well"
    as_written = {None: "cannot be compared: not made by `simclr-dist prepare`", True: "CHANGED", False: "as written"}
    yield "content", as_written[found.changed]


def _made_for(sidecar: dict[str, Any]) -> str:
    from simclr_dist.data.beton.fit import prepared_for

    if (side := prepared_for(sidecar)) is None:
        return ""
    max_side, quality, shrunk = (sidecar.get(key) for key in ("max_side", "quality_of_shrunk", "num_shrunk"))
    return f"views of {side} px: {shrunk} images shrunk to {max_side} px, JPEG quality {quality}"
