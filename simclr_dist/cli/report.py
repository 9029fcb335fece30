"""`simclr-dist report`: runs side by side on one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from simclr_dist.argument_types import positive_int
from simclr_dist.cli.arguments import Commands, add_command, add_source_arguments, choose_device, sources_of
from simclr_dist.cli.terminal import say
from simclr_dist.errors import ConfigError
from simclr_dist.run.results import require_writable


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
    add_source_arguments(
        report, "runs", nargs="+", type=Path, help="folders of runs; with --encoder also weights of any origin"
    )
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

    runs = sources_of(args, "runs")
    if args.out is None and not args.runs[0].is_dir():
        raise ConfigError([f"{args.runs[0]}: is of no run, so name the page to write with --out"])
    out = args.out or args.runs[0] / "report.html"
    require_writable(out.parent)
    device = choose_device(args.device)
    size = write_report(
        *(runs, out),
        train=args.train,
        test=args.test,
        images=args.images,
        image_size=args.image_size,
        device=device,
        say=say,
    )
    print(f"{out}: {size / 1e6:.1f} MB")
    return 0
