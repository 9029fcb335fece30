"""What do many files cost? Opening thousands of shards, and loading from them beside loading from one file.

    python -m benchmarks.shards --photographs imagenet-sample-256.tar

Images of 32 px are stored raw, where a view costs least and so the files most. CPU seconds of one thread, the least of
some rounds in turn. Writes a table to --out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, circumstances, write
from benchmarks.views import as_beton
from simclr_dist.config import AugmentConfig, DataConfig
from simclr_dist.data.beton import shard_set
from simclr_dist.data.beton.assemble import split
from simclr_dist.data.beton.shard_set import open_data
from simclr_dist.data.beton.writer import PagedWriter, Record
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.parallel.distributed import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="image folder or tar of photographs in folders")
    parser.add_argument("--files", type=int, default=10_000, help="how many are opened")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    when = circumstances(vars(options) | {"photographs": options.photographs.name})
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        startup = opening(work / "many", options.files)
        photographs = Path(as_beton(options.photographs, work).beton.path)
        rows = [
            ("raw, 32 px", *loading(raw_images(work / "raw.beton", 10_000), 1000, 32, 20_480, options.rounds)),
            ("photographs, 224 px", *loading(photographs, 128, 224, 512, options.rounds)),
        ]
    lines = [
        f"One core of {when['device']}, commit {when['commit']}.",
        "",
        f"Opening {options.files:,} files of 4 images: {startup[0]:.1f} s ({startup[1]:.1f} s of CPU time); again in "
        f"the same process {startup[2]:.2f} s.",
        "",
        "| images | shards | images / CPU second, one file | shards | speed |",
        "|---|---:|---:|---:|---:|",
        *(f"| {what} | {n:,} | {one:,.0f} | {many:,.0f} | {many / one:.2f} |" for what, n, one, many in rows),
    ]
    print("\n".join(lines))
    write("shards", options.out, {**when, "startup_s": startup, "rows": rows}, lines)


def raw_images(path: Path, count: int, side: int = 32) -> Path:
    generator = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        writer = PagedWriter(file, count)
        for i in range(count):
            writer.add(Record(generator.bytes(side * side * 3), 1, side, side, i % 10))
        writer.finish()
    return path


def opening(folder: Path, count: int) -> tuple[float, float, float]:
    """Seconds, and of CPU time, for the first time; seconds for the next."""
    for i in range(count):
        raw_images(folder / f"{i:05}.beton", 4, 8)
    shard_set._opened.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    open_data(folder).close()
    first = time.perf_counter() - wall, time.process_time() - cpu
    wall = time.perf_counter()
    open_data(folder).close()
    return *first, time.perf_counter() - wall


def loading(file: Path, num_shards: int, side: int, num_images: int, rounds: int) -> tuple[int, float, float]:
    """Number of shards; images a CPU second from the file and from its shards."""
    shards, _ = split(file, num_shards)
    speeds = [[speed(source, side, num_images) for source in (file, shards)] for _ in range(rounds)]
    one, many = (max(column) for column in zip(*speeds, strict=True))
    return num_shards, one, many


def speed(source: Path, side: int, num_images: int) -> float:
    data = DataConfig(train=str(source), image_size=side, num_threads=1)
    with build_loader(data, AugmentConfig(), seed=0, global_batch_size=128, world=World(), device="cpu") as loader:
        batches = loader.batches(0)
        next(batches)
        begin = time.process_time()
        for _ in islice(batches, num_images // 128):
            pass
        return num_images / (time.process_time() - begin)


if __name__ == "__main__":
    main()
