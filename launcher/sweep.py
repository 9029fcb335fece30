"""Many runs of one configuration: a list or a grid of settings, one run directory each.

    grid:                                   list:
      optim.base_lr: [0.3, 0.6]               - {optim.base_lr: 0.3, loss.temperature: 0.1}
      loss.temperature: [0.1, 0.5]            - {optim.base_lr: 0.6, loss.temperature: 0.5}

The grid's last key changes fastest. Run k is called NAME-k, with three digits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from launcher import machine, outcome, processes
from launcher.errors import Exit, LaunchError
from simclr_dist.config import load_config

EXAMPLE = "for example `grid: {optim.base_lr: [0.3, 0.6]}`, or `list: [{optim.base_lr: 0.3}, {optim.base_lr: 0.6}]`"


def read_points(path: Path) -> list[list[str]]:
    """The `key=value` settings of each run."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        points = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    return [[f"{key}={_as_setting(value)}" for key, value in point.items()] for point in points]


def _as_setting(value: Any) -> str:
    # JSON is YAML, except that YAML wants a point in a float with an exponent.
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def at_point(args: argparse.Namespace, points: list[list[str]], index: int) -> argparse.Namespace:
    """The command line of run `index`."""
    if not 0 <= index < len(points):
        raise LaunchError(f"run {index}: {args.sweep} has runs 0 to {len(points) - 1}")
    settings = [*args.overrides, *points[index]]
    name = load_config(args.config, settings, check_data=False).name
    return argparse.Namespace(**{**vars(args), "overrides": [*settings, f"name={name}-{index:03d}"]})


def run(args: argparse.Namespace) -> Exit:
    """All runs on this machine, `--jobs` of them side by side, each with its share of the GPUs. Ends with a table."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    points = read_points(Path(args.sweep))
    gpus = machine.num_gpus()
    share = max(1, gpus // args.jobs)
    if gpus and args.jobs > gpus:
        raise LaunchError(f"--jobs {args.jobs}: there are {gpus} GPUs here, and each run needs one")
    procs = args.nproc or (share if gpus else 1)
    runs = [at_point(args, points, index) for index in range(len(points))]
    run_dirs = [Path(os.path.abspath(load_config(r.config, r.overrides, world_size=procs).run_dir)) for r in runs]
    waiting = [index for index, run_dir in enumerate(run_dirs) if not _is_finished(run_dir)]
    if args.dry_run:
        print_table(points, run_dirs)
        return Exit.OK
    processes.adopt_orphans()
    codes: dict[int, int] = {}
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # slot: (run, launcher)
    try:
        while waiting or running:
            for slot in range(args.jobs):
                if slot in running and (code := running[slot][1].poll()) is not None:
                    index, _ = running.pop(slot)
                    codes[index] = code
                    print(f"launcher: {run_dirs[index].name} ended with exit code {code}", file=sys.stderr, flush=True)
                if slot not in running and waiting:
                    index = waiting.pop(0)
                    running[slot] = index, _start(runs[index], run_dirs[index], procs, slot, share if gpus else 0)
            time.sleep(0.1)
    except KeyboardInterrupt:
        for _, launcher in running.values():
            launcher.terminate()
        for _, launcher in running.values():
            launcher.wait()
        print_table(points, run_dirs)
        return Exit.PREEMPTED
    finally:
        processes.end_descendants()
    print_table(points, run_dirs)
    return Exit.OK if not any(codes.values()) else Exit.FAILED


def _start(args: argparse.Namespace, run_dir: Path, procs: int, slot: int, gpus: int) -> subprocess.Popen[bytes]:
    env = dict(os.environ)
    if gpus:
        mine = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus * (slot + 1))))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(mine[slot * gpus : (slot + 1) * gpus])
    words = ["local", args.config, *args.overrides, f"--nproc={procs}", f"--max-failures={args.max_failures}"]
    words += [f"--device={args.device}", f"--stop-signal={args.stop_signal}", f"--save-budget-s={args.save_budget_s:g}"]
    words += [f"--env={setting}" for setting in args.env]
    (run_dir / "logs").mkdir(parents=True, exist_ok=True, mode=0o750)
    with open(run_dir / "logs" / "local.out", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
        )


def _is_finished(run_dir: Path) -> bool:
    status = outcome.read_status(run_dir)
    return status is not None and status.state == "finished"


def print_table(points: list[list[str]], run_dirs: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    results = [last_results(run_dir) for run_dir in run_dirs]
    tags = sorted({tag for result in results for tag in result})
    table = Table(*("run", "settings", "state", "step", *tags))
    for settings, run_dir, result in zip(points, run_dirs, results, strict=True):
        status = outcome.read_status(run_dir)
        state = (status.reason or status.state) if status else "-"
        cells = [run_dir.name, " ".join(settings), state, str(status.step if status else 0)]
        table.add_row(*(Text(cell) for cell in cells), *(f"{result[t]:.4g}" if t in result else "-" for t in tags))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def last_results(run_dir: Path) -> dict[str, float]:
    """The last logged value of loss and accuracies."""
    found: dict[str, float] = {}
    try:
        lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found |= {
                tag: float(value)
                for tag, value in entry.items()
                if (tag == "train/loss" or tag.startswith("eval/")) and isinstance(value, (int, float))
            }
    return found
