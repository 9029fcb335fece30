"""`simclr-dist report`: runs side by side on one HTML page."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from simclr_dist import __version__
from simclr_dist.argument_types import positive_int
from simclr_dist.atomic import replaces
from simclr_dist.cli.arguments import Commands, add_command, choose_device
from simclr_dist.cli.terminal import say
from simclr_dist.errors import CheckpointError, ConfigError, DataError


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
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        what = " and ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
        raise ConfigError([f"`simclr-dist report` needs {what}: pip install 'simclr_dist[eval]'"])

    from simclr_dist.report.insight import Insight, look_into
    from simclr_dist.report.page import names_of, render
    from simclr_dist.report.record import read_run

    runs = names_of([read_run(path) for path in dict.fromkeys(args.runs)])
    device = choose_device(args.device)
    insights: dict[str, Insight | str] = {}
    for name, run in runs.items():
        try:
            insights[name] = look_into(run.path, train=args.train, test=args.test, images=args.images, device=device)
        except (CheckpointError, DataError) as error:
            say(f"{name}: the page shows no images of it: {error}")
            insights[name] = str(error)
    written = f"written {time.strftime('%Y-%m-%d %H:%M %Z')} by simclr-dist {__version__}"
    out = args.out or args.runs[0] / "report.html"
    page = render(runs, insights, written)
    with replaces(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{out}: {len(page) / 1e6:.1f} MB")
    return 0
