"""How fast does `prepare` write a .beton file? Against ffcv's own DatasetWriter on the same files.

    python benchmarks/prepare.py --photographs imagenet-sample-256.tar --cifar cifar10-jpeg.tar.xz

Every contestant runs in a fresh process on one CPU with one worker and on two CPUs with two, in turns, several rounds;
the best round counts, from the call to the file flushed to disk, start of the workers included. Beside the speed stands
what a second of CPU time yields, which a busy machine disturbs less. Both write JPEG of quality 90 for photographs (the
given ones --times times; ours stores those that are as coarse already as they came) and raw pixels for CIFAR-10. What
our process loads once for photographs, some 0.9 s, counts for little in a large data set, and for much with --times 6.
DatasetWriter gets a dataset that opens the files with Pillow, as in its examples. The last row is the digest that
identifies a file's content, in GB per second of CPU time, for a file in memory. Writes JSON and a table to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from data import stage, versions  # type: ignore[import-not-found]
from report import commit, cpu_name  # type: ignore[import-not-found]

CONTESTANTS = ("ours", "ffcv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="image folder or tar of photographs in class folders")
    parser.add_argument("--cifar", type=Path, help="tar of CIFAR-10 with train/ and test/ class folders")
    parser.add_argument("--times", type=int, default=24, help="how often each photograph is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))), flush=True)
        os._exit(0)  # after DatasetWriter, Python's own way out hangs on one CPU
    if not (options.photographs or options.cifar):
        parser.error("give --photographs, --cifar or both")
    with tempfile.TemporaryDirectory() as work:
        places = {}
        if options.photographs:
            places["photographs"] = stage(options.photographs, None, Path(work) / "photographs")
            places["photographs"]["folder"] = repeated(
                Path(places["photographs"]["folder"]), Path(work) / "repeated", options.times
            )
        if options.cifar:
            places["CIFAR-10"] = stage(options.cifar, "test", Path(work) / "cifar")
        report(options, compare(options.rounds, places, Path(work)))


def repeated(folder: Path, place: Path, times: int) -> str:
    """A folder with every file of `folder` so many times."""
    for path in folder.glob("*/*"):
        for i in range(times):
            link = place / path.parent.name / f"{i}_{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return str(place)


def compare(rounds: int, places: dict[str, dict[str, str]], work: Path) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for _ in range(rounds):
        for data, place in places.items():
            for workers in (1, 2):
                for contestant in CONTESTANTS:
                    out = str(work / "out.beton")
                    result = in_child(workers, contestant=contestant, folder=place["folder"], out=out)
                    keep_best(found, f"{data}, {workers} CPU{'s' * (workers - 1)}, images", contestant, result)
            result = in_child(1, contestant="digest", folder="", out=place["beton"])
            keep_best(found, f"{data}, digest of the content, GB", "ours", result)
    return found


def keep_best(found: dict[str, Any], task: str, contestant: str, result: dict[str, float]) -> None:
    best = found.setdefault(task, {}).setdefault(contestant, result)
    for key, value in result.items():
        best[key] = max(best[key], value)


def in_child(workers: int, **arguments: Any) -> dict[str, float]:
    cpus = set(sorted(os.sched_getaffinity(0))[:workers])
    root = Path(__file__).resolve().parent.parent
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps({"workers": workers, **arguments})],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    result: dict[str, float] = json.loads(completed.stdout.splitlines()[-1])
    print(arguments["contestant"], workers, result, flush=True)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# In the child


def measure(contestant: str, workers: int, folder: str, out: str) -> dict[str, float]:
    run = {"ours": ours, "ffcv": ffcv_writer, "digest": digest}[contestant](folder, out, workers)
    begin, cpu_begin = time.perf_counter(), cpu_s()
    count = run()
    return {"per_s": count / (time.perf_counter() - begin), "per_cpu_s": count / (cpu_s() - cpu_begin)}


def cpu_s() -> float:
    """Of this process and of its workers, ended or not."""
    times = os.times()
    running = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
    return times.user + times.system + times.children_user + times.children_system + running


def ours(folder: str, out: str, workers: int) -> Callable[[], float]:
    from simclr_dist.data.beton.prepare import prepare

    return lambda: prepare(folder, out, num_workers=workers, on_error="skip", overwrite=True).num_samples


def ffcv_writer(folder: str, out: str, workers: int) -> Callable[[], float]:
    from simclr_dist.data.decode.ffcv_import import import_ffcv

    import_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image
    from torchvision.datasets import ImageFolder

    class Opened(ImageFolder):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            path, label = self.samples[index]
            with Image.open(path) as image:
                return image.convert("RGB"), label

    images = Opened(folder)
    small = Image.open(images.samples[0][0]).width <= 96
    field = RGBImageField(write_mode="raw" if small else "jpg", jpeg_quality=90)

    def run() -> float:
        DatasetWriter(out, {"image": field, "label": IntField()}, num_workers=workers).from_indexed_dataset(images)
        with open(out, "rb") as file:
            os.fsync(file.fileno())  # as ours does
        return len(images)

    return run


def digest(_: str, out: str, workers: int) -> Callable[[], float]:
    from simclr_dist.data.beton.content import read_records_digest
    from simclr_dist.data.beton.reader import open_beton

    beton = open_beton(out)
    read_records_digest(beton)  # now it is in memory

    def run() -> float:
        for _round in range(10):
            read_records_digest(beton)
        return 10 * int(beton.record_bytes.sum()) / 1e9

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(options: argparse.Namespace, found: dict[str, dict[str, dict[str, float]]]) -> None:
    stamp = time.strftime("%Y-%m-%d")
    content = {
        "date": stamp,
        "commit": commit(),
        "rounds": options.rounds,
        "times": options.times,
        "cpu": cpu_name(),
        "load_average": os.getloadavg(),
        "versions": versions(sys.executable),
        "results": found,
    }
    lines = [
        f"Writing .beton files on {content['cpu']}, {stamp}, commit {content['commit']}, "
        f"load average {os.getloadavg()[0]:.1f}",
        "",
        "| task | | a second | a second of CPU time |",
        "|---|---|---:|---:|",
    ]
    for task, row in found.items():
        digits = 2 if "GB" in task else 0
        for contestant, result in row.items():
            lines.append(
                f"| {task} | {contestant} | {result['per_s']:,.{digits}f} | {result['per_cpu_s']:,.{digits}f} |"
            )
        if "ffcv" in row:
            ratios = (f"{row['ours'][key] / row['ffcv'][key]:.2f}x" for key in ("per_s", "per_cpu_s"))
            lines.append(f"| | ours is | {' | '.join(ratios)} |")
    table = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"prepare_{stamp}.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.out / f"prepare_{stamp}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
