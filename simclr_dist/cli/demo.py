"""The whole way on this machine: find images, prepare them, pretrain with several processes, evaluate, show a table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simclr_dist.cli import prepare_with_progress
from simclr_dist.config import load_config
from simclr_dist.data.sources.find import find_dataset
from simclr_dist.views.augment import warmup


def run_demo(config_path: Path, nproc: int | None, overrides: list[str]) -> int:
    """Raises ConfigError and DataError; returns the exit code of the training if that is not 0."""
    started = time.monotonic()
    console = Console()
    dataset, source = find_dataset()
    files = {split: Path("data") / f"{dataset}_{split}.beton" for split in ("train", "test")}
    for split, file in files.items():
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            prepare_with_progress(source, file, split=split)
    settings = [f"name={dataset}_demo", *(f"data.{split}={file}" for split, file in files.items()), *overrides]
    run_dir = load_config(config_path, settings).run_dir

    warmup()  # once, instead of in each process
    nproc = nproc or torch.cuda.device_count() or 2
    training = [sys.executable, "-m", "launcher", "local", str(config_path), "--nproc", str(nproc), *settings]
    code = subprocess.run(training, check=False).returncode
    if code:
        return code
    status = json.loads((run_dir / "status.json").read_text())
    if status["state"] != "finished":
        console.print(f"{status['state']} at step {status['step']}; `make demo` goes on from there")
        return 0

    scores = {method: _evaluate(method, run_dir) for method in ("knn", "linear")}
    console.print(_table(scores))
    speed = _median_images_per_s(run_dir / "log.jsonl")
    console.print(
        f"{speed:,.0f} images/s in training with {nproc} processes; {time.monotonic() - started:.0f} s in all\n"
        f"The run lies in {run_dir}; to start afresh, remove it.\n"
        f"Watch its curves and pictures: {Path(sys.executable).parent / 'tensorboard'} --logdir {run_dir.parent}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _evaluate(method: str, run_dir: Path) -> dict[str, Any]:
    """What `simclr-dist evaluate METHOD RUN --baselines --json` prints."""
    command = [sys.executable, "-m", "simclr_dist.cli", "evaluate", method, str(run_dir), "--baselines", "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _table(scores: dict[str, dict[str, Any]]) -> Table:
    table = Table("top-1 accuracy of", "kNN", "linear probe")
    for name, knn in scores["knn"]["scores"].items():
        table.add_row(name, f"{knn['top1']:.1%}", f"{scores['linear']['scores'][name]['top1']:.1%}")
    return table


def _median_images_per_s(log: Path) -> float:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(line["speed/images_per_s"] for line in lines if "speed/images_per_s" in line)
