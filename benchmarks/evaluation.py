"""Time and memory of evaluations.

    python -m benchmarks.evaluation                               100,000 x 512 features, 1,000 classes: some minutes
    python -m benchmarks.evaluation --methods features finetune distill embed report
    python -m benchmarks.evaluation --images 1281167 --width 2048 --dtype float16 --methods knn      ImageNet's size

kNN and the linear probe work on features of noise around class centres, the others on a run that is made here: images of
noise, and an encoder that has not been trained. The features lie in a file that is mapped into memory, as those of a run do. Each method runs in a fresh process; its
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
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.checkpoint.files import take_snapshot, write_checkpoint
from simclr_dist.config import Config
from simclr_dist.data.beton.prepare import prepare
from simclr_dist.evaluation.embed import embed
from simclr_dist.evaluation.embeddings_file import save_embeddings
from simclr_dist.evaluation.features import Features
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.evaluation.offline import evaluate
from simclr_dist.few_labels.train import Settings, distill_classifier, finetune_checkpoint
from simclr_dist.network.simclr import build_model
from simclr_dist.run.state import TrainState

ARITHMETIC, ON_RUN = ("knn", "linear"), ("features", "finetune", "distill", "embed", "report")


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


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def make_run(path: Path, args: argparse.Namespace) -> None:
    """A run with one checkpoint, of an encoder that has not been trained, beside images of noise."""
    generator, side = np.random.default_rng(0), args.image_size
    for name, n in (("train", args.run_images), ("test", args.run_images // 4)):
        for i in range(n):
            folder = path / name / f"class{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.normal(generator.uniform(60, 200, 3), 40, (side, side, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:06}.jpg", quality=90)
        prepare(path / name, path / f"{name}.beton", num_workers=1)
    stem = "cifar" if side <= 64 else "imagenet"
    config = Config.model_validate(
        {
            "name": "run",
            "runs_dir": str(path),
            "data": {"train": str(path / "train.beton"), "test": str(path / "test.beton"), "image_size": side},
            "model": {"encoder": args.encoder, **({"stem": stem} if args.encoder.startswith("resnet") else {})},
            "train": {"global_batch_size": 64, "epochs": 1, "precision": "fp32"},
            "optim": {"warmup_epochs": 0.0},
        }
    )
    model = build_model(config.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshot = take_snapshot(
        config=config,
        state=TrainState(1, 64),
        fingerprint="none",
        model=model,
        optimizer=optimizer,
        grad_scaler={},
        versions={},
    )
    write_checkpoint(config.run_dir / "checkpoints", snapshot, attempt="benchmark")


def on_run(path: Path, method: str, args: argparse.Namespace) -> float | None:
    """The accuracy, where the method measures one; it means nothing here."""
    run, device = path / "run", torch.device("cpu")
    settings = Settings(device, epochs=args.epochs, save_every_minutes=1e6)
    if method == "features":
        return evaluate(run, method="knn", k=20, device=device, say=say)[0][0].top1
    if method == "finetune":
        return float(finetune_checkpoint(run, path / "tuned", settings, say=say)["top1"])
    if method == "distill":
        teacher = path / "tuned" / "classifier.safetensors"
        if not teacher.exists():
            raise SystemExit("distill needs the classifier of finetune: name that before it")
        return float(distill_classifier(teacher, path / "student", settings, say=say)["top1"])
    if method == "embed":
        save_embeddings(path / "h.npz", embed(run, str(path / "train.beton"), device=device))
    else:
        from simclr_dist.report.write import write_report

        write_report([run], path / "report.html", images=args.run_images // 4, device=device, say=say)
    return None


def measure(path: Path, method: str, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(args.threads)
    arithmetic = method in ARITHMETIC
    train, test = (read_features(path, seed) for seed in (0, 1)) if arithmetic else (None, None)
    watch = MostMemory()
    watch.start()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    top1: float | None
    if train is None or test is None:
        top1 = on_run(path, method, args)
    elif method == "knn":
        top1 = knn_top1(train, test, num_classes=args.classes).top1
    else:
        top1 = linear_probe(train, test, num_classes=args.classes, say=say).top1
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
    parser.add_argument("--methods", nargs="+", choices=ARITHMETIC + ON_RUN, default=list(ARITHMETIC))
    parser.add_argument("--run-images", type=int, default=2000, help="of the run; a quarter as many test images")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--epochs", type=int, default=1, help="of finetune and distill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the features; default: the system's temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    report: dict[str, Any] = circumstances(vars(args)) | {"found": {}}
    on_features = any(method in ARITHMETIC for method in args.methods)
    size = (
        f"{args.images:,} x {args.width:,} {args.dtype}, {args.classes:,} classes"
        if on_features
        else f"{args.encoder}, {args.run_images:,} images of {args.image_size} px, {args.epochs} epoch(s)"
    )
    lines = [f"{size:46} {'seconds':>8} {'CPU s':>8} {'MiB beside features':>20} {'top-1':>8}"]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for seed, n in enumerate((args.images, min(50_000, args.images // 10))) if on_features else ():
            make_features(Path(folder), n, args, seed)
        if any(method in ON_RUN for method in args.methods):
            make_run(Path(folder), args)
        context = multiprocessing.get_context("spawn")
        for method in args.methods:
            results = context.Queue()
            process = context.Process(target=measure, args=(Path(folder), method, args, results))
            process.start()
            report["found"][method] = row = results.get(timeout=24 * 3600)
            process.join()
            lines.append(
                f"{method:46} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['mib_beside_features']:20.0f} "
                + ("" if row["top1"] is None else f"{row['top1']:8.2%}")
            )
            print(lines[-1], flush=True)
    write("evaluation", args.out, report, lines)


if __name__ == "__main__":
    main()
