"""`simclr-dist runs`: what runs there are, the history of one, and the way back to an earlier checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from simclr_dist.cli.arguments import Commands, add_command
from simclr_dist.cli.terminal import percent, print_table, say
from simclr_dist.errors import CheckpointError, ConfigError
from simclr_dist.run import history
from simclr_dist.run.layout import RunDir, is_share, read_records, step_of
from simclr_dist.run.status import Status, read_status
from simclr_dist.safe_text import printable


def register(commands: Commands) -> None:
    runs = commands.add_parser("runs", help="list runs, show the history of one, go back in one")
    actions = runs.add_subparsers(dest="action", required=True, metavar="list|show|rewind")
    listing = add_command(actions, "list", _run_list, help="one line for each run in a folder")
    listing.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="default: runs")
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
    folders = sorted(path for path in args.folder.iterdir() if _is_run(RunDir(path)))
    if not folders:
        say(f"{args.folder}: no runs in it")
        return 0
    columns = ("run", "state", "step", "checkpoints", "best kNN", "size", "last sign of life")
    print_table("", columns, [_row(RunDir(path)) for path in folders])
    return 0


def _is_run(run: RunDir) -> bool:
    return any(path.exists() for path in (run.status, run.config, run.checkpoints))


def _row(run: RunDir) -> Sequence[str]:
    status, saved, best = read_status(run.path), run.list_checkpoints(), _best_knn(run)
    return (
        printable(run.path.name),
        printable(_state(run, status)),
        f"{step_of(saved[-1]) if saved else status.step if status else 0:,}",
        str(len(saved)),
        percent(best) if best is not None else "-",
        _size(run.path),
        printable(status.time if status else "-"),
    )


def _state(run: RunDir, status: Status | None) -> str:
    if status is None:
        return "-"
    if status.state == "failed" and history.is_finished(run.path):
        return "finished (last start refused)"
    return f"{status.state} ({status.reason})" if status.reason else status.state


def _best_knn(run: RunDir) -> float | None:
    """Of all evaluations during the training."""
    found = [line.get("eval/knn_top1") for line in read_records(run.log)]
    return max((value for value in found if is_share(value)), default=None)


def _run_show(args: argparse.Namespace) -> int:
    run = RunDir(args.run_dir)
    if not _is_run(run):
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
    if not _is_run(run):
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
