"""How fast is loading two views of an image? Ours compared with stock ffcv, torchvision and lightly.

    python benchmarks/data.py --photographs imagenet-sample-256.tar --cifar cifar10-jpeg.tar.xz

Every contestant runs in a fresh process on one CPU, in turns, several rounds; the best round counts. Speed is images
per second of CPU time (two views each), so that a busy machine disturbs it little: that is what one core yields.
Memory is the growth of anonymous memory from before the loader is made. First batch: from making the loader to having
a batch, imports not included, compiled code of ours on disk (stock ffcv's cannot be).

Photographs are stored as JPEG of quality 90 in their own size for both users of .beton files; torchvision and lightly
read the original files through a DataLoader without workers, which on one core is their fastest. Contestants that are
not installed are named. Writes a JSON file and a table to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from report import commit, cpu_name  # type: ignore[import-not-found]

BATCH = 64
CONTESTANTS = ("ours", "ffcv", "torchvision", "lightly")
TASKS = {
    # name: (data, side, complete views or crops and flips only)
    "photographs 224 px, crops": ("photographs", 224, False),
    "photographs 224 px, complete views": ("photographs", 224, True),
    "CIFAR-10 32 px, crops": ("cifar", 32, False),
    "CIFAR-10 32 px, complete views": ("cifar", 32, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="image folder or tar of photographs in class folders")
    parser.add_argument("--cifar", type=Path, help="tar of CIFAR-10 with train/ and test/ class folders")
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="interpreter with the peers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    if not (options.photographs or options.cifar):
        parser.error("give --photographs, --cifar or both")
    with tempfile.TemporaryDirectory() as work:
        places = {}
        if options.photographs:
            places["photographs"] = stage(options.photographs, None, Path(work) / "photographs")
        if options.cifar:
            places["cifar"] = stage(options.cifar, "test", Path(work) / "cifar")
        report(options, compare(options, places))


def stage(source: Path, split: str | None, place: Path) -> dict[str, str]:
    """The images as a .beton file and as a folder of files."""
    from simclr_dist.data.beton.prepare import prepare

    folder = source
    if source.is_file():
        place.mkdir()
        with tarfile.open(source) as archive:
            archive.extractall(place, filter="data")
        folder = next(place.iterdir())
    if split is not None:
        folder /= split
    beton = place.with_suffix(".beton")
    prepare(folder, beton, on_error="skip")
    return {"beton": str(beton), "folder": str(folder)}


def compare(options: argparse.Namespace, places: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for task, (data, side, complete) in TASKS.items():
            for contestant in CONTESTANTS:
                if (
                    data not in places
                    or (contestant == "ffcv" and complete)
                    or (contestant == "lightly" and not complete)
                ):
                    continue
                arguments = {
                    "contestant": contestant,
                    "side": side,
                    "complete": complete,
                    "seconds": options.seconds,
                    **places[data],
                }
                result = in_child(options.python, arguments)
                print(f"{task:36} {contestant:12} {result}", flush=True)
                best = found.setdefault(task, {}).setdefault(contestant, result)
                if "absent" not in result:
                    for key, better in (("images_per_cpu_s", max), ("first_batch_s", min), ("memory_mib", min)):
                        best[key] = better(best[key], result[key])
    return found


def in_child(python: str, arguments: dict[str, Any]) -> dict[str, Any]:
    cpu = min(os.sched_getaffinity(0))
    root = str(Path(__file__).resolve().parent.parent)
    completed = subprocess.run(
        [python, "-W", "ignore", __file__, "--child", json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        return {"absent": completed.stderr.strip().splitlines()[-1]}
    return json.loads(completed.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# In the child


def measure(contestant: str, side: int, complete: bool, seconds: float, beton: str, folder: str) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    make = {"ours": ours, "ffcv": stock_ffcv, "torchvision": torchvision, "lightly": lightly}[contestant]
    batches = make(side, complete, beton, folder)  # imports; opens nothing yet
    before = anonymous_mib()
    begin = time.perf_counter()
    stream = batches()
    next(stream)
    first_batch_s = time.perf_counter() - begin
    for _ in itertools.islice(stream, 2):
        pass
    peak, count = anonymous_mib(), 0
    begin, wall = time.process_time(), time.perf_counter()
    while time.process_time() - begin < seconds:
        count += len(next(stream))
        peak = max(peak, anonymous_mib())
    cpu_s, wall_s = time.process_time() - begin, time.perf_counter() - wall
    return {
        "images_per_cpu_s": count / cpu_s,
        "images_per_wall_s": count / wall_s,
        "first_batch_s": first_batch_s,
        "memory_mib": peak - before,
    }


Batches = Callable[[], Iterator[Any]]


def ours(side: int, complete: bool, beton: str, folder: str) -> Batches:
    from simclr_dist.config import AugmentConfig, DataConfig
    from simclr_dist.data.loading.view_loader import build_loader
    from simclr_dist.parallel.distributed import World
    from simclr_dist.views.augment import Augment

    config = AugmentConfig(preset="simclr_cifar" if side == 32 else "simclr_imagenet")
    augment = Augment(config, 0, side)

    def batches() -> Iterator[Any]:
        data = DataConfig(train=beton, image_size=side, num_threads=1)
        loader = build_loader(data, config, seed=0, global_batch_size=BATCH, world=World(), device="cpu")
        for batch in loader.batches(0):
            if complete:
                augment(batch)
            yield batch.sample_ids

    return batches


def stock_ffcv(side: int, complete: bool, beton: str, folder: str) -> Batches:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def view() -> Any:
        transforms = [RandomHorizontalFlip(), ToTensor()]
        return PipelineSpec("image", RandomResizedCropRGBImageDecoder((side, side), scale=(0.08, 1.0)), transforms)

    def batches() -> Iterator[Any]:
        loader = Loader(
            beton,
            batch_size=BATCH,
            num_workers=1,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={"image": view(), "image2": view()},
        )
        while True:
            for views in loader:
                yield views[0]

    return batches


def torchvision(side: int, complete: bool, beton: str, folder: str) -> Batches:
    import torch
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(side, scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if complete:
        strength = 0.5 if side == 32 else 1.0
        jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        steps += [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)]
        if side > 32:
            steps.append(v2.RandomApply([v2.GaussianBlur(side // 10 // 2 * 2 + 1, (0.1, 2.0))], 0.5))
        normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    else:
        steps.append(v2.ToImage())
    transform = v2.Compose(steps)
    return data_loader(folder, lambda image: (transform(image), transform(image)))


def lightly(side: int, complete: bool, beton: str, folder: str) -> Batches:
    from lightly.transforms import SimCLRTransform

    small = {"cj_strength": 0.5, "gaussian_blur": 0.0} if side == 32 else {}
    return data_loader(folder, SimCLRTransform(input_size=side, **small))


def data_loader(folder: str, transform: Callable[[Any], Any]) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    def batches() -> Iterator[Any]:
        dataset = ImageFolder(folder, transform)
        loader: Iterable[Any] = DataLoader(dataset, BATCH, shuffle=True, num_workers=0, drop_last=True)
        while True:
            for (first, _second), _labels in loader:
                yield first

    return batches


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    stamp = time.strftime("%Y-%m-%d")
    content = {
        "date": stamp,
        "commit": commit(),
        "photographs": options.photographs and options.photographs.name,
        "cifar": options.cifar and options.cifar.name,
        "cpu_seconds_a_measurement": options.seconds,
        "rounds": options.rounds,
        "cpu": cpu_name(),
        "load_average": os.getloadavg(),
        "batch_size": BATCH,
        "versions": versions(options.python),
        "results": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"data_{stamp}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        f"Two views an image on one core of {content['cpu']}, batches of {BATCH}, {stamp}, commit {content['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
        "",
        "| task | contestant | images / CPU second | ours is | first batch, s | memory, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task, contestants in found.items():
        for name, result in contestants.items():
            if "absent" in result:
                lines.append(f"| {task} | {name} | absent: {result['absent']} | | | |")
                continue
            ratio = contestants["ours"]["images_per_cpu_s"] / result["images_per_cpu_s"]
            lines.append(
                f"| {task} | {name} | {result['images_per_cpu_s']:,.0f} | {ratio:.1f}x | "
                f"{result['first_batch_s']:.2f} | {result['memory_mib']:.0f} |"
            )
    table = "\n".join(lines) + "\n"
    (options.out / f"data_{stamp}.md").write_text(table)
    print(table)


def versions(python: str) -> dict[str, str]:
    names = ["ffcv", "torch", "torchvision", "lightly", "pillow", "numba"]
    script = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return 'absent'\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    asked = subprocess.run([python, "-c", script, *names], capture_output=True, text=True, check=True)
    return {"python": platform.python_version(), **json.loads(asked.stdout)}


if __name__ == "__main__":
    main()
