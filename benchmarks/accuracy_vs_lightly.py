"""Does an encoder learn as much with our loss and augmentation as with lightly's? On the same images, step for step.

    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/train.beton --split train --limit 10000
    simclr-dist prepare cifar10-jpeg.tar.xz /tmp/test.beton --split test
    python benchmarks/accuracy_vs_lightly.py /tmp/train.beton /tmp/test.beton

Both sides train the same encoder and projection head from the same initial weights, with the same optimiser, learning
rate, batch size and number of steps. What differs is what is compared: ours takes `build_loader`, `Augment` and
`NTXentLoss`; lightly its `SimCLRTransform` on the decoded images, in an order drawn by torch, and its `NTXentLoss`.
Both are scored by our kNN and linear probe, with all the training images and all the test images.

Several seeds; mean, standard deviation, and the difference with its standard error. One process. Writes a JSON file
and a table to --out. Needs `pip install lightly lightning-utilities` besides simclr_dist.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simclr_dist.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig
from simclr_dist.data.loading.load_images import load_images
from simclr_dist.data.loading.open_images import describe
from simclr_dist.data.loading.pillow_images import BetonSource
from simclr_dist.data.loading.view_loader import build_loader
from simclr_dist.evaluation.features import extract_features
from simclr_dist.evaluation.knn import knn_top1
from simclr_dist.evaluation.linear import linear_probe
from simclr_dist.loss import NTXentLoss
from simclr_dist.network.simclr import SimCLR, build_model
from simclr_dist.optim.build import build_optimizer
from simclr_dist.optim.schedule import build_schedule, set_learning_rate
from simclr_dist.parallel.distributed import world
from simclr_dist.views.augment import Augment, normalize

BATCH = 256
TEMPERATURE = 0.2
# CIFAR's augmentation for both libraries: jitter strength 0.5, no blur, crops from 0.2 of the area (few epochs).
OURS = AugmentConfig(preset="simclr_cifar", crop_scale_min=0.2)
LIGHTLY = {"cj_strength": 0.5, "gaussian_blur": 0.0, "min_scale": 0.2}
SIDES = ("ours", "lightly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="a .beton file")
    parser.add_argument("test", help="a .beton file")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="of resnet_small")
    parser.add_argument("--image-size", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = []
    for seed in range(args.seeds):
        for side in SIDES:
            started = time.process_time()
            scores = score(pretrain(side, seed, args), args)
            runs.append({"side": side, "seed": seed, "cpu_s": time.process_time() - started, **scores})
            print(json.dumps(runs[-1]), flush=True)
    table = render(runs)
    print(table)
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "settings": {**vars(args), "out": None, "batch": BATCH, "temperature": TEMPERATURE, "lightly": LIGHTLY},
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"accuracy_vs_lightly_{time.strftime('%Y-%m-%d', time.gmtime())}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table + "\n")


def pretrain(side: str, seed: int, args: argparse.Namespace) -> SimCLR:
    """The same training loop for both; `side` chooses views and loss."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(encoder="resnet_small", width=args.width, head_hidden_dim=256, head_out_dim=64))
    optim = OptimConfig(optimizer="adamw", base_lr=2e-3, lr_scaling="none", warmup_epochs=0.5, weight_decay=1e-4)
    steps = describe(args.train).num_samples // BATCH
    optimizer = build_optimizer(model, optim)
    schedule = build_schedule(optim, BATCH, steps * BATCH, args.epochs)
    views_of = our_views if side == "ours" else lightlys_views
    loss_of = our_loss() if side == "ours" else lightlys_loss()
    seen = 0
    for views, ids in views_of(args, seed, steps):
        set_learning_rate(optimizer, schedule(seen))
        _, z = model(views.flatten(0, 1))
        optimizer.zero_grad(set_to_none=True)
        loss_of(z, ids).backward()
        optimizer.step()
        seen += BATCH
    assert seen == args.epochs * steps * BATCH
    return model


def our_views(args: argparse.Namespace, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = DataConfig(train=args.train, image_size=args.image_size, num_threads=args.threads)
    augment = Augment(OURS, seed, args.image_size)
    with build_loader(data, OURS, seed=seed, global_batch_size=BATCH, world=world(), device="cpu") as loader:
        for step, batch in enumerate(loader.batches(0)):
            if step == args.epochs * steps:
                return
            yield augment(batch), batch.sample_ids


def lightlys_views(args: argparse.Namespace, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    from lightly.transforms.simclr_transform import SimCLRTransform

    transform = SimCLRTransform(input_size=args.image_size, **LIGHTLY)
    source = BetonSource(args.train)
    images = [Image.fromarray(np.array(source.read(i))) for i in range(len(source.labels))]
    for _ in range(args.epochs):
        order = torch.randperm(len(images))
        for ids in order[: steps * BATCH].split(BATCH):
            pairs = [transform(images[i]) for i in ids.tolist()]
            yield torch.stack([torch.stack(views) for views in zip(*pairs, strict=True)]), ids


def our_loss() -> NTXentLoss:
    return NTXentLoss(TEMPERATURE)


def lightlys_loss():
    from lightly.loss import NTXentLoss as Theirs

    loss = Theirs(temperature=TEMPERATURE)
    return lambda z, ids: loss(*z.chunk(2))


def score(model: SimCLR, args: argparse.Namespace) -> dict[str, float]:
    train, test = (
        extract_features(
            model.encoder,
            load_images(path, args.image_size, batch_size=500, num_threads=1),
            device="cpu",
            normalize=normalize,
        )
        for path in (args.train, args.test)
    )
    classes = len(describe(args.train).class_names)
    knn = knn_top1(train, test, k=20, temperature=0.1, num_classes=classes)
    return {"knn": knn.top1, "linear": linear_probe(train, test, num_classes=classes).top1}


def render(runs: list[dict]) -> str:
    lines = ["| top-1, % | ours | lightly | ours - lightly |", "|---|---:|---:|---:|"]
    for method in ("knn", "linear"):
        found = {side: [100 * run[method] for run in runs if run["side"] == side] for side in SIDES}
        cells = [f"{statistics.mean(found[side]):.2f} ± {deviation(found[side]):.2f}" for side in SIDES]
        differences = [a - b for a, b in zip(found["ours"], found["lightly"], strict=True)]
        error = deviation(differences) / math.sqrt(len(differences))
        lines.append(f"| {method} | {cells[0]} | {cells[1]} | {statistics.mean(differences):+.2f} ± {error:.2f} |")
    seconds = (statistics.mean(run["cpu_s"] for run in runs if run["side"] == side) for side in SIDES)
    lines.append("| CPU seconds a run | {:.0f} | {:.0f} | |".format(*seconds))
    return "\n".join(lines)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
