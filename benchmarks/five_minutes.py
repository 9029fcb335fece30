"""How much does an encoder learn of CIFAR-10 in five minutes on two cores, from nothing? One row a recipe.

    simclr-dist prepare cifar10-jpeg.tar.xz data/cifar10_train.beton --split train
    simclr-dist prepare cifar10-jpeg.tar.xz data/cifar10_test.beton --split test
    python -m benchmarks.five_minutes                                  the demo's recipe and the controls, three seeds
    python -m benchmarks.five_minutes --row demo --row "16 channels" --seeds 1
    python -m benchmarks.five_minutes --cpu-seconds 600                on a machine that others use as well
    python -m benchmarks.five_minutes --side-by-side 8                 eight trainings at a time, on cores of their own
    python -m benchmarks.five_minutes --list                           all rows

A row is configs/cifar10_demo.yaml with other settings, and trains through the launcher on two processes. The learning
rate falls to zero at the end, so the length is chosen before: a short training tells what a step of the row costs, and
it gets the whole epochs that fit into the budget. The budget is for steps alone: starting, evaluating and saving
are left out. --cpu-seconds counts the time of all the training's processes. --epochs fixes the length by hand, to
compare recipes at equal images. Scores: kNN (k 20, all training images) and linear probe, at evaluation.image_size.

The row "lightly" has lightly's views and loss in the same trainer (benchmarks/lightly_trainer.py) and needs lightly.
Writes a table and a JSON file to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, circumstances, write
from simclr_dist.config import load_config
from simclr_dist.data.loading.open_images import describe
from simclr_dist.monitor.speed import LAST_INTERVAL
from simclr_dist.run.layout import read_records

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cifar10_demo.yaml"
SHORT, LONG = 8, 80
"""Steps of two trainings before: what starting costs, and what a step costs."""
ALONE = (
    "evaluation.knn_every_epochs=null",
    "evaluation.online_probe=false",
    "checkpoint.every_min=null",
    "monitor.image_pairs=0",
    "monitor.health_every_steps=null",
    "monitor.terminal=quiet",
)
"""Nothing but steps."""
ADAMW = ("optim.optimizer=adamw", "optim.base_lr=2.0e-3", "optim.muon_momentum=0.95", "optim.muon_ns_steps=5")
BEFORE = (
    "data.image_size=24",
    "augment.crop_scale_min=0.2",
    "model.width=32",
    "model.first_layer=random",
    *ADAMW,
    "evaluation.image_size=null",
)
"""The demo's recipe of release 0.1."""
BEST_WITH_BF16 = "bf16, 48 channels, 24 px, tested at 32"
"""For processors with AVX512-BF16, which train 2.8 times the demo's network in twice its time."""


@dataclass(frozen=True)
class Row:
    settings: tuple[str, ...] = ()
    module: str | None = None
    """A trainer of its own; None: simclr_dist.train, by the launcher."""


ROWS = {
    "before": Row(BEFORE),
    "demo": Row(),
    "lightly": Row(module="benchmarks.lightly_trainer"),
    "lightly, before": Row(BEFORE, "benchmarks.lightly_trainer"),
    # What was tried besides, each against "demo":
    "AdamW": Row(ADAMW),
    "random first layer": Row(("model.first_layer=random",)),
    "tested at 20 px": Row(("evaluation.image_size=20",)),
    "16 px, tested at 24": Row(("data.image_size=16", "evaluation.image_size=24")),
    "24 px, tested at 32": Row(("data.image_size=24", "evaluation.image_size=32")),
    "32 px, tested at 32": Row(("data.image_size=32", "evaluation.image_size=32")),
    "16 channels": Row(("model.width=16",)),
    "32 channels": Row(("model.width=32",)),
    "48 channels": Row(("model.width=48",)),
    "rate 0.05": Row(("optim.base_lr=0.05",)),
    "rate 0.2": Row(("optim.base_lr=0.2",)),
    "momentum 0.9": Row(("optim.muon_momentum=0.9",)),
    "5 Newton-Schulz steps": Row(("optim.muon_ns_steps=5",)),
    "batch 128": Row(("train.global_batch_size=128",)),
    "batch 512": Row(("train.global_batch_size=512",)),
    "temperature 0.07": Row(("loss.temperature=0.07",)),
    "temperature 0.2": Row(("loss.temperature=0.2",)),
    "DCL": Row(("loss.kind=dcl",)),
    "crops from 0.1": Row(("augment.crop_scale_min=0.1",)),
    "crops from 0.2": Row(("augment.crop_scale_min=0.2",)),
    "crops from 0.4": Row(("augment.crop_scale_min=0.4",)),
    "4 views, batch 128": Row(("data.num_views=4", "train.global_batch_size=128")),
    "16 px, 4 views, batch 128, tested at 24": Row(
        ("data.image_size=16", "evaluation.image_size=24", "data.num_views=4", "train.global_batch_size=128")
    ),
    "head of 3 layers": Row(("model.head_layers=3",)),
    "head to 128": Row(("model.head_out_dim=128",)),
    "no weight decay": Row(("optim.weight_decay=0.0",)),
    "bf16": Row(("train.precision=bf16",)),
    "bf16, 32 channels": Row(("train.precision=bf16", "model.width=32")),
    "bf16, 48 channels": Row(("train.precision=bf16", "model.width=48")),
    BEST_WITH_BF16: Row(
        (
            "train.precision=bf16",
            "model.width=48",
            "data.image_size=24",
            "evaluation.image_size=32",
            "augment.crop_scale_min=0.2",
        )
    ),
    "compiled": Row(("train.compile=true",)),
}
SHOWN = ("before", "demo", BEST_WITH_BF16)


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float
    """Of all processes together."""

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, n: int) -> Seconds:
        return Seconds(self.wall / n, self.cpu / n)


def epochs_within(budget: Seconds, step: Seconds, steps_per_epoch: int) -> int:
    """The whole epochs that fit in, one at least. budget: infinite where it does not count. step: what one costs."""
    steps = min(budget.wall / step.wall, budget.cpu / step.cpu)
    return max(1, int(steps / steps_per_epoch))


def main() -> None:
    args = _arguments()
    if args.list:
        print("\n".join(f"{name:24} {' '.join(row.settings)}" for name, row in ROWS.items()))
        return
    budget = Seconds(math.inf if args.cpu_seconds else args.seconds, args.cpu_seconds or math.inf)
    facts = circumstances(vars(args))
    cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for own in shares_of_cores(sorted(os.sched_getaffinity(0)), args.side_by_side, args.nproc):
        cores.put(own)

    def one(training: tuple[str, int]) -> dict[str, Any]:
        own = cores.get()
        os.sched_setaffinity(0, own)  # of this thread, and of what it starts
        try:
            found = measured(*training, budget, args)
        finally:
            cores.put(own)
        print(json.dumps(found), flush=True)
        return found

    # Compiles once, or the first training's start would be long.
    train(Row(), args, f"name=compile_{os.getpid()}", "train.max_steps=1")
    with ThreadPoolExecutor(args.side_by_side) as pool:
        found = list(pool.map(one, [(name, seed) for name in args.row or SHOWN for seed in range(args.seeds)]))
    lines = table(found, facts, args)
    print("\n".join(lines))
    write("five_minutes", args.out, {**facts, "length": said_length(args), "trainings": found}, lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="data/cifar10_train.beton")
    parser.add_argument("--test", default="data/cifar10_test.beton")
    parser.add_argument("--row", action="append", choices=ROWS, metavar="NAME", help=f"default: {' and '.join(SHOWN)}")
    parser.add_argument("--seeds", type=int, default=3)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=300, help="by the clock (default: 300)")
    length.add_argument("--cpu-seconds", type=float, help="of all processes of the training")
    length.add_argument("--epochs", type=int, help="of each row, whatever they take")
    parser.add_argument("--nproc", type=int, default=2, help="processes")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print all rows and their settings")
    parser.add_argument("--work", type=Path, default=Path("runs/five_minutes"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def shares_of_cores(cores: Sequence[int], n: int, nproc: int) -> list[set[int]]:
    """Equal ones for each of n trainings of nproc processes. Exits where they are too few."""
    each = len(cores) // n
    if each < nproc:
        sys.exit(
            f"--side-by-side {n}, {nproc} processes each, needs {n * nproc} cores; this process may use {len(cores)}"
        )
    return [set(cores[i * each : (i + 1) * each]) for i in range(n)]


def said_length(args: argparse.Namespace) -> str:
    if args.epochs:
        return f"{args.epochs} epochs, as asked for"
    budget = f"{args.cpu_seconds:g} CPU seconds" if args.cpu_seconds else f"{args.seconds:g} s by the clock"
    return f"the whole epochs that fit into {budget}, by the cost of a step in {LONG} steps"


# ---------------------------------------------------------------------------------------------------------------------
# A training


def measured(name: str, seed: int, budget: Seconds, args: argparse.Namespace) -> dict[str, Any]:
    """What a training of the row took and scored. Raises CalledProcessError."""
    row = ROWS[name]
    run = f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{os.getpid()}_seed_{seed}"
    G = load_config(CONFIG, settings(row, args, f"name={run}")).train.global_batch_size
    steps_per_epoch = describe(args.train).num_samples // G
    short = train(row, args, f"name={run}_{SHORT}_steps", f"train.max_steps={SHORT}")  # starting, above all
    epochs = args.epochs
    if epochs is None:
        long = train(row, args, f"name={run}_{LONG}_steps", f"train.max_steps={LONG}")
        # By the clock from within: starts differ by seconds, which are many steps.
        step = Seconds(step_s(args.work / f"{run}_{LONG}_steps", G), ((long - short) / (LONG - SHORT)).cpu)
        epochs = epochs_within(budget, step, steps_per_epoch)
    steps = epochs * steps_per_epoch
    further = train(row, args, f"name={run}", f"train.epochs={epochs}", f"seed={seed}") - short
    per_step = further / (steps - SHORT)
    return {
        "row": name,
        "settings": row.settings,
        "seed": seed,
        "epochs": epochs,
        "images": steps * G,
        "wall_s": per_step.wall * steps,
        "cpu_s": per_step.cpu * steps,
        **scores(args.work / run),
    }


def step_s(run: Path, global_batch_size: int) -> float:
    """The median over the intervals between the log's lines, the first half left out."""
    speeds = [record[LAST_INTERVAL] for record in read_records(run / "log.jsonl") if LAST_INTERVAL in record]
    return global_batch_size / statistics.median(speeds[len(speeds) // 2 :])


def settings(row: Row, args: argparse.Namespace, *more: str) -> list[str]:
    """Overrides of CONFIG."""
    return [f"data.train={args.train}", f"data.test={args.test}", f"runs_dir={args.work}", *ALONE, *row.settings, *more]


def train(row: Row, args: argparse.Namespace, *more: str) -> Seconds:
    """What all processes of a whole training took. Raises CalledProcessError."""
    words = [str(CONFIG), *settings(row, args, "resume=none", *more)]
    program, env = ["launcher", "local", "--nproc", str(args.nproc), *words], dict(os.environ)
    if row.module:  # the launcher starts simclr_dist.train only, and does the rest as well
        program = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc}", "-m", row.module, *words]
        threads = max(1, len(os.sched_getaffinity(0)) // args.nproc)
        env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *program], env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # its own and its children's seconds, whatever else runs
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Seconds(time.monotonic() - begin, usage.ru_utime + usage.ru_stime)


def scores(run: Path) -> dict[str, float]:
    def evaluate(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "simclr_dist.cli", "evaluate", *words, str(run), "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]

    knn, linear = evaluate("knn", "--k", "20"), evaluate("linear")
    return {"image_size": knn["image_size"], "knn": knn["top1"], "linear": linear["top1"]}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(found: Sequence[dict[str, Any]], facts: dict[str, Any], args: argparse.Namespace) -> list[str]:
    lines = [
        f"CIFAR-10 from nothing, {args.nproc} processes on {facts['device']}, commit {facts['commit']}; length:",
        f"{said_length(args)}.",
        "kNN: k 20 among all training images. Mean of the seeds, and their deviation.",
        "",
        "| recipe | seeds | images | wall s | CPU s | tested at | kNN | linear |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(one["row"] for one in found):
        own = [one for one in found if one["row"] == name]
        images, wall, cpu = (statistics.mean(one[what] for one in own) for what in ("images", "wall_s", "cpu_s"))
        lines.append(
            f"| {name} | {len(own)} | {images:,.0f} | {wall:.0f} | {cpu:.0f} | {own[0]['image_size']} px "
            f"| {_percent([one['knn'] for one in own])} | {_percent([one['linear'] for one in own])} |"
        )
    return lines


def _percent(shares: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{deviation} %"


if __name__ == "__main__":
    main()
