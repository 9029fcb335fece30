"""Time and memory of an evaluation's arithmetic: kNN and the linear probe on features of noise around class centres.

    python -m benchmarks.evaluation                               100,000 x 512 features, 1,000 classes: some minutes
    python -m benchmarks.evaluation --images 1281167 --width 2048 --dtype float16 --methods knn      ImageNet's size

The features lie in a file that is mapped into memory, as those of a run do. Each method runs in a fresh process; its
memory is the most that the process held of its own, so without the file, above what it held before. Test images: a
tenth of --images, 50,000 at most. The result is a table and benchmarks/results/evaluation_<date>.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.linear import linear_probe


def make_features(path: Path, n: int, args: argparse.Namespace, seed: int) -> None:
    """Pooled features of a network are sums of rectified ones, of very unequal deviations, and correlated."""
    fixed, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    D = args.width
    centres = 0.6 * torch.randn(args.classes, D, generator=fixed)
    mix = torch.randn(D, D, generator=fixed) / D**0.5 * torch.logspace(0, -1.2, D)
    labels = (torch.arange(n) % args.classes)[torch.randperm(n, generator=own)]
    h = np.lib.format.open_memmap(path / f"h{seed}.npy", "w+", args.dtype, (n, D))
    for start in range(0, n, 10_000):
        y = labels[start : start + 10_000]
        h[start : start + len(y)] = ((centres[y] + 1.5 * torch.randn(len(y), D, generator=own)) @ mix).relu().numpy()
    h.flush()
    np.save(path / f"labels{seed}.npy", labels.numpy())


def read_features(path: Path, seed: int) -> Features:
    h = torch.from_numpy(np.load(path / f"h{seed}.npy", mmap_mode="c"))
    return Features(h, torch.from_numpy(np.load(path / f"labels{seed}.npy")), torch.arange(len(h)))


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


class MostMemory(threading.Thread):
    """Looks often how much this process holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = own_memory()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own_memory())
            time.sleep(0.02)


def evaluate(path: Path, method: Literal["knn", "linear"], args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(args.threads)
    train, test = (read_features(path, seed) for seed in (0, 1))
    watch = MostMemory()
    watch.start()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    if method == "knn":
        top1 = knn_top1(train, test, num_classes=args.classes).top1
    else:
        top1 = linear_probe(train, test, num_classes=args.classes, say=lambda line: print(f"  {line}", flush=True)).top1
    results.put(
        {
            "seconds": time.perf_counter() - began_s,
            "cpu_seconds": time.process_time() - cpu_s,
            "mib_beside_features": (watch.most - watch.before) / 2**20,
            "top1": top1,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    parser.add_argument("--methods", nargs="+", choices=("knn", "linear"), default=["knn", "linear"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the features; default: the system's temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    report: dict[str, Any] = circumstances(vars(args)) | {"found": {}}
    size = f"{args.images:,} x {args.width:,} {args.dtype}, {args.classes:,} classes"
    lines = [f"{size:46} {'seconds':>8} {'CPU s':>8} {'MiB beside features':>20} {'top-1':>8}"]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for seed, n in enumerate((args.images, min(50_000, args.images // 10))):
            make_features(Path(folder), n, args, seed)
        context = multiprocessing.get_context("spawn")
        for method in args.methods:
            results = context.Queue()
            process = context.Process(target=evaluate, args=(Path(folder), method, args, results))
            process.start()
            report["found"][method] = row = results.get(timeout=24 * 3600)
            process.join()
            lines.append(
                f"{method:46} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['mib_beside_features']:20.0f} "
                f"{row['top1']:8.2%}"
            )
            print(lines[-1], flush=True)
    write("evaluation", args.out, report, lines)


if __name__ == "__main__":
    main()
