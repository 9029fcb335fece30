"""Reads runs, looks at what their encoders do with images, and writes the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from simclr_dist import __version__
from simclr_dist.atomic import replaces
from simclr_dist.checkpoint.pretrained import ForeignEncoder
from simclr_dist.errors import CheckpointError, DataError
from simclr_dist.report.insight import Insight, look_into
from simclr_dist.report.page import names_of, render
from simclr_dist.report.record import read_run


def write_report(
    runs: Sequence[Path | ForeignEncoder],
    out: Path,
    *,
    train: str | None = None,
    test: str | None = None,
    images: int = 5000,
    image_size: int | None = None,
    device: torch.device,
    say: Callable[[str], None],
) -> int:
    """The number of characters of the page. runs: or weights from elsewhere.

    train, test: None: those of each run. images: of each of them to look at, at side image_size.

    A run without a usable checkpoint or images is shown without them, which `say` is told. Raises DataError.
    """
    sources = {_path_of(source): source for source in runs}
    named = names_of([read_run(path, of_run=isinstance(source, Path)) for path, source in sources.items()])
    insights: dict[str, Insight | str] = {}
    for name, run in named.items():
        for remark in run.remarks:
            say(remark)
        try:
            insights[name] = look_into(
                sources[run.path], train=train, test=test, images=images, image_size=image_size, device=device
            )
        except (CheckpointError, DataError) as error:
            if isinstance(sources[run.path], ForeignEncoder):
                raise  # of these there is nothing else to show
            say(f"{name}: the page shows no images of it: {error}")
            insights[name] = str(error)
    page = render(named, insights, f"written {time.strftime('%Y-%m-%d %H:%M %Z')} by simclr-dist {__version__}")
    with replaces(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return len(page)


def _path_of(source: Path | ForeignEncoder) -> Path:
    return source if isinstance(source, Path) else Path(source.path)
