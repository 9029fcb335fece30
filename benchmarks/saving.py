"""How long does a training stand still for a save? Written beside the steps, and waited for.

    python -m benchmarks.saving                       500 MB of state, a disk of 100 MB/s: some minutes

Two trainings of one network whose weights and optimiser state take --megabytes, one after the other: in the first a
thread writes each checkpoint, in the second (checkpoint.in_background: false) the steps wait for it. The slow disk is
simulated: after its real flush every file sleeps for as long as --disk-mb-s would have taken. `stands still` is the
time between two steps, `save` the time until the checkpoint has its name: medians over --saves saves. The first save,
which allocates the memory of the copy, stands apart. Beside them the time of a step while a checkpoint is written and
while none is: on a machine without a free core the thread's hashing takes time from the steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import Config
from simclr_dist.data import Batch
from simclr_dist.training.trainer import Trainer


def slow_disk(mb_per_s: float) -> None:
    """From now on os.fsync takes as long as a disk of this speed."""
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        fsync(descriptor)
        time.sleep(os.fstat(descriptor).st_size / (1e6 * mb_per_s))

    os.fsync = slowly  # type: ignore[assignment]


class Watched:
    """Lets a training go on until it has made its saves, and notes when each step began and whether a save ran then."""

    def __init__(self, trainer: Trainer, saves: int) -> None:
        self._trainer = trainer
        self._saves = saves
        self._sound = trainer.parts.loader.batches
        self.steps_s: dict[bool, list[float]] = {True: [], False: []}
        trainer.parts.loader.batches = self.batches  # type: ignore[method-assign, assignment]

    def batches(self, first_step: int) -> Iterator[Batch]:
        log, saver = self._trainer.config.run_dir / "log.jsonl", self._trainer.parts.saver
        for batch in self._sound(first_step):
            before = saver._writing
            began_s = time.perf_counter()
            yield batch
            took_s, after = time.perf_counter() - began_s, saver._writing
            if before is after:  # no save began or ended within it
                self.steps_s[after is not None and not after.result.done()].append(took_s)
            if len(saves_in(log)) >= self._saves:
                (self._trainer.config.run_dir / "STOP").touch()


def saves_in(log: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if "speed/checkpoint_s" in line]


def run(settings: dict[str, Any], args: argparse.Namespace, results: Any) -> None:
    warnings.simplefilter("ignore")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    slow_disk(args.disk_mb_s)
    trainer = Trainer(Config.model_validate(settings))
    watched = Watched(trainer, args.saves + 1)
    trainer.fit()
    found = saves_in(trainer.config.run_dir / "log.jsonl")[: args.saves + 1]
    newest = max((trainer.config.run_dir / "checkpoints").glob("step_*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    results.put(
        {
            "megabytes": size / 1e6,
            "stands_still_s": statistics.median(save["speed/checkpoint_wait_s"] for save in found[1:]),
            "first_stands_still_s": found[0]["speed/checkpoint_wait_s"],
            "save_s": statistics.median(save["speed/checkpoint_s"] for save in found[1:]),
            "step_while_saving_s": statistics.median(watched.steps_s[True]) if watched.steps_s[True] else None,
            "step_otherwise_s": statistics.median(watched.steps_s[False]),
        }
    )


def measure(in_background: bool, args: argparse.Namespace) -> dict[str, Any]:
    # Two layers of the head hold nearly all: hidden * (256 + 128) numbers of weights, and as many of momentum.
    hidden = int(args.megabytes * 1e6 / (2 * 4 * (256 + 128)))
    with tempfile.TemporaryDirectory(dir=args.work) as runs:
        settings = {
            "name": "saving",
            "runs_dir": runs,
            "data": {"train": "synthetic", "image_size": 32},
            "augment": {"preset": "simclr_cifar"},
            "model": {"encoder": "resnet_small", "width": 64, "head_hidden_dim": hidden, "head_out_dim": 128},
            "optim": {"optimizer": "sgd", "base_lr": 0.01},
            "train": {"global_batch_size": 8, "epochs": 100_000, "precision": "fp32"},
            "evaluation": {"knn_every_epochs": None},
            "checkpoint": {"every_min": args.every_s / 60, "in_background": in_background},
            "monitor": {"image_pairs": 0, "health_every_steps": None, "terminal": "quiet"},
        }
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=run, args=(settings, args, results))
        process.start()
        found: dict[str, Any] = results.get(timeout=3600)
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="of weights and optimiser state")
    parser.add_argument("--disk-mb-s", type=float, default=100)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--every-s", type=float, default=15, help="seconds between two saves")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: the system's temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    report: dict[str, Any] = circumstances(vars(args))
    report["found"] = found = {name: measure(name == "beside", args) for name in ("beside", "waited for")}
    lines = ["checkpoint   stands still (first)         save   of the save   a step: while saving, otherwise"]
    for name, row in found.items():
        still, save, during = row["stands_still_s"], row["save_s"], row["step_while_saving_s"]
        still = still if name == "beside" else save
        lines.append(
            f"{name:10}   {still:7.3f} s ({row['first_stands_still_s']:.3f} s)   {save:7.2f} s   {still / save:9.1%}   "
            + (f"{1e3 * during:9.0f} ms" if during else "        -   ")
            + f", {1e3 * row['step_otherwise_s']:.0f} ms"
        )
    lines.append(
        f"{found['beside']['megabytes']:,.0f} MB a checkpoint, {args.disk_mb_s:g} MB/s, torch {torch.__version__}"
    )
    print("\n".join(lines))
    write("saving", args.out, report, lines)


if __name__ == "__main__":
    main()
