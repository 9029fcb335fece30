"""Many runs of one configuration: a list or a grid of settings, one run directory for each.

    grid:                                   list:
      optim.base_lr: [0.3, 0.6]               - {optim.base_lr: 0.3, loss.temperature: 0.1}
      loss.temperature: [0.1, 0.5]            - {optim.base_lr: 0.6, loss.temperature: 0.5}

The grid's last key changes fastest. Run k is called NAME-k, with three digits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher import build, machine, processes
from launcher.arguments import as_words
from launcher.errors import Exit, LaunchError
from simclr_dist import streams
from simclr_dist.config import load_config
from simclr_dist.config.bounded_yaml import read_yaml
from simclr_dist.run.figures import figures_of
from simclr_dist.run.layout import RunDir
from simclr_dist.run.status import read_status

MOST_RUNS = 10_000
EXAMPLE = "for example `grid: {optim.base_lr: [0.3, 0.6]}`, or `list: [{optim.base_lr: 0.3}, {optim.base_lr: 0.6}]`"


def read_points(path: Path) -> list[list[str]]:
    """The `key=value` settings of each run."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"{path}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict) or len(values) != 1 or not values.keys() <= {"grid", "list"}:
        raise LaunchError(f"{path}: expected one key, `grid` or `list`; {EXAMPLE}")
    if "list" in values:
        points = values["list"]
        if not isinstance(points, list) or not points or not all(isinstance(p, dict) and p for p in points):
            raise LaunchError(f"{path}: `list` must hold one group of settings for each run; {EXAMPLE}")
    else:
        grid = values["grid"]
        if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
            raise LaunchError(f"{path}: each key of `grid` needs a list of values; {EXAMPLE}")
        if (num_runs := math.prod(map(len, grid.values()))) > MOST_RUNS:
            raise LaunchError(f"{path}: the grid means {num_runs:,} runs; at most {MOST_RUNS:,} are made of one file")
        points = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    return [[f"{key}={_as_setting(value)}" for key, value in point.items()] for point in points]


def _as_setting(value: Any) -> str:
    # JSON is also YAML, except that in YAML a float with an exponent needs a decimal point.
    text = value if isinstance(value, str) else json.dumps(value, default=str)  # dates
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def at_point(args: argparse.Namespace, points: list[list[str]], index: int) -> argparse.Namespace:
    """The command line that starts run `index` alone."""
    if not 0 <= index < len(points):
        raise LaunchError(f"run {index}: {args.sweep} has runs 0 to {len(points) - 1}")
    settings = [*args.overrides, *points[index]]
    name = load_config(args.config, settings, check_data=False).name
    overrides = [*settings, f"name={name}-{index:03d}"]
    return argparse.Namespace(**{**vars(args), "sweep": None, "overrides": overrides})


@dataclass(frozen=True)
class Run:
    settings: list[str]
    run_dir: Path
    command: list[str]


def run(args: argparse.Namespace) -> Exit:
    """All runs on this machine, `--jobs` of them side by side, each with its share of the GPUs; then prints a table."""
    points = read_points(Path(args.sweep))
    share, procs = _share(args)
    runs = []
    for index, settings in enumerate(points):
        point = at_point(args, points, index)
        config = load_config(point.config, point.overrides, world_size=procs)
        runs.append(Run(settings, Path(os.path.abspath(config.run_dir)), _command(point, procs)))
    code = Exit.OK
    if not args.dry_run:
        try:
            code = _run_all(runs, args.jobs, share)
        except KeyboardInterrupt:
            code = Exit.PREEMPTED
    if args.json:
        print(json.dumps([_as_dict(run) for run in runs], indent=1))
    else:
        print_table(runs)
    return code


def _share(args: argparse.Namespace) -> tuple[int, int]:
    """GPUs and processes of each run."""
    device, procs = build.device_and_procs(args)
    if device == "cpu":
        return 0, procs
    gpus = machine.num_gpus()
    share = gpus // args.jobs
    if (args.nproc or 1) > share:
        raise LaunchError(
            f"--jobs {args.jobs} with {args.nproc or 1} processes each: there are {gpus} GPUs here, "
            "and each process needs its own"
        )
    return share, args.nproc or share


def _run_all(runs: list[Run], jobs: int, share: int) -> Exit:
    waiting = [run for run in runs if not _is_finished(run.run_dir)]
    running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}  # by slot; each slot has its own GPUs
    failed = False
    # Both end the sweep like Ctrl-C. The background jobs of a shell inherit that SIGINT is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    processes.adopt_orphans()
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot in running and (code := running[slot][1].poll()) is not None:
                    run, _ = running.pop(slot)
                    failed |= code != 0
                    print(f"launcher: {run.run_dir.name} ended with exit code {code}", file=sys.stderr, flush=True)
                if slot not in running and waiting:
                    run = waiting.pop(0)
                    running[slot] = run, _start(run, devices_of_slot(slot, share, os.environ))
            time.sleep(0.1)
    except KeyboardInterrupt:
        for _, launcher in running.values():
            launcher.terminate()
        for _, launcher in running.values():
            launcher.wait()
        raise
    finally:
        processes.end_descendants()
    return Exit.FAILED if failed else Exit.OK


def devices_of_slot(slot: int, share: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that gives one of the runs side by side its share of the visible GPUs; empty on a CPU."""
    if not share:
        return {}
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range((slot + 1) * share)))}
    # AMD's runtime reads its own variable first.
    devices |= {name: environ[name] for name in (*devices, "HIP_VISIBLE_DEVICES") if name in environ}
    return {name: ",".join(value.split(",")[slot * share : (slot + 1) * share]) for name, value in devices.items()}


def _command(args: argparse.Namespace, procs: int) -> list[str]:
    words = ["local", args.config, *args.overrides, f"--nproc={procs}"]
    words += [*as_words(args, "max-failures"), f"--device={args.device}"]
    words += as_words(args, "stop-signal", "save-budget-s", "env", "port", "no-requeue")
    return [sys.executable, "-m", "launcher", *words]


def _start(run: Run, devices: dict[str, str]) -> subprocess.Popen[bytes]:
    logs = RunDir(run.run_dir).logs
    logs.mkdir(parents=True, exist_ok=True, mode=0o750)
    with open(logs / "local.out", "ab") as log:
        return subprocess.Popen(
            run.command,
            env=os.environ | devices,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=processes.die_with_this_process(),
        )


def _is_finished(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == "finished"


def _as_dict(run: Run) -> dict[str, Any]:
    status = read_status(run.run_dir)
    return {
        "name": run.run_dir.name,
        "run_dir": str(run.run_dir),
        "settings": run.settings,
        "command": run.command,
        "state": status.state if status else None,
        "reason": (status.reason or None) if status else None,
        "step": status.step if status else 0,
        "results": last_results(run.run_dir),
    }


def print_table(runs: list[Run]) -> None:
    shown = [_as_dict(run) for run in runs]
    tags = sorted({tag for entry in shown for tag in entry["results"]})
    rows = []
    for entry in shown:
        cells = [
            entry["name"],
            " ".join(entry["settings"]),
            entry["reason"] or entry["state"] or "-",
            str(entry["step"]),
        ]
        cells += [f"{entry['results'][tag]:.4g}" if tag in entry["results"] else "-" for tag in tags]
        rows.append(cells)
    streams.print_table("", ("run", "settings", "state", "step", *tags), rows, texts=3, width=160)


def last_results(run_dir: Path) -> dict[str, float]:
    """The last logged value of loss and accuracies."""
    figures = figures_of(run_dir)
    return {tag: figure.value for tag, figure in figures.items() if tag == "train/loss" or tag.startswith("eval/")}
