"""What a training on CPUs gains by its own collectives, and by keeping freed memory. One row a way, in turn.

    python -m benchmarks.cpu_step --train data/cifar10_train.beton
    python -m benchmarks.cpu_step --train data/cifar10_train.beton --nproc 4 --rounds 3 model.width=48

The steps of configs/cifar10_demo.yaml, in each round once each way: as shipped; with gloo's collectives
(parallel/neighbours.py gone); with memory returned to Linux (parallel/host_memory.py gone); without both; and in one
process with as many threads. A round's figure is the median of its steps from 20 on; the table has the rounds' median
and their spread. The images of a step are the same in each way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, circumstances, write

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cifar10_demo.yaml"
WITHOUT = {
    "as shipped": (),
    "gloo's collectives": ("neighbours",),
    "memory returned": ("memory",),
    "without both": ("neighbours", "memory"),
}
ONE_PROCESS = "one process"
FIRST = 20
"""Steps before are not counted: caches are cold, and freed memory has found its places after some."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="data/cifar10_train.beton")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    facts = circumstances({name: value for name, value in vars(args).items() if name != "train"})
    found: dict[str, list[float]] = {way: [] for way in (*WITHOUT, ONE_PROCESS)}
    for _ in range(args.rounds):
        for way, times in found.items():
            times.append(step_ms(way, args))
            print(f"{way}: {times[-1]:.1f} ms", flush=True)
    lines = table(found, facts, args.nproc)
    print("\n".join(lines))
    write("cpu_step", args.out, {**facts, "step_ms": found}, lines)


def step_ms(way: str, args: argparse.Namespace) -> float:
    """The median step of a training of its own. Raises CalledProcessError."""
    nproc = 1 if way == ONE_PROCESS else args.nproc
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            str(CONFIG),
            f"data.train={args.train}",
            "data.test=null",
            f"runs_dir={folder}",
            f"train.max_steps={args.steps}",
            "evaluation.knn_every_epochs=null",
            "checkpoint.every_min=null",
            "monitor.terminal=quiet",
            *args.overrides,
        ]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        env = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": str(threads),
            "CPU_STEP_WITHOUT": " ".join(WITHOUT.get(way, ())),
            "CPU_STEP_TIMES": f"{folder}/times.json",
        }
        subprocess.run([*command, "-m", "benchmarks.cpu_step_training", *settings], env=env, check=True)
        began = json.loads(Path(f"{folder}/times.json").read_text())
    steps = [later - earlier for earlier, later in itertools.pairwise(began)]
    return 1000 * statistics.median(steps[FIRST:])


def table(found: dict[str, list[float]], facts: dict[str, Any], nproc: int) -> list[str]:
    shipped = statistics.median(found["as shipped"])
    lines = [
        f"The demo's step, {nproc} processes on {facts['device']}, commit {facts['commit']}, torch {facts['torch']}.",
        "",
        "| | ms a step | rounds | time of the shipped step |",
        "|---|---:|---:|---:|",
    ]
    for way, times in found.items():
        ms = statistics.median(times)
        lines.append(f"| {way} | {ms:.1f} | {min(times):.1f} to {max(times):.1f} | {ms / shipped:.2f} |")
    return lines


if __name__ == "__main__":
    main()
