"""`simclr-dist runs`: what runs there are, the history of one, and the way back to an earlier checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.cli.terminal import percent, print_table, say
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.run import history
from simclr_dist.run.figures import Figure, checkpoint_of, figures_of, is_run, runs_in
from simclr_dist.run.layout import RunDir, is_share, read_records, step_of
from simclr_dist.run.status import Status, read_status
from simclr_dist.safe_text import printable


def register(commands: Commands) -> None:
    runs = commands.add_parser("runs", help="list runs, show the history of one, go back in one")
    actions = runs.add_subparsers(dest="action", required=True, metavar="list|compare|show|rewind")
    listing = add_command(
        actions,
        "list",
        _run_list,
        help="one line for each run in a folder, and in the folders in it",
        epilog="example: simclr-dist runs list runs --sort eval/knn_top1",
    )
    listing.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    listing.add_argument("--sort", metavar="FIGURE", help="by the best value of this figure, the highest first")
    compare = add_command(
        actions,
        "compare",
        _run_compare,
        help="where the settings of runs differ, and their figures side by side",
        epilog="example: simclr-dist runs compare runs/one runs/two --sort eval/knn_top1",
    )
    compare.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path)
    compare.add_argument(
        "--sort", metavar="FIGURE", default="eval/knn_top1", help="what is best (default: %(default)s)"
    )
    for action in (listing, compare):
        action.add_argument(
            "--lowest", action="store_true", help="the lowest value of FIGURE is the best, as of a loss"
        )
        action.add_argument("--json", action="store_true", help="print JSON instead")
    show = add_command(actions, "show", _run_show, help="checkpoints, starts, rewinds and changed settings of a run")
    show.add_argument("run_dir", metavar="RUN", type=Path)
    rewind = add_command(
        actions,
        "rewind",
        _run_rewind,
        help="go back to an earlier checkpoint",
        description=(
            "Set aside the checkpoints after STEP, by name: the next start of the run goes on from STEP. Nothing is\n"
            "deleted; resume=… with one that was set aside takes that way again."
        ),
        epilog="example: simclr-dist runs rewind runs/cifar10_demo 8000",
    )
    rewind.add_argument("run_dir", metavar="RUN", type=Path)
    rewind.add_argument("step", metavar="STEP", type=int)


def _run_list(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ConfigError([f"{args.folder}: no such folder; give the one that holds your runs"])
    folders = list(runs_in(args.folder))
    if not folders and not args.json:
        say(f"{args.folder}: no runs in it")
        return 0
    figure = args.sort or "eval/knn_top1"
    best = {folder: found.get(figure) for folder, found in _figures(folders, args.sort).items()}
    if args.sort:
        folders = _best_first(folders, best, args.lowest)
    if args.json:
        entries = [{**_facts(folder), "best": _best(folder, best[folder], args.lowest)} for folder in folders]
        print(json.dumps({"figure": figure, "runs": entries}, indent=1))
        return 0
    title = "best kNN" if figure == "eval/knn_top1" else f"best {printable(figure)}"
    columns = ("run", "state", "step", "checkpoints", title, "size", "last sign of life")
    rows = [_row(folder, args.folder, figure, best[folder], args.lowest) for folder in folders]
    print_table("", columns, rows)
    return 0


def _row(folder: Path, base: Path, name: str, figure: Figure | None, lowest: bool) -> Sequence[str]:
    facts = _facts(folder)
    return (
        printable(str(folder.relative_to(base))),
        printable(facts["state"]),
        f"{facts['step']:,}",
        str(facts["checkpoints"]),
        _shown(name, figure.best(lowest=lowest)[0] if figure else None),
        _size(folder),
        printable(facts["time"] or "-"),
    )


def _facts(folder: Path) -> dict[str, Any]:
    run, status = RunDir(folder), read_status(folder)
    saved = run.list_checkpoints()
    return {
        "run": str(folder),
        "state": _state(run, status),
        "step": step_of(saved[-1]) if saved else status.step if status else 0,
        "checkpoints": len(saved),
        "time": status.time if status else None,
    }


def _state(run: RunDir, status: Status | None) -> str:
    if status is None:
        return "-"
    if status.state == "failed" and history.is_finished(run.path):
        return "finished (last start refused)"
    return f"{status.state} ({status.reason})" if status.reason else status.state


def _figures(folders: Sequence[Path], wanted: str | None) -> dict[Path, dict[str, Figure]]:
    """Of each run. Raises ConfigError where none of them has the figure that is `wanted`."""
    found = {folder: figures_of(folder) for folder in folders}
    there = sorted({name for figures in found.values() for name in figures})
    if folders and wanted is not None and wanted not in there:
        raise ConfigError([f"--sort {wanted}: no run has recorded it; there are: {', '.join(there) or 'none'}"])
    return found


def _best_first(folders: Sequence[Path], figures: Mapping[Path, Figure | None], lowest: bool) -> list[Path]:
    """Runs without the figure come last."""

    def place(folder: Path) -> tuple[bool, float]:
        figure = figures[folder]
        value = figure.best(lowest=lowest)[0] if figure else 0.0
        return figure is None, value if lowest else -value

    return sorted(folders, key=place)


def _best(folder: Path, figure: Figure | None, lowest: bool) -> dict[str, Any] | None:
    """checkpoint: None where that of this step is not there, or no longer."""
    if figure is None:
        return None
    value, step = figure.best(lowest=lowest)
    checkpoint = checkpoint_of(folder, step)
    return {"value": value, "step": step, "checkpoint": str(checkpoint) if checkpoint else None}


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return percent(value) if "top" in name and is_share(value) else f"{value:.4g}"


def _run_compare(args: argparse.Namespace) -> int:
    from simclr_dist.report.record import read_run

    for folder in args.run_dirs:
        if not is_run(folder):
            raise ConfigError([f"{folder}: no run there"])
    figures = _figures(args.run_dirs, None)
    best = {folder: found.get(args.sort) for folder, found in figures.items()}
    folders = _best_first(list(figures), best, args.lowest)
    settings = _differing([read_run(folder).settings for folder in folders])
    if args.json:
        entries = [
            {
                **_facts(folder),
                "best": _best(folder, best[folder], args.lowest),
                "settings": {key: values[i] for key, values in settings.items()},
                "figures": {name: figure.value for name, figure in figures[folder].items()},
            }
            for i, folder in enumerate(folders)
        ]
        print(json.dumps({"figure": args.sort, "runs": entries}, indent=1, default=str))
        return 0
    columns = ("", *(printable(folder.resolve().name) for folder in folders))
    rows = [(key, *("-" if value is None else str(value) for value in values)) for key, values in settings.items()]
    print_table("settings that differ" if rows else "all settings are the same", columns, _printable(rows))
    names = sorted({name for found in figures.values() for name in found if not name.startswith(("speed/", "time/"))})
    rows = [(name, *(_newest(name, figures[folder].get(name)) for folder in folders)) for name in names]
    print_table("newest figures", columns, _printable(rows))
    for folder in folders:
        if found := _best(folder, best[folder], args.lowest):
            value, where = _shown(args.sort, found["value"]), found["checkpoint"] or "no checkpoint of that step"
            print(printable(f"{folder}: best {args.sort} {value} at step {found['step']:,} ({where})"))
    return 0


def _differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, None where it has none; without the settings that are the same in all."""
    keys = sorted({key for of_run in settings for key in of_run} - {"name"})
    values = {key: [of_run.get(key) for of_run in settings] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _newest(name: str, figure: Figure | None) -> str:
    return _shown(name, figure.value if figure else None)


def _printable(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return [tuple(map(printable, row)) for row in rows]


def _run_show(args: argparse.Namespace) -> int:
    run = RunDir(args.run_dir)
    if not is_run(run.path):
        raise ConfigError([f"{run.path}: no run there"])
    rows = list(_checkpoints(run))
    print(printable(str(run.path)), flush=True)
    print_table("", ("checkpoint", "saved", "size", "notes"), rows)
    for line in history.tell(run.path):
        print(printable(line))
    for file in (run.log, run.evaluations, run.environment, run.attempts):
        if remark := read_records(file).remark:
            print(printable(remark))
    return 0


def _checkpoints(run: RunDir) -> Iterator[Sequence[str]]:
    import time

    line, best = run.list_checkpoints(), history.best_so_far(run.path)
    for path in sorted(run.checkpoints.glob("step_*")):
        notes = []
        if path not in line:
            notes.append(path.name.partition(".")[2].replace("superseded-", "set aside by rewind "))
        elif path == line[-1]:
            notes.append("newest")
        if RunDir.milestone_mark(path).exists():
            notes.append("milestone")
        if best is not None and path == best[0]:
            notes.append(f"best kNN, {percent(best[1])}")
        try:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        except FileNotFoundError:  # removed by the training since it was listed
            continue
        yield printable(path.name), saved, _size(path), printable(", ".join(notes))


def _size(folder: Path) -> str:
    """Of what is there: a training may remove files meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _run_rewind(args: argparse.Namespace) -> int:
    from simclr_dist.checkpoint.files import read_checkpoint
    from simclr_dist.run.owner import claim

    run = RunDir(args.run_dir)
    if not is_run(run.path):
        raise ConfigError([f"{run.path}: no run there"])
    ownership = claim(run.path)
    try:
        history.settle(run.path)
        there = run.list_checkpoints()
        target = run.checkpoint(args.step)
        if target not in there:
            steps = ", ".join(str(step_of(path)) for path in there) or "none"
            raise CheckpointError(f"{run.path}: no checkpoint of step {args.step}; there are: {steps}")
        read_checkpoint(target)  # before others leave: it must be whole
        aside = history.rewind(run.path, str(target), args.step)
    except OSError as error:
        raise CheckpointError(f"{run.path}: cannot go back: {error.strerror or error}") from None
    finally:
        ownership.release()
    for name in aside:
        print(f"set aside: {printable(str(run.checkpoints / name))}")
    print(f"the next start of {printable(str(run.path))} goes on from step {args.step}")
    return 0
