"""The first example of textbooks beside the demo's recipe, each with the CPU time of the demo's training.

    python -m benchmarks.textbook --train data/cifar10_train.beton --test data/cifar10_test.beton

Both are trained as their configurations say, in one process with one thread. The demo runs to its end; the example,
whose learning rate is constant, is stopped after as many CPU seconds: those of the steps and their images, of
all threads, without start, evaluation and saves. Then kNN, both among the same images. Writes a table to --out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import simclr_dist
from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config, load_config
from simclr_dist.data import Batch
from simclr_dist.data.classes import draw_by_class
from simclr_dist.evaluation.features import extract_features
from simclr_dist.evaluation.knn import knn_top1 as knn
from simclr_dist.evaluation.readable_images import ReadableImages
from simclr_dist.kinds import kind_of
from simclr_dist.kinds.labelled_images import open_labelled
from simclr_dist.training.trainer import StepResult, Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = {  # nothing but training while the clock runs
    "resume": "none",
    "data.num_threads": 1,
    "train.precision": "fp32",
    "evaluation.knn_every_epochs": None,
    "evaluation.online_probe": False,
    "checkpoint.every_min": None,
    "monitor.health_every_steps": None,
    "monitor.image_pairs": 0,
}


class Clocked(Trainer):
    """Stops after `budget_s` CPU seconds of steps; the first step, which compiles and imports, is not counted."""

    budget_s = math.inf
    began_s = spent_s = 0.0
    steps = 0

    def train_step(self, batch: Batch) -> StepResult:
        result = super().train_step(batch)
        type(self).steps += 1
        if self.steps == 1:
            type(self).began_s = time.process_time()
        type(self).spent_s = time.process_time() - self.began_s
        if self.spent_s >= self.budget_s:
            (self.config.run_dir / "STOP").touch()
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="data/cifar10_train.beton")
    parser.add_argument("--test", default="data/cifar10_test.beton")
    parser.add_argument("--epochs", type=int, help="of the demo, whose schedule fits them (default: its own)")
    parser.add_argument(
        "--cpu-seconds", type=float, help="stop both after these; the demo's rate is high then (default: its whole)"
    )
    parser.add_argument("--bank", type=int, default=5000, help="training images that kNN looks among")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/textbook"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = {"train": Path(options.train).name, "test": Path(options.test).name}
    when = circumstances(vars(options) | named)
    changes = {"train.epochs": options.epochs} if options.epochs else {}
    demo = row(options, "cifar10_demo", options.cpu_seconds or math.inf, changes)
    rows = [row(options, "cifar10_textbook", demo["cpu_seconds"], {}), demo]
    lines = [
        f"kNN (k 20, among {options.bank:,}) of {options.test_images:,} test images of CIFAR-10 after the same CPU",
        f"time, seed {options.seed}, one thread, fp32,",
        f"{when['device']}, commit {when['commit']}, torch {when['torch']}.",
        "",
        "| configuration | CPU seconds | steps | images seen | kNN top-1 |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {r['name']} | {r['cpu_seconds']:.0f} | {r['steps']:,} | {r['images']:,} | {r['knn_top1']:.2%} |"
            for r in rows
        ),
    ]
    print("\n".join(lines))
    write("textbook", options.out, {**when, "rows": rows}, lines)


def row(options: argparse.Namespace, name: str, budget_s: float, changes: dict[str, Any]) -> dict[str, Any]:
    given = {"data.train": options.train, "data.test": options.test, "seed": options.seed, **changes}
    config = load_config(CONFIGS / f"{name}.yaml", {**SETTINGS, **given, "runs_dir": str(options.work)})

    class Contestant(Clocked):
        pass

    Contestant.budget_s = budget_s
    run = simclr_dist.pretrain(config, trainer_class=Contestant)
    encoder = run.encoder().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        "name": name,
        "settings": config.model_dump(mode="json", exclude={"runs_dir": True, "data": {"train", "test"}}),
        "cpu_seconds": Contestant.spent_s,
        "steps": Contestant.steps,
        "images": Contestant.steps * config.train.global_batch_size,
        "knn_top1": knn_top1(config, encoder, options.bank, options.test_images),
    }


def knn_top1(config: Config, encoder: torch.nn.Module, bank: int, num_test: int) -> float:
    """As the demo is measured while it trains, k 20, on some of the test images, evenly spread."""
    device, images, kind = torch.device("cpu"), open_labelled(config.data), kind_of(config.evaluation_data)
    assert config.data.test is not None
    n = images.test_info.num_samples
    chosen = (
        (images.train, draw_by_class(images.train_info.labels, bank, 0)),
        (images.test, np.arange(min(num_test, n), dtype=np.int64) * n // min(num_test, n)),
    )
    features = [
        extract_features(encoder, ReadableImages(kind, source, 500)(ids), device=device, normalize=kind.to_input)
        for source, ids in chosen
    ]
    return knn(*features, k=20, temperature=0.1, num_classes=images.num_classes, device=device).top1


if __name__ == "__main__":
    main()
