"""`simclr-dist report`: runs side by side on one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from simclr_dist.argument_types import positive_int
from simclr_dist.cli.arguments import Commands, add_command, choose_device
from simclr_dist.cli.terminal import say


def register(commands: Commands) -> None:
    report = add_command(
        commands,
        "report",
        _run,
        help="write one HTML page about a run, or about several side by side",
        description=(
            "Write one self-contained HTML page: results, curves, augmented pairs, nearest neighbours, maps of the\n"
            "embeddings, the confusion of a linear probe, similarities, configuration, environment."
        ),
        epilog="example: simclr-dist report runs/cifar10_demo runs/longer --out compared.html",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    report.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the folder of the first run")
    report.add_argument("--train", metavar="DATA", help="training images (default: data.train of each run)")
    report.add_argument("--test", metavar="DATA", help="held-out images (default: data.test of each run)")
    report.add_argument(
        "--images", type=positive_int, default=5000, help="of each of them to look at, evenly spread (default: 5000)"
    )
    report.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def _run(args: argparse.Namespace) -> int:
    from simclr_dist.report import check_requirements

    check_requirements()
    from simclr_dist.report.write import write_report

    out = args.out or args.runs[0] / "report.html"
    device = choose_device(args.device)
    size = write_report(args.runs, out, train=args.train, test=args.test, images=args.images, device=device, say=say)
    print(f"{out}: {size / 1e6:.1f} MB")
    return 0
