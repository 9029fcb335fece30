"""`simclr-dist demo`: find images, prepare them, pretrain with several processes, evaluate, print a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from simclr_dist.cli.arguments import Commands, add_command, choose_device
from simclr_dist.cli.prepare import prepare_with_progress
from simclr_dist.cli.pretraining import pretrain
from simclr_dist.cli.terminal import print_table, say
from simclr_dist.config import load_config
from simclr_dist.run.layout import NUMBER, RunDir, is_a, read_records
from simclr_dist.run.status import read_status

UNTRAINED_TRAIN = 5_000  # for the encoder before training: with 10,000 test images, a quarter of the work


def register(commands: Commands) -> None:
    demo = add_command(
        commands, "demo", _run, help="from images to a table of results, on this machine; `make demo` runs it"
    )
    demo.add_argument("--config", default="configs/cifar10_demo.yaml", type=Path)
    demo.add_argument("--nproc", type=int, help="processes (default: all GPUs, or two on the CPU)")
    demo.add_argument("overrides", nargs="*", metavar="key=value")


def _run(args: argparse.Namespace) -> int:
    """Returns the exit code of the training if that is not 0. Raises ConfigError, DataError."""
    from simclr_dist.data.sources.open import find_dataset
    from simclr_dist.views.augment import warmup

    started = time.monotonic()
    dataset, source = find_dataset()
    files = {split: Path("data") / f"{dataset}_{split}.beton" for split in ("train", "test")}
    for split, file in files.items():
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            prepare_with_progress(source, file, split=split)
    settings = [f"name={dataset}_demo", *(f"data.{split}={file}" for split, file in files.items()), *args.overrides]
    run = RunDir(load_config(args.config, settings).run_dir)

    warmup()  # once, instead of in each process
    code = pretrain(args.config, settings, args.nproc)
    if code:
        return code
    status = read_status(run.path)
    if status is None or status.state != "finished":
        print(f"{status.state} at step {status.step}" if status else "not finished", end="; ")
        print("`make demo` continues from there")
        return 0

    _show_scores(run.path)
    print(closing_line(read_records(run.log), time.monotonic() - started))
    print(f"The run lies in {run.path}; remove it to start again from the beginning.")
    print(f"Its curves and images: {Path(sys.executable).with_name('tensorboard')} --logdir {run.path.parent}")
    return 0


def closing_line(log: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """The speed is the one that the training's own last table shows. seconds: of the demo."""
    from simclr_dist.monitor.speed import SINCE_START

    speeds = [record[SINCE_START] for record in log if is_a(record.get(SINCE_START), NUMBER)]
    trained = f"training: {speeds[-1]:,.0f} images/s without evaluations and saves; " if speeds else ""
    return f"{trained}the demo, from images to this table: {seconds:.0f} s"


def _show_scores(run_dir: Path) -> None:
    """In this process, which has imported torch already. The second evaluation finds the features of the first."""
    from simclr_dist.evaluation.offline import evaluate

    score = partial(
        evaluate, run_dir, baselines=True, untrained_train=UNTRAINED_TRAIN, device=choose_device(None), say=say
    )
    (knn, facts), (linear, _) = score(method="knn"), score(method="linear")
    print_table(
        "",
        ("top-1 accuracy of", "kNN", "linear probe"),
        [(one.name, f"{one.top1:.1%}", f"{other.top1:.1%}") for one, other in zip(knn, linear, strict=True)],
    )
    images = f"{facts['test_images']:,} test images of {facts['image_size']} px"
    print(f"On {images}; kNN with k {facts['k']} among {facts['train_images']:,} training images.")
