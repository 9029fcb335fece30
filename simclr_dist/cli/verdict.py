"""`simclr-dist verdict`: is it learning, has it collapsed, which run is better; without labels."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_dist.argument_types import positive_int
from simclr_dist.cli.arguments import (
    Commands,
    add_command,
    add_compute_arguments,
    add_source_arguments,
    choose_device,
    sources_of,
)
from simclr_dist.cli.terminal import percent, print_table, say
from simclr_dist.safe_text import printable

if TYPE_CHECKING:
    from simclr_dist.evaluation.verdict import Comparison, Verdict


def register(commands: Commands) -> None:
    verdict = add_command(
        commands,
        "verdict",
        _run,
        help="is it learning, has it collapsed, which run is better; without labels",
        description=(
            "Look at runs without a label, best first. All are shown the same views of the same images, at the side\n"
            "that each was trained with. They are ranked by how many of an image's 10 nearest neighbours are the same\n"
            "in two views of it. Runs may be in progress. What is found is no failure: the exit code is 0."
        ),
        epilog="example: simclr-dist verdict runs/cifar10_demo runs/longer --data data/cifar10_test.beton",
    )
    add_source_arguments(
        verdict,
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of runs, or checkpoints/step_… of them; with --encoder also weights of any origin",
    )
    verdict.add_argument(
        "--data",
        metavar="DATA",
        help="images, labelled or not (default: data.test of the first run, or its data.train)",
    )
    verdict.add_argument(
        "--images", type=positive_int, default=2000, help="of them to look at, evenly spread (default: 2000)"
    )
    verdict.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_compute_arguments(verdict)
    verdict.set_defaults(precision="fp32")


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.evaluation.verdict import compare

    found = compare(
        sources_of(args, "runs"),
        data=args.data,
        images=args.images,
        precision=args.precision,
        batch_size=args.batch_size,
        device=choose_device(args.device),
        say=say,
    )
    if args.json:
        print(json.dumps(_as_record(found), allow_nan=False), flush=True)
    else:
        _show(found)
    return 0


def _as_record(found: Comparison) -> dict[str, Any]:
    """Numbers that are not finite are null."""
    rows = [asdict(verdict) for verdict in found.verdicts]
    for row in rows:
        row["figures"] = {name: _finite(value) for name, value in (row["figures"] or {}).items()}
    images = found.images
    return {
        "images": images.source,
        "fingerprint": images.info.content_fingerprint,
        "count": images.count,
        "views": found.num_views,
        "chance": found.chance,
        "runs": rows,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _show(found: Comparison) -> None:
    columns = ("run", "step", "neighbours", "top-1", "alignment", "uniformity", "RankMe", "LiDAR", "alpha", "D", "px")
    print_table(
        f"{found.images.count:,} images of {found.images.source}, the same views for all; best first",
        columns,
        [_row(verdict) for verdict in found.verdicts],
        f"neighbours: those of the 10 nearest that two views of an image share; below {percent(found.chance)} a "
        "difference is chance. top-1: its other view is the nearest of all. Compare RankMe, LiDAR and alpha only where "
        "D is the same, and everything with caution where px differ",
    )
    for verdict in found.verdicts:
        kept = (
            ""
            if verdict.neighbours_kept is None
            else (f"; {verdict.neighbours_kept:.0%} of nearest neighbours are those of step {verdict.compared_step:,}")
        )
        print(printable(f"{verdict.name}: {verdict.sentence}{kept}"))
    if found.note:
        say(found.note)


def _row(verdict: Verdict) -> tuple[str, ...]:
    figures = verdict.figures
    if figures is None:
        return (verdict.name, *("-" * 10))
    return (
        verdict.name,
        f"{verdict.step:,}",
        percent(figures.neighbours_shared),
        percent(figures.contrastive_top1),
        f"{figures.alignment:.2f}",
        f"{figures.uniformity:.2f}",
        f"{figures.rankme:.1f}",
        f"{figures.lidar:.1f}",
        f"{figures.alpha_req:.2f}",
        str(verdict.width),
        str(verdict.image_size),
    )
