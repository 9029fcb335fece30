"""What does a view cost, when one decode gives V of them? Photographs at 224 px, on one core.

    python -m benchmarks.views --photographs imagenet-sample-256.tar

Milliseconds of CPU time a view: its share of the decode, the crop, and the complete chain with colours. The least of
some rounds, so that a busy machine disturbs little. Writes a table to --out.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import AugmentConfig
from simclr_dist.data import Batch
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.data.decode.crops import random_crops
from simclr_dist.data.loading.ffcv_images import BetonImages
from simclr_dist.data.randomness import keys
from simclr_dist.views.augment import Augment

VIEWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="image folder or tar of photographs in folders")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    when = circumstances(vars(options) | {"photographs": options.photographs.name})
    with tempfile.TemporaryDirectory() as work:
        rows = measure(as_beton(options.photographs, Path(work)), options.side, options.images, options.rounds)
    lines = [
        f"Milliseconds of CPU time a view of {options.side} px, one core of {when['device']}, commit {when['commit']}.",
        "",
        "| views an image | decode | crop | colours | together |",
        "|---:|---:|---:|---:|---:|",
        *(f"| {V} | " + " | ".join(f"{ms:.3f}" for ms in (*parts, sum(parts))) + " |" for V, *parts in rows),
    ]
    print("\n".join(lines))
    write("views", options.out, {**when, "rows": rows}, lines)


def as_beton(source: Path, work: Path) -> BetonImages:
    """Photographs in class folders, perhaps in a tar with one folder at its top, as JPEG in their own size."""
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(work / "files", filter="data")
        (source,) = (work / "files").iterdir()
    prepare(source, work / "photographs.beton", on_error="skip")
    return BetonImages(work / "photographs.beton")


def measure(images: BetonImages, side: int, count: int, rounds: int) -> list[tuple[int, float, float, float]]:
    """(V, milliseconds a view of: decoding, cropping, colours)."""
    ids = np.arange(min(count, len(images.labels)))
    n, numbers = len(ids), torch.from_numpy(ids)
    augment = Augment(AugmentConfig(preset="simclr_imagenet"), 0, side)
    decode = least(lambda: images.damaged(ids), rounds) / n
    rows = []
    for V in VIEWS:
        view_keys, out = keys(0, 0, ids[None], np.arange(V)[:, None]), np.empty((V, n, side, side, 3), np.uint8)

        def crop(heights, widths, view_keys=view_keys):  # type: ignore[no-untyped-def]
            return random_crops(view_keys, heights, widths, scale_min=0.08, flip_p=0.5)

        both = least(lambda crop=crop, out=out: images.fill(ids, crop, out), rounds) / n  # type: ignore[misc]
        batch = Batch(torch.from_numpy(out), numbers, numbers, 0)
        colours = least(lambda batch=batch: augment(batch), rounds) / n  # type: ignore[misc]
        rows.append((V, decode / V, (both - decode) / V, colours / V))
    return rows


def least(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds of CPU time, after one call that warms up."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
