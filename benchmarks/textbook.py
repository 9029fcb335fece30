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

import torch

import simclr_dist
from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config, load_config
from simclr_dist.data import Batch
from simclr_dist.data.loading.evaluation_labels import evaluation_images
from simclr_dist.evaluation.online import OnlineEvaluation
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/textbook"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = {"train": Path(options.train).name, "test": Path(options.test).name}
    when = circumstances(vars(options) | named)
    demo = row(options, "cifar10_demo", math.inf, {"train.epochs": options.epochs} if options.epochs else {})
    rows = [row(options, "cifar10_textbook", demo["cpu_seconds"], {}), demo]
    lines = [
        f"kNN (k 20, among 5,000) on CIFAR-10 after the same CPU time, seed {options.seed}; one thread, fp32,",
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
    return {
        "name": name,
        "settings": config.model_dump(mode="json"),
        "cpu_seconds": Contestant.spent_s,
        "steps": Contestant.steps,
        "images": Contestant.steps * config.train.global_batch_size,
        "knn_top1": knn_top1(config, run.encoder().to(memory_format=torch.channels_last)),  # type: ignore[call-overload]
    }


def knn_top1(config: Config, encoder: torch.nn.Module) -> float:
    """As the demo is measured while it trains."""
    evaluation = config.evaluation.model_copy(update={"knn_every_epochs": 1, "knn_k": 20, "knn_max_train": 5000})
    images = evaluation_images(config.data, evaluation, seed=0)
    assert images is not None
    scores = OnlineEvaluation(
        images,
        data=config.evaluation_data,
        evaluation=evaluation,
        precision="fp32",
        device=torch.device("cpu"),
        warn_once=print,
    )(encoder, step=0)
    return scores.figures["eval/knn_top1"]


if __name__ == "__main__":
    main()
